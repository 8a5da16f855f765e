"""What is torn or foreign is named, and never loaded."""

import json
import pickle

import pytest
import torch
from torch import nn

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint import (
    Checkpointer,
    TensorFiles,
    inspect_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    verify_checkpoint,
)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("tear", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda path: rewrite(path / "manifest.json", format="other"), "not of a checkpoint of this library"),
        (lambda path: rewrite(path / "manifest.json", version=99), "has version 99 of the format"),
        (lambda path: rewrite(path / "manifest.json", files=3), "manifest.json is damaged"),
        (lambda path: (path / "shared.pt").unlink(), "shared.pt is missing"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"short"), "__0_0.distcp has 5 bytes instead of"),
        (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp has another SHA-256"),
        (lambda path: flip(path / ".metadata"), ".metadata has another SHA-256"),
    ],
)
def test_a_torn_one_is_named_and_skipped(tmp_path, tear, reason):
    model = nn.Linear(20, 20)
    checkpointer = Checkpointer(tmp_path, model)
    checkpointer.save(1)
    checkpointer.save(2)
    tear(tmp_path / "step-00000002")
    assert reason in verify_checkpoint(tmp_path / "step-00000002")
    assert newest_checkpoint(tmp_path, hashes=True).name == "step-00000001"
    loaded = checkpointer.load()
    assert loaded.step == 1
    assert [name for name, why in loaded.skipped if reason in why] == ["step-00000002"]
    with pytest.raises(CheckpointError, match=reason):
        checkpointer.load(2)


def plain_dcp(folder):
    (folder / ".metadata").touch()


def hugging_face(folder):
    (folder / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (plain_dcp, "torch.distributed.checkpoint that this library has not written"),
        (hugging_face, "a directory of safetensors"),
        (lambda folder: (folder / "step-00000001").mkdir(), "the folder of a run"),
        (lambda folder: None, "not finished or is no checkpoint"),
        (lambda folder: folder.rmdir(), "no such folder"),
    ],
)
def test_a_foreign_one_is_named(tmp_path, make, reason):
    folder = tmp_path / "other"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError, match=reason):
        Checkpointer(tmp_path / "run", nn.Linear(2, 2)).load(folder)
    with pytest.raises(CheckpointError, match=reason):
        inspect_checkpoint(folder)
    assert reason in verify_checkpoint(folder)


def test_a_step_that_is_not_there(tmp_path):
    checkpointer = Checkpointer(tmp_path, nn.Linear(2, 2))
    checkpointer.save(7)
    with pytest.raises(CheckpointError, match="no such folder.* has step-00000007"):
        checkpointer.load(8)


def test_sizes_only(tmp_path):
    checkpointer = Checkpointer(tmp_path, nn.Linear(20, 20), optimizer=None)
    checkpointer.save(1)
    flip(tmp_path / "step-00000001" / "__0_0.distcp")
    assert list_checkpoints(tmp_path)[0].fault is None
    assert "SHA-256" in list_checkpoints(tmp_path, hashes=True)[0].fault
    assert checkpointer.load() is None


def test_metadata_runs_nothing(tmp_path):
    Checkpointer(tmp_path, nn.Linear(2, 2)).save(1)
    (tmp_path / "step-00000001" / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"refers to builtins.print"):
        TensorFiles(tmp_path / "step-00000001")


def test_what_is_in_one(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    Checkpointer(tmp_path, model, optimizer=optimizer).save(120)
    found = inspect_checkpoint(tmp_path / "step-00000120")
    assert (found.step, found.layout, found.parameters) == (120, "1 process", 16)
    assert found.tensors["optimizer.weight.momentum_buffer"].shape == (4, 3)
    assert found.nbytes == sum(file.nbytes for file in found.files.values()) > 16 * 8
