"""Ranks that call with different arguments: found out with the first message, and both calls are named."""

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import loss_step, own_inputs, start
from fault_pipeline import outcome
from torch import nn

from torchdistpackage import forward_backward

USUAL = {"num_microbatches": 4}
OTHERS = [
    {"num_microbatches": 3},
    {"num_microbatches": 8},
    {"schedule": "gpipe"},
    {"schedule": "zb-h1"},
    {"schedule": "auto"},
    {"forward_only": True},
    {"dtype": torch.bfloat16},
    {"loss_reduction": "sum"},
    {"broadcast_loss": True},
    {"record_timeline": True},
]


def disagreeing(rank, world, bad, same_host):
    start(world, same_host=same_host, config=[("pipe", world)])
    stage = nn.Linear(6, 6).double()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 6).double()

    def step(**options):
        return forward_backward(None, loss_step(stage), None, own_inputs(x, y), **{**USUAL, **options})

    found = []
    for other in OTHERS:
        step()
        found.append(outcome(lambda: step(**(other if rank == bad else {}))))  # noqa: B023, called at once
    step()
    return found


@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_every_rank_says_who_disagrees_and_the_next_step_is_right(bad, same_host):
    for other, *found in zip(OTHERS, *run_distributed(disagreeing, 3, bad, same_host), strict=True):
        for kind, text, _, _, seconds in found:
            assert kind == "PipelineError", (other, found)
            assert "ranks disagree about the step" in text, (other, found)
            assert f"rank {bad} of the pipeline runs" in text, (other, found)
            assert seconds < 5
