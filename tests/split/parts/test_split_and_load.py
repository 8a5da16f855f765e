"""A checkpoint that was split on disk, loaded part by part by parties that have nothing else."""

import shutil

import pytest
import torch
import transformers
from language_models import SIZES, language_model, padded

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.parts import ModelFactory, load_split_model
from torchdistpackage.split.parts.checkpoint_split import split_checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 4}
LISTED = {"FalconH1": {**MAMBA, "head_dim": 8}, "ModernBertDecoder": {"local_attention": 8}}
"""Families whose first values are made by going through the list of layers, or of modules outside of it."""


def in_turn(parts, ids, **kwargs):
    for part in parts:
        ids = part(ids, **kwargs)
    return ids.logits


def split_and_loaded(directory, out, points=(1, 3)):
    files = split_checkpoint(directory, points, out)
    return [load_split_model(file.path, verify=True) for file in files]


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "Qwen2", "Llama", "Mixtral", "Gemma3Text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_the_whole_model(family, dtype, tmp_path):
    language_model(family).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    parts = split_and_loaded(tmp_path, tmp_path / "parts")
    ids, mask = padded()
    assert not any(part.training for part in parts)
    assert {tensor.dtype for part in parts for tensor in part.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(
            in_turn(parts, ids, attention_mask=mask), whole(ids, attention_mask=mask, use_cache=False).logits
        )


@pytest.mark.parametrize("family", LISTED)
def test_families_that_go_through_their_layers(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_hidden_layers": 4, **LISTED[family]})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, _ = padded()
    made = ModelFactory.create_split_models("auto", tmp_path, 1, 3)
    for parts in (made, split_and_loaded(tmp_path, tmp_path / "parts")):
        with torch.no_grad():
            assert torch.equal(in_turn(parts, ids), whole(ids, use_cache=False).logits)


def test_what_generate_needs_goes_along(tmp_path):
    whole = language_model("Llama")
    whole.generation_config.eos_token_id = [2, 7]
    whole.save_pretrained(tmp_path)
    bottom, trunk, top = split_and_loaded(tmp_path, tmp_path / "parts")
    again = load_split_model(top.save_split_model(tmp_path / "again"))
    for part in (bottom, trunk, top, again):
        assert part.stage.generation_config.eos_token_id == [2, 7]


def test_a_party_with_its_two_files_alone(tmp_path):
    language_model("Gemma").save_pretrained(tmp_path / "model")
    split_checkpoint(tmp_path / "model", [1, 3], tmp_path / "parts")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    for name in ("top.safetensors", "top_metadata.json"):
        shutil.move(tmp_path / "parts" / name, tmp_path / "mine" / name)
    shutil.rmtree(tmp_path / "parts")
    top = load_split_model(tmp_path / "mine" / "top.safetensors", verify=True)
    assert top(torch.zeros(1, 2, 32)).logits.shape == (1, 2, 96)


def test_a_damaged_part_is_not_loaded(tmp_path):
    language_model("Llama").save_pretrained(tmp_path)
    path = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")[1].path
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors is not what was written: model\.layers"):
        load_split_model(path, verify=True)
