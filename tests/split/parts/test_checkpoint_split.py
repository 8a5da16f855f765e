"""A checkpoint that is split on disk: the parts hold the right bytes, load, and compute what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import language_model, padded
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.filling import fill_stage
from torchdistpackage.split.decoder.pretrained import read_config, without_weights
from torchdistpackage.split.decoder.weight_files import WeightFiles
from torchdistpackage.split.parts.checkpoint_split import PartFile, split_checkpoint, verify_part
from torchdistpackage.split.parts.metadata import PartMetadata

FAMILIES = ["GPT2", "Llama", "Qwen2", "Gemma", "Gemma3Text", "Phi3", "GPTNeoX", "Mixtral", "Qwen3Moe", "OPT", "Bloom"]


def saved(family: str, directory: Path, shard: str = "50GB", **options: Any) -> nn.Module:
    model = language_model(family, **options).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def loaded(part: PartFile, source: Path) -> nn.Module:
    """A part from its file alone."""
    whole = without_weights(read_config(str(source)), torch.bfloat16)
    stage = ["bottom", "trunk", "top"].index(part.component)
    found = split_causal_lm(whole, 3, [stage], cut_points=[1, 3])[stage]
    with WeightFiles(str(part.path.parent), part.path.name) as files:
        fill_stage(found, whole, files, torch.bfloat16)
    return found


@pytest.mark.parametrize(("family", "shard"), [*((family, "20KB") for family in FAMILIES), ("GPT2", "5GB")])
def test_the_parts_compute_what_the_model_does(family: str, shard: str, tmp_path: Path) -> None:
    saved(family, tmp_path, shard)
    parts = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    x, mask = padded()
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path)(x, attention_mask=mask).logits
        for part in parts:
            x = loaded(part, tmp_path)(x, attention_mask=mask)
    assert torch.equal(x, want)


def test_a_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    saved("Mixtral", tmp_path, "20KB")
    source = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for part in split_checkpoint(tmp_path, [1, 3], tmp_path / "parts"):
        names = load_file(part.path).keys()
        save_file({name: source.pop(name) for name in names}, tmp_path / "theirs", {"format": "pt"})
        assert part.path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert not source


def test_a_tied_head_goes_with_both_ends(tmp_path: Path) -> None:
    saved("Gemma", tmp_path)
    bottom, trunk, top = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(bottom.path)[name], load_file(top.path)[name])
    assert name not in load_file(trunk.path)
    counted = sum(parameter.numel() for parameter in loaded(top, tmp_path).parameters())
    assert PartMetadata.read(top.metadata_path).num_parameters == counted


def test_the_ends_of_a_tie_are_compared_where_both_are_there(tmp_path: Path) -> None:
    saved("Gemma", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    top = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")[2]
    assert load_file(top.path).keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight, but the files hold"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "other")


def test_the_metadata_says_what_is_in_the_file(tmp_path: Path) -> None:
    model = saved("Llama", tmp_path / "llama", "20KB")
    parts = split_checkpoint(tmp_path / "llama", [1, 3], tmp_path / "parts")
    about = [PartMetadata.read(part.metadata_path) for part in parts]
    assert [(each.component, each.start_layer, each.num_layers) for each in about] == [
        ("bottom", 0, 1),
        ("trunk", 1, 2),
        ("top", 3, 2),
    ]
    assert sum(each.num_parameters for each in about) == sum(p.numel() for p in model.parameters())
    for each, part in zip(about, parts, strict=True):
        assert each.sha256.keys() == load_file(part.path).keys()
        assert each.memory_mb * 2**20 == part.num_bytes == 2 * each.num_parameters
        assert (each.model_type, each.dtype, each.source, each.total_layers) == ("llama", "bfloat16", "llama", 5)
        assert str(tmp_path) not in part.metadata_path.read_text()


def test_every_byte_is_told_twice(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    told: list[tuple[int, int]] = []
    parts = split_checkpoint(tmp_path, [1, 3], tmp_path / "p", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]} == {2 * sum(part.num_bytes for part in parts)}


def test_damage_on_the_way_is_found(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    top = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")[2].path
    verify_part(top)
    content = bytearray(top.read_bytes())
    content[-1] ^= 1
    top.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"top.safetensors is not what was written: model.norm.weight of 20"):
        verify_part(top)
    top.write_bytes(content[:-2])
    with pytest.raises(CheckpointError, match="top.safetensors is cut short"):
        verify_part(top)
    top.write_bytes((tmp_path / "parts" / "trunk.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="top.safetensors does not hold lm_head.weight"):
        verify_part(top)
    (tmp_path / "parts" / "top_metadata.json").unlink()
    with pytest.raises(CheckpointError, match="top_metadata.json is not there"):
        verify_part(top)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("2,", "two layers say"),
        ([1.5, 2], "two layers say"),
        ([3, 1], "within the layers 1..4 of 5, .*; got 3,1: try 1,4"),
        ([1, 5], "; got 1,5: try"),
        ([0, 2], "; got 0,2: try"),
        ([2], "two layers say where"),
    ],
)
def test_impossible_cuts(points: Any, message: str, tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    with pytest.raises(SplitError, match=message):
        split_checkpoint(tmp_path, points, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_tensors_of_no_part_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("Llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"old.inv_freq": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["old.inv_freq"]


def test_without_a_word_in_the_configuration_the_files_say_the_dtype(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    part = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")[0]
    assert PartMetadata.read(part.metadata_path).dtype == "bfloat16"
