"""What is wrong with a checkpoint, or with the place for its parts, is said before anything is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import configuration, language_model
from safetensors.torch import load_file, save_file

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.safetensors_header import TensorEntry, make_header, read_header
from torchdistpackage.split.parts.checkpoint_split import split_checkpoint

INDEX = "model.safetensors.index.json"


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def moved_tensor(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (directory / INDEX).write_text(json.dumps(index))


def overlapping(header: dict[str, Any]) -> None:
    for value in header.values():
        if "data_offsets" in value:
            value["data_offsets"] = [0, value["data_offsets"][1] - value["data_offsets"][0]]


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


HEAD = "lm_head.weight"
LAYER = "model.layers.2.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda d: shard_of(d, LAYER).unlink(), rf"model-\d+-of-\d+.safetensors is not there, which .*{LAYER}"),
    "short": (
        lambda d: short(shard_of(d, LAYER)),
        r"is cut short: it has \d+ bytes, .* of \d+; 1 of \d+",
    ),
    "long": (lambda d: shard_of(d, HEAD).open("ab").write(b"more"), r"has \d+ bytes, but its tensors end at \d+"),
    "empty": (lambda d: shard_of(d, HEAD).write_bytes(b""), r"is no safetensors file: it has 0 bytes"),
    "pointer": (lambda d: shard_of(d, HEAD).write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "garbage": (lambda d: shard_of(d, HEAD).write_bytes(struct.pack("<Q", 4) + b"{{{{"), "its header is no JSON"),
    "list": (lambda d: shard_of(d, HEAD).write_bytes(struct.pack("<Q", 2) + b"[]"), "its header is list"),
    "overlap": (lambda d: rewrite_header(shard_of(d, LAYER), overlapping), "is damaged: .* overlaps"),
    "range": (
        lambda d: rewrite_header(shard_of(d, HEAD), lambda h: h[HEAD].update(data_offsets=[9, 5])),
        rf"{HEAD} is BF16 of shape \(96, 32\), 6144 bytes, and has the bytes 9 to 5",
    ),
    "dtype": (lambda d: rewrite_header(shard_of(d, HEAD), lambda h: h[HEAD].update(dtype="X9")), f"{HEAD} as X9"),
    "nonsense": (lambda d: rewrite_header(shard_of(d, HEAD), lambda h: h.update({HEAD: 3})), f"describes {HEAD} as 3"),
    "moved": (moved_tensor, rf"does not hold {HEAD}, which the index says it does"),
    "index": (lambda d: (d / INDEX).write_text("{"), "is no index of safetensors files"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "bad config": (lambda d: (d / "config.json").write_text("{"), "config.json of .* cannot be used"),
    "other config": (
        lambda d: change_config(d, hidden_size=64),
        r"embed_tokens.weight is \(96, 32\) in the files",
    ),
    "more layers": (lambda d: change_config(d, num_hidden_layers=6), "does not hold model.layers.5.input_layernorm"),
    "no model": (lambda d: change_config(d, model_type="t5"), "describes no language model that can be built"),
    "quantized": (lambda d: change_config(d, quantization_config={"quant_method": "fp8"}), "quantized weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_nothing_written(damage: str, tmp_path: Path) -> None:
    source = tmp_path / "llama"
    language_model("Llama").to(torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    break_it, message = DAMAGES[damage]
    break_it(source)
    with pytest.raises(CheckpointError, match=message) as caught:
        split_checkpoint(source, [1, 3], tmp_path / "parts")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "parts").exists()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    language_model("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    short(last)
    with pytest.raises(CheckpointError, match=rf"{first.name} is not there.*{last.name} is cut short"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")


def test_a_single_file_is_looked_at_as_closely(tmp_path: Path) -> None:
    language_model("Llama").save_pretrained(tmp_path)
    short(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short: .* the first is model.norm.weight"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    language_model("Llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[LAYER]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not hold {LAYER} of LlamaForCausalLM"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")


def test_other_formats_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        split_checkpoint(tmp_path / "nowhere", [1, 3], tmp_path / "parts")
    model = language_model("Llama")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    (tmp_path / "pytest_out").write_text("")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert it once"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pytest_out is a file; give a directory"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "pytest_out")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        split_checkpoint(tmp_path, [1, 3], f"{tmp_path}/../{tmp_path.name}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_disk_that_runs_full(tmp_path: Path) -> None:
    language_model("Llama").save_pretrained(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "trunk.safetensors.unfinished").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"no space left for .*trunk.*, which will have \d+ bytes: make room"):
        split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    (tmp_path / "parts" / "trunk.safetensors.unfinished").unlink()
    bottom, *_ = split_checkpoint(tmp_path, [1, 3], tmp_path / "parts")
    assert bottom.resumed_bytes == bottom.num_bytes


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path) -> None:
    configuration("Llama", layers=3, intermediate_size=2**31).save_pretrained(tmp_path)
    language_model("Llama", layers=3).save_pretrained(tmp_path / "small")
    tensors = dict(read_header(tmp_path / "small" / "model.safetensors").tensors)
    for name, entry in tensors.items():
        if ".mlp." in name:
            shape = tuple(2**31 if size == 48 else size for size in entry.shape)
            tensors[name] = TensorEntry("F32", shape, 0, 2**38)
    header = make_header(tensors)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header.text)
        try:
            file.truncate(header.num_bytes)  # a file of 2 TB without content
        except OSError:
            pytest.skip("no sparse files here")
    with pytest.raises(CheckpointError, match=r"they need 23592\d\d MB more, and \d+ MB are free; make room"):
        split_checkpoint(tmp_path, [1, 2], tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
