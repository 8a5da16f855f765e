"""Exports of checkpoints: other libraries read them, they appear at one moment, and what is not theirs stays."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint import Checkpointer, export_safetensors, load_safetensors

safetensors = pytest.importorskip("safetensors.torch")


def tied_model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), *[nn.Linear(6, 6) for _ in range(9)])
    net.append(nn.Linear(4, 6, bias=False))
    net[-1].weight = net[0].weight
    return net


@pytest.fixture
def run(tmp_path: Path) -> Path:
    net = tied_model()
    optimizer = torch.optim.AdamW(net.parameters())
    with Checkpointer(tmp_path / "run", net, optimizer=optimizer, config={"kind": "tiny", "dtype": "float32"}) as saver:
        saver.save(7)
    return tmp_path / "run"


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in safetensors.load_file(file).items()
    }


def test_tensors_have_the_names_of_the_model(run: Path, tmp_path: Path) -> None:
    report = export_safetensors(run, tmp_path / "out")
    assert report.files == ("model.safetensors",)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kind"] == "tiny"
    found, wanted = loaded(report.directory), tied_model().state_dict()
    assert {*found} == {*wanted} - {"11.weight"}  # a tie, once
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    other = tied_model()
    with torch.no_grad():
        other[0].weight.zero_()
    assert load_safetensors(tmp_path / "out", other).unused == ()
    assert torch.equal(other[11].weight, wanted["0.weight"])


def test_aliases_and_another_type(run: Path, tmp_path: Path) -> None:
    export_safetensors(run / "step-00000007", tmp_path / "out", aliases=True, dtype="bfloat16")
    found, wanted = loaded(tmp_path / "out"), tied_model().state_dict()
    assert {*found} == {*wanted}
    assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in found.items())
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert found["11.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_of_a_size_and_their_index(run: Path, tmp_path: Path) -> None:
    report = export_safetensors(run, tmp_path / "out", max_shard_size="0.3KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    assert (
        index["metadata"]["total_size"]
        == report.num_bytes
        == sum(t.numel() * t.element_size() for t in loaded(report.directory).values())
    )
    assert report.files[0] == f"model-00001-of-{len(report.files):05d}.safetensors"
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    for file in report.files:
        tensors = safetensors.load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 300


def test_an_earlier_export_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export_safetensors(run, out, max_shard_size=400)
    (tmp_path / "out.unfinished").mkdir()  # of one that was killed
    (tmp_path / "out.unfinished" / "model.safetensors").write_bytes(b"half")
    second = export_safetensors(run, out)
    assert len(first.files) > 1
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "export.json"}
    assert second.num_bytes == first.num_bytes
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"1 entry that no export wrote \(notes.txt\)"):
        export_safetensors(run, out)
    (tmp_path / "model").mkdir()
    safetensors.save_file({"w": torch.ones(1)}, tmp_path / "model" / "model.safetensors")  # somebody's weights
    with pytest.raises(CheckpointError, match="model.safetensors"):
        export_safetensors(run, tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a file"):
        export_safetensors(run, out / "config.json")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "model"}


@contextmanager
def files_of_at_most(count: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    export_safetensors(run, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with files_of_at_most(1500), pytest.raises(CheckpointError, match="cannot be written: File too large"):
        export_safetensors(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_torn_and_foreign_ones_are_refused(run: Path, tmp_path: Path) -> None:
    file = next((run / "step-00000007").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        export_safetensors(run / "step-00000007", tmp_path / "out", verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="none is whole: step-00000007: .* bytes instead of"):
        export_safetensors(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        export_safetensors(tmp_path / "nothing", tmp_path / "out")
    for wrong in ({"max_shard_size": "many"}, {"max_shard_size": 0}, {"dtype": "int8"}, {"dtype": "half-precision"}):
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong.values()))!r} is no"):
            export_safetensors(run, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
