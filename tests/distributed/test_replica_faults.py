"""A failure in one pipeline reaches its data-parallel replicas, which wait in reductions and not for its messages."""

import time

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import loss_step, make_layers, own_inputs, start
from fault_pipeline import OUTPUT_FAULTS, outcome
from torch import nn

from torchdistpackage import DDP, clip_grad_norm_, forward_backward, partition_uniform, tpc


class FailsAt(nn.Module):
    """Passes its input on; at one call, or in one backward, it fails."""

    def __init__(self, fault, call):
        super().__init__()
        self.fault, self.call, self.calls = fault, call, 0

    def forward(self, x):
        self.calls += 1
        return OUTPUT_FAULTS[self.fault](x) if self.calls == self.call and self.fault else x


def replicated(rank, world, pipe, fault, call, bad, schedule="1f1b", m=4, same_host=True):
    start(pipe, same_host=same_host)
    layers = make_layers()
    trap = FailsAt(fault if rank == bad else None, call)
    layers = nn.Sequential(*partition_uniform(list(layers)))
    model = DDP(nn.Sequential(layers, trap))
    x, y = torch.randn(12, 6).double(), torch.randn(12, 6).double()

    def step():
        inputs = own_inputs(x, y)
        forward_backward(None, loss_step(model), None, inputs, m, schedule=schedule)
        clip_grad_norm_(model.parameters(), 1.0)

    found = outcome(step)
    again = None
    if fault == "forward" and m > 1:
        layers.zero_grad()
        trap.call = 0
        again = outcome(step)
    else:
        again = outcome(step)
    if fault == "backward":  # all processes still run
        start(pipe)
        if rank == bad:
            assert "wrap its module anew" in outcome(step)[1]
        else:
            assert outcome(step)[0] == "PipelineError"
        model, trap.call = DDP(nn.Sequential(layers, trap)), 0
        layers.zero_grad()
        step()
    return found, again, [p.grad for p in layers.parameters()]


def check(everyone, bad, kind):
    for rank, (found, _, _) in enumerate(everyone):
        assert found[-1] < 5, (rank, found)
        assert found[0] == (kind if rank == bad else "PipelineError"), (rank, found)
        if rank != bad:
            assert found[2]["global_rank"] == bad, (rank, found)


def assert_replicas_agree(everyone):
    gradients = [g for _, _, g in everyone]
    for rank in range(2):
        assert all(map(torch.equal, gradients[rank], gradients[rank + 2]))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("bad", range(4))
def test_an_error_before_the_reduction_leaves_everything_whole(schedule, bad):
    everyone = run_distributed(replicated, 4, 2, "forward", 2, bad, schedule)
    check(everyone, bad, "Planted")
    assert all(again[0] == "ok" for _, again, _ in everyone), everyone
    assert_replicas_agree(everyone)


@pytest.mark.parametrize("bad", [0, 3])
def test_an_error_in_the_last_backward_ends_the_reduction_of_the_others(bad):
    everyone = run_distributed(replicated, 4, 2, "backward", 4, bad)
    check(everyone, bad, "Planted")
    # Who was in the reduction has closed its groups; whoever goes on is told so.
    assert all(again[0] in ("NotWhole", "PipelineError") for _, again, _ in everyone), [e[1] for e in everyone]
    assert all("start all ranks again" in again[1] for _, again, _ in everyone), everyone
    assert all(again[-1] < 5 for _, again, _ in everyone)
    assert_replicas_agree(everyone)


@pytest.mark.parametrize("bad", [1, 2])
def test_an_error_in_evaluation_reaches_replicas_at_their_next_step(bad):
    everyone = run_distributed(evaluated, 4, bad)
    for rank, (kind, _, place, _, seconds) in enumerate(everyone):
        assert kind == ("Planted" if rank == bad else "PipelineError"), everyone
        assert rank == bad or place["global_rank"] == bad
        assert seconds < 5


def evaluated(rank, world, bad):
    start(2)
    layers = nn.Sequential(*partition_uniform(list(make_layers())))
    trap = FailsAt("forward" if rank == bad else None, 30)
    x = torch.randn(12, 6).double() if tpc.is_first_in_pipeline_group() else None

    def loop():
        until = time.monotonic() + 6
        while time.monotonic() < until:
            forward_backward(None, nn.Sequential(layers, trap), None, x, 4, forward_only=True)
            time.sleep(0.01)

    return outcome(loop)


def test_with_one_microbatch_the_reduction_of_the_others_is_ended():
    """There DDP works as it is, without an agreement before."""
    everyone = run_distributed(replicated, 4, 2, "forward", 1, 3, "1f1b", 1)
    check(everyone, 3, "Planted")
    assert all("earlier failure has broken" in again[1] for _, again, _ in everyone), [e[1] for e in everyone]


@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("call", [2, 4])
def test_a_killed_rank_is_named_by_replicas(pipe, call, same_host):
    bad = 1
    everyone = run_distributed(replicated, 2 * pipe, pipe, "killed", call, bad, "1f1b", 4, same_host, may_die=[bad])
    for rank, result in enumerate(everyone):
        if rank != bad:
            found, again, _ = result
            assert found[0] == "PipelineError", found
            assert found[2]["global_rank"] == bad, found
            assert found[-1] < 5, found
            assert "start all ranks again" in again[1], again


def tensor_parallel(rank, world, bad):
    start(2, config=[("pipe", 2), ("tensor", 2)])
    stage, trap = nn.Linear(6, 6).double(), FailsAt("forward" if rank == bad else None, 2)

    def fwd_fn(arguments):
        x, *targets = arguments if isinstance(arguments, list) else [arguments]
        out = trap(stage(x))
        partial = out.detach().clone()
        dist.all_reduce(partial, group=tpc.get_group("tensor"))  # the other rank of the stage never comes
        return nn.functional.mse_loss(out, targets[0]) if targets else out

    x, y = torch.randn(12, 6).double(), torch.randn(12, 6).double()
    found = outcome(lambda: forward_backward(None, fwd_fn, None, own_inputs(x, y), 4))
    return found, outcome(lambda: forward_backward(None, fwd_fn, None, own_inputs(x, y), 4))


@pytest.mark.parametrize("bad", [0, 3])
def test_a_collective_in_a_stage_ends_when_its_other_rank_has_failed(bad):
    everyone = run_distributed(tensor_parallel, 4, bad)
    check([(found, again, None) for found, again in everyone], bad, "Planted")
    assert all("start all ranks again" in again[1] for _, again in everyone), everyone
