"""What a user gets wrong with checkpoints: each says what it is and what to do, and changes nothing."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint import (
    Checkpointer,
    TensorFiles,
    export_safetensors,
    inspect_checkpoint,
    load_safetensors,
    save_safetensors,
    verify_checkpoint,
)
from torchdistpackage.checkpoint.companions import Companions
from torchdistpackage.checkpoint.parts import parts_of_range
from torchdistpackage.checkpoint.schedulers import state_for


@pytest.fixture
def layer():
    return nn.Linear(2, 3)


@pytest.fixture
def saved(tmp_path, layer):
    """A checkpoint of a layer and its SGD optimizer."""
    Checkpointer(tmp_path, layer, optimizer=torch.optim.SGD(layer.parameters(), lr=0.5)).save(1)
    return tmp_path / "step-00000001"


def test_a_parameter_in_two_optimizers(tmp_path, layer):
    both = [torch.optim.SGD(layer.parameters()), torch.optim.Adam([layer.bias])]
    with pytest.raises(CheckpointError, match="bias is in two optimizers, SGD and Adam"):
        Checkpointer(tmp_path, layer, optimizer=both)


def test_another_optimizer(saved, layer):
    with pytest.raises(CheckpointError, match=r"weight was trained by SGD .*, and is in Adam here; make the same"):
        Checkpointer(saved.parent, layer, optimizer=torch.optim.Adam(layer.parameters())).load()


def test_an_optimizer_where_there_was_none(tmp_path, layer):
    Checkpointer(tmp_path, layer).save(1)
    with pytest.raises(CheckpointError, match=r"was saved without an optimizer; load the model only"):
        Checkpointer(tmp_path, layer, optimizer=torch.optim.SGD(layer.parameters())).load()


def test_a_parameter_that_no_optimizer_had(tmp_path, layer):
    Checkpointer(tmp_path, layer, optimizer=torch.optim.SGD([layer.weight], lr=0.5)).save(1)
    optimizer = torch.optim.SGD([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.1)
    checkpointer = Checkpointer(tmp_path, layer, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="bias is in SGD here, but was in no optimizer"):
        checkpointer.load()
    checkpointer.load(strict=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_learning_rates_that_are_tensors_take_and_give_numbers(saved, layer):
    held = torch.optim.SGD(layer.parameters(), lr=torch.tensor(0.1))
    value = held.param_groups[0]["lr"]
    Checkpointer(saved.parent, layer, optimizer=held).load()
    assert value.item() == 0.5  # the very tensor, which a compiled step may hold
    Checkpointer(saved.parent, layer, optimizer=held).save(2)
    plain = torch.optim.SGD(layer.parameters(), lr=0.1)
    Checkpointer(saved.parent, layer, optimizer=plain).load(2)
    assert type(plain.param_groups[0]["lr"]) is float


def test_a_place_in_the_data_that_was_not_saved(saved, layer):
    class Loader:
        def state_dict(self):
            return {"row": 3}

        def load_state_dict(self, state):
            raise AssertionError("nothing is changed")

    with pytest.raises(CheckpointError, match="was saved without data=; load it without"):
        Checkpointer(saved.parent, layer, data=Loader()).load()
    Checkpointer(saved.parent, layer, data=Loader()).save(2)
    manifest = saved.parent / "step-00000002" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["files"]["rank-00001.pt"] = {"bytes": 1, "sha256": "of another place"}
    manifest.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="2 ranks had each its own place in the data.*ResumableSampler"):
        Companions(None, None, {}, Loader()).look_for_own(manifest.parent, 0, same=False)


def test_an_error_in_the_loop_is_not_hidden_by_a_failed_save(tmp_path, layer, caplog):
    def loop():
        with Checkpointer(tmp_path, layer, asynchronous=True) as checkpointer:
            (tmp_path / "step-00000001.unfinished").write_text("in the way")
            checkpointer.save(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert "the last checkpoint has failed, too" in caplog.text


def test_folders_that_are_something_else(tmp_path, saved, layer):
    assert verify_checkpoint(saved / "shared.pt") == "it is a file; a checkpoint is a folder"
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be inspected: manifest\.json cannot be read"):
        inspect_checkpoint(saved)
    with pytest.raises(CheckpointError, match="neither a directory nor a file here"):
        load_safetensors(tmp_path / "nowhere", layer)


def test_tensor_files_of_something_else(saved):
    with pytest.raises(CheckpointError, match=r"step-00000001 has no model\.nonsense; it has \d+ tensors, see \.keys"):
        TensorFiles(saved).read_whole("model.nonsense")
    (saved / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="it holds a dict, not the Metadata of a checkpoint"):
        TensorFiles(saved)


def test_safetensors_that_cannot_be(tmp_path, saved, layer):
    with pytest.raises(CheckpointError, match="no tensors, so there is nothing to save"):
        save_safetensors(nn.ReLU(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="'int8' is no floating type; write 'float32'"):
        export_safetensors(saved, tmp_path / "out", dtype="int8")
    save_safetensors(layer, tmp_path / "out", max_shard_size=24)
    before = layer.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"nothing was loaded: bias is \(3,\) in the files and \(4,\)"):
        load_safetensors(tmp_path / "out", nn.Linear(2, 4), strict=False)
    index = Path(tmp_path, "out", "model.safetensors.index.json")
    index.write_text(index.read_text().replace("00002-of", "00001-of"))
    with pytest.raises(CheckpointError, match=r"the index says that weight is in model-00001.*does not have it"):
        load_safetensors(tmp_path / "out", layer)
    assert torch.equal(layer.weight, before)


def test_values_that_are_not_laid_out_as_the_parameter():
    with pytest.raises(CheckpointError, match="w: 4 values, contiguous False, for elements 2 to 6"):
        parts_of_range("w", torch.zeros(2, 3), 2, 6, torch.arange(8)[::2])


def test_schedulers_in_schedulers_get_the_groups_that_are_here():
    def sequential(rates):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2), torch.optim.lr_scheduler.StepLR(optimizer, 3)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])

    there, here = sequential([0.1]).state_dict(), sequential([0.2, 0.3])
    fitted = state_for(here, [there, sequential([0.4]).state_dict()], 0, same=False)
    assert [one["base_lrs"] for one in fitted["_schedulers"]] == [[0.2, 0.3], [0.2, 0.3]]
    assert fitted["_last_lr"] == [group["lr"] for group in here.optimizer.param_groups]
