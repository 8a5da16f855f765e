"""A run that is killed while it saves: the others get an error, and the newest whole checkpoint is the one to load."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from distributed_harness import run_distributed
from torch import nn

from torchdistpackage import CheckpointError, setup_distributed
from torchdistpackage.checkpoint import Checkpointer, list_checkpoints, newest_checkpoint


def big_model():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(6)])


def killed_while_writing(rank, world, folder, victim):
    setup_distributed(backend="gloo")
    model = big_model()
    checkpointer = Checkpointer(folder, model, asynchronous=True, timeout=60)
    checkpointer.save(1, extra="whole")
    checkpointer.wait()
    checkpointer.save(2, extra="torn")
    if rank == victim:
        while not list(Path(folder).glob("step-00000002.unfinished/*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot reach each other"):
        checkpointer.wait()
    return time.monotonic() - begun


def goes_on(rank, world, folder):
    setup_distributed(backend="gloo")
    model = big_model()
    with torch.no_grad():
        model[0].weight.zero_()
    with Checkpointer(folder, model) as checkpointer:
        loaded = checkpointer.load()
        assert torch.equal(model[0].weight, big_model()[0].weight)
        checkpointer.save(2)
    return loaded.step, loaded.extra, loaded.skipped


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_while_a_thread_writes(tmp_path, victim):
    waited = run_distributed(killed_while_writing, 3, str(tmp_path), victim, timeout=60, may_die={victim})
    assert max(seconds for rank, seconds in enumerate(waited) if rank != victim) < 15
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    assert "not finished" in list_checkpoints(tmp_path)[0].fault
    step, extra, skipped = run_distributed(goes_on, 2, str(tmp_path), timeout=60)[0]
    assert (step, extra, skipped[0][0]) == (1, "whole", "step-00000002.unfinished")
    assert [info.step for info in list_checkpoints(tmp_path)] == [2, 1]
