"""A rank that is killed or leaves: the others raise and say so, with the group's time-out left at its default."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from torch import nn

from torchdistpackage import PipelineError, forward_backward, setup_distributed, tpc


def step_with_a_lost_rank(rank, world, bad, how, same_host):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", world)], same_host=same_host)
    layer, calls = nn.Linear(4, 4), []
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def fwd_fn(x):
        calls.append(1)
        if rank == bad and len(calls) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("planted")
        return layer(x).mean() if last else layer(x)

    dist.barrier()
    began = time.monotonic()
    try:
        forward_backward(fwd_fn=fwd_fn, inputs=torch.randn(16, 4) if first else None, num_microbatches=8)
    except (PipelineError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None


@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_killed_rank_is_noticed_by_all_others(bad, same_host):
    results = run_distributed(step_with_a_lost_rank, 3, bad, "killed", same_host, may_die=[bad])
    for rank, result in enumerate(results):
        if rank != bad:
            name, text, seconds = result
            assert name == "PipelineError"
            assert f"rank {bad} of the pipeline" in text
            assert seconds < 8


@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_rank_that_raises_is_named_by_all_others(bad, same_host):
    results = run_distributed(step_with_a_lost_rank, 3, bad, "raised", same_host)
    for rank, (name, text, seconds) in enumerate(results):
        assert name == ("ValueError" if rank == bad else "PipelineError")
        assert "planted" in text
        assert seconds < 5
        if rank != bad:
            assert f"rank {bad} of the pipeline (global rank {bad}) failed at {bad}F2" in text
