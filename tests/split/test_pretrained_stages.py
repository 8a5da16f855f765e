"""Stages from a Hugging Face directory compute what `from_pretrained` computes, read only their own, and go back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.ties import ties_in

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from torchdistpackage.split.causal_lm import split_causal_lm  # noqa: E402
from torchdistpackage.split.decoder.pretrained import load_stages  # noqa: E402
from torchdistpackage.split.decoder.pretrained_saving import save_stage, write_index  # noqa: E402

IDS = torch.tensor([[5, 9, 7, 3, 11, 4, 6, 8], [3, 8, 2, 6, 4, 9, 5, 7]])
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": GPT2,
    "gemma": SMALL | {"head_dim": 8},  # tied, and a scale that is in no file
    "gemma2": SMALL | WINDOWS,
    "gemma3_text": SMALL | WINDOWS,
    "gpt_neox": NEOX,
    "mixtral": SMALL | {"num_local_experts": 3},  # experts are stacked in the model, and not in the files
    "qwen3_moe": SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    "phi3": SMALL,
    "olmo2": SMALL,
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "mistral": SMALL | {"sliding_window": 4},
    "opt": NEOX | {"ffn_dim": 32, "word_embed_proj_dim": 8},
    "falcon": NEOX,
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 4, "n_head": 2},
}


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # not zeros and ones
    return model


def logits_of(directory: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)(IDS).logits


def run(parts: dict[int, nn.Module]) -> torch.Tensor:
    x = IDS
    with torch.no_grad():
        for part in parts.values():
            x = part(x)
    return x


def save(parts: dict[int, nn.Module], directory: Path, **options: Any) -> None:
    write_index(directory, [save_stage(part, directory, s, len(parts), **options) for s, part in parts.items()])


def names_on_disk(directory: Path) -> list[str]:
    files = directory.glob("*.safetensors")
    return sorted(name for file in files for name in safetensors.load_file(file))


def rewrite(directory: Path, changed: dict[str, torch.Tensor | None]) -> None:
    tensors = safetensors.load_file(directory / "model.safetensors") | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.save_file(kept, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_the_model_there_and_back(family: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path)
    make(family).save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    for num_stages, source in ((1, tmp_path), (2, tmp_path / "sharded"), (4, tmp_path)):
        parts = load_stages(source, num_stages)
        assert torch.equal(run(parts), logits_of(source))
        assert not any(part.training for part in parts.values())
    save(parts, tmp_path / "tuned", max_shard_size="4KB")
    assert torch.equal(logits_of(tmp_path / "tuned"), logits_of(tmp_path))
    assert names_on_disk(tmp_path / "tuned") == names_on_disk(tmp_path)
    assert (tmp_path / "tuned" / "generation_config.json").is_file()


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt2"])
def test_the_checkpoint_says_the_dtype(family: str, tmp_path: Path) -> None:
    make(family, torch.bfloat16).save_pretrained(tmp_path)
    parts = load_stages(tmp_path, 2)
    assert {parameter.dtype for part in parts.values() for parameter in part.parameters()} == {torch.bfloat16}
    assert torch.equal(run(parts), logits_of(tmp_path))
    save(parts, tmp_path / "tuned")
    assert logits_of(tmp_path / "tuned").dtype == torch.bfloat16
    assert torch.equal(run(load_stages(tmp_path, 2, dtype="float32")), logits_of(tmp_path, dtype=torch.float32))


def test_without_a_word_in_the_configuration_the_files_say_the_dtype(tmp_path: Path) -> None:
    make("llama", torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert load_stages(tmp_path, 2, [1])[1].lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize("family", ["mixtral", "gemma", "gpt2"])
def test_files_of_other_stages_are_not_read(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in files.items() if re.search(r"(layers|h)\.1\.", name)}
    for file in {*files.values()} - needed:
        (tmp_path / file).unlink()
    part = load_stages(tmp_path, 4, [1])[1]
    whole = model.state_dict()
    assert part.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.state_dict().items())
    with pytest.raises(CheckpointError, match=r"model-\d+-of-\d+.safetensors \(the file is not there\), wanted for"):
        load_stages(tmp_path, 4, [0])


def test_a_missing_file_is_named_with_all_that_was_wanted_of_it(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    file = index["lm_head.weight"]
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_stages(tmp_path, 1)
    assert all(name in str(caught.value) for name, where in index.items() if where == file)
    assert not any(name in str(caught.value) for name, where in index.items() if where != file)


def test_a_tied_head_is_one_parameter_and_one_tensor_on_disk(tmp_path: Path) -> None:
    make("gemma").save_pretrained(tmp_path)
    parts = load_stages(tmp_path, 2)
    assert parts[0].model.embed_tokens.weight is parts[1].lm_head.weight
    assert (parts[0].lm_head, parts[1].model.embed_tokens) == (None, None)
    alone = load_stages(tmp_path, 2, [1])[1]
    assert ties_in(alone)["lm_head.weight"].stages == (0, 1)
    save({0: load_stages(tmp_path, 2, [0])[0], 1: alone}, tmp_path / "tuned")
    assert "lm_head.weight" not in names_on_disk(tmp_path / "tuned")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_a_tied_weight_may_have_either_name_or_both_but_one_value(tmp_path: Path) -> None:
    make("qwen2").save_pretrained(tmp_path)
    weight = safetensors.load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    want = logits_of(tmp_path)
    rewrite(tmp_path, {"lm_head.weight": weight.clone()})
    assert torch.equal(run(load_stages(tmp_path, 2)), want)
    rewrite(tmp_path, {"model.embed_tokens.weight": None})
    assert torch.equal(run(load_stages(tmp_path, 2)), want)
    rewrite(tmp_path, {"model.embed_tokens.weight": weight + 1})
    for stage in (0, 1):
        with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight"):
            load_stages(tmp_path, 2, [stage])
    untied = transformers.AutoConfig.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert torch.equal(run(load_stages(tmp_path, 2, config=untied)), logits_of(tmp_path, config=untied))


def test_files_of_the_base_model_lack_its_prefix(tmp_path: Path) -> None:
    make("gpt2").transformer.save_pretrained(tmp_path)
    assert "wte.weight" in names_on_disk(tmp_path)
    parts = load_stages(tmp_path, 3)
    assert torch.equal(run(parts), logits_of(tmp_path))
    save(parts, tmp_path / "tuned")
    assert torch.equal(logits_of(tmp_path / "tuned"), logits_of(tmp_path))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_parts_of_a_model_that_was_never_on_disk(family: str, tmp_path: Path) -> None:
    model = make(family)
    save(split_causal_lm(model, 3), tmp_path)
    assert torch.equal(logits_of(tmp_path), model(IDS).logits)
    model.save_pretrained(tmp_path / "whole")
    assert names_on_disk(tmp_path) == names_on_disk(tmp_path / "whole")


def test_parts_can_be_cut_by_name_and_weight(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    parts = load_stages(tmp_path, 2, input_weight=2, output_weight=0, attn_implementation="eager")
    assert list(parts[0].model.layers) == ["0"]
    assert parts[0].config._attn_implementation == "eager"
    names = [
        ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3))],
        ["model.layers.3", "model.norm", "lm_head"],
    ]
    assert list(load_stages(tmp_path, 2, [1], module_names=names)[1].model.layers) == ["3"]


def test_until_the_index_is_written_the_earlier_checkpoint_stands(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    before = logits_of(tmp_path)
    parts = load_stages(tmp_path, 2)
    with torch.no_grad():
        for part in parts.values():
            for parameter in part.parameters():
                parameter.mul_(1.5)
    pieces = [save_stage(part, tmp_path, stage, 2) for stage, part in parts.items()]
    assert torch.equal(logits_of(tmp_path), before)
    with pytest.raises(CheckpointError, match=r"stages \[0\] are not those of all"):
        write_index(tmp_path, pieces[:1])
    assert torch.equal(logits_of(tmp_path), before)
    write_index(tmp_path, pieces[::-1])
    assert torch.equal(logits_of(tmp_path), run(parts))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-stage0-00001-of-00001.safetensors",
        "model-stage1-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_an_index_counts_its_bytes(tmp_path: Path) -> None:
    model = make("gemma", torch.bfloat16)
    save(split_causal_lm(model, 2), tmp_path, max_shard_size="2KB")
    metadata = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["total_size"] == 2 * sum(parameter.numel() for parameter in model.parameters())


def test_pieces_that_cannot_be_seen_change_nothing(tmp_path: Path) -> None:
    parts = split_causal_lm(make("llama"), 2)
    pieces = [save_stage(part, tmp_path / str(stage), stage, 2) for stage, part in parts.items()]
    with pytest.raises(CheckpointError, match="give all stages the same directory"):
        write_index(tmp_path / "0", pieces)
    assert not (tmp_path / "0" / "config.json").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, {"model.norm.weight": torch.ones(7)})
    load_stages(tmp_path, 2, [0])
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \(7,\) in the files and \(16,\)"):
        load_stages(tmp_path, 2, [1])
    rewrite(tmp_path, {"model.norm.weight": None, "lm_head.weight": None})
    with pytest.raises(CheckpointError, match="does not hold lm_head.weight, model.norm.weight of Llama"):
        load_stages(tmp_path, 2, [1])


def test_weights_that_no_stage_knows_are_told_others_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama").save_pretrained(tmp_path)
    transformers.logging.enable_propagation()
    try:
        load_stages(tmp_path, 2)
        assert not caplog.records
        rewrite(tmp_path, {"model.layers.4.mlp.up_proj.weight": torch.ones(3)})
        load_stages(tmp_path, 2, [0])
    finally:
        transformers.logging.disable_propagation()
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "model.layers.4.mlp.up_proj.weight"
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"abc", "model.safetensors is not a whole safetensors file"),
        ("model.safetensors", None, "neither model.safetensors nor model.safetensors.index.json is there"),
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json of .* cannot be used"),
        ("config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "quantized"),
    ],
)
def test_directories_that_are_none(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_stages(tmp_path, 2)


def test_other_formats_are_refused_in_words(tmp_path: Path) -> None:
    make("llama").config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert it once"):
        load_stages(tmp_path, 2)
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        load_stages(tmp_path / "pytorch_model.bin", 2)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of safetensors files"):
        load_stages(tmp_path, 2)
    with pytest.raises(CheckpointError, match="it has no save_pretrained"):
        save_stage(nn.Linear(2, 2), tmp_path, 0, 1)
