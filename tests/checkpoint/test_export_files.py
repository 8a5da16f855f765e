"""Our safetensors files are byte for byte those of the safetensors library, whatever is in them and in what order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint.safetensors_writing import (
    ShardWriter,
    TensorLayout,
    natural_order,
    number_of_bytes,
    plan_shards,
)

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {
    "b.10": torch.arange(6).view(2, 3),
    "b.9": torch.tensor(2.5, dtype=torch.bfloat16),
    "a": torch.zeros(0, 3),
    "é": torch.tensor([True, False, True]),
    "f8": torch.ones(5).to(torch.float8_e4m3fn),
    "t": torch.randn(4, 3).T,
    "last": torch.zeros(0, dtype=torch.bool),
}


def layouts() -> dict[str, TensorLayout]:
    return {name: TensorLayout(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    with ShardWriter(tmp_path / "ours", layouts()) as writer:
        for name, tensor in reversed(TENSORS.items()):
            writer.write(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_nobody_wrote_is_missed(tmp_path: Path) -> None:
    half = ShardWriter(tmp_path / "f", layouts())
    for name in TENSORS.keys() - {"t"}:
        half.write(name, TENSORS[name])
    with pytest.raises(CheckpointError, match="was to hold t, which nobody wrote"):
        half.finish()
    half.close()
    with ShardWriter(tmp_path / "f", {"t": TensorLayout(torch.float32, (2,))}) as writer:
        with pytest.raises(CheckpointError, match=r"t is \(3,\), and was announced as \(2,\)"):
            writer.write("t", torch.ones(3))
        writer.write("t", torch.ones(2))
    with pytest.raises(CheckpointError, match="q is torch.quint8, which safetensors files cannot hold"):
        ShardWriter(tmp_path / "f", {"q": TensorLayout(torch.quint8, (2,))})


def test_shards_keep_the_order_and_the_size() -> None:
    names = [f"h.{number}" for number in range(12)]
    sizes = {
        name: TensorLayout(torch.uint8, (number % 5,)) for number, name in enumerate(sorted(names, key=natural_order))
    }
    shards = plan_shards(sizes, 6)
    assert [name for shard in shards for name in shard] == names
    assert all(sum(sizes[name].num_bytes for name in shard) <= 6 for shard in shards)
    assert number_of_bytes(" 5 gb ") == 5 * 10**9
    for wrong in ("5 G", "-1", "", "GB", 0, "0.1B"):
        with pytest.raises(CheckpointError, match="is no size of a file"):
            number_of_bytes(wrong)
