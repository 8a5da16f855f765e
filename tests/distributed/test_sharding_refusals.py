"""What plans, sharded optimizers, ties and scalers refuse, and what they say then."""

import pytest
import torch
from distributed_harness import run_distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage import (
    Bf16ZeroOptimizer,
    NaiveDDP,
    PipelineError,
    PipelineGradScaler,
    ScheduleError,
    SplitError,
    setup_distributed,
    tie_parameters,
    tpc,
)
from torchdistpackage.parallel.step_plan import leanest_plan, placement_of, resolve_plan
from torchdistpackage.schedule import build


def test_a_plan_without_backwards_does_not_train():
    plan = build("1f1b", 1, 2, forward_only=True)
    with pytest.raises(ScheduleError, match="has no backward; pass forward_only=True, or a training plan"):
        resolve_plan(plan, 1, 2, forward_only=False, chunks=None)
    assert resolve_plan(plan, 1, 2, forward_only=True, chunks=None).num_microbatches == 2


def test_a_file_that_is_not_there():
    with pytest.raises(ScheduleError, match=r"cannot read the schedule 'nowhere.csv': No such file"):
        placement_of("nowhere.csv", 2)


def test_no_plan_before_costs_are_known():
    with pytest.raises(ScheduleError, match=r"no schedule without a split backward runs 3 stage\(s\) a rank in v"):
        leanest_plan("v", 2, 4, 3)


def test_a_state_is_sharded_once():
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(PipelineError, match="this Bf16ZeroOptimizer shards its state already"):
        Bf16ZeroOptimizer(optimizer)
    with pytest.raises(PipelineError, match="to must be 'first' or 'all', got 'last'"):
        optimizer.state_dict(to="last")


def test_one_backward_gives_one_gradient_to_reduce():
    layer = nn.Linear(2, 2)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), stage=1, overlap_comm=True)
    x = torch.ones(1, 2, requires_grad=True)
    again = layer(checkpoint(layer, x, use_reentrant=True))
    with pytest.raises(PipelineError, match="got two gradients in one backward"):
        again.sum().backward()
    optimizer.zero_grad()


def never_scaled(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", world)])
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(PipelineError, match="no rank of the pipeline has scaled its loss"):
        PipelineGradScaler("cpu").unscale_(optimizer)


def test_a_loss_must_be_scaled_somewhere():
    run_distributed(never_scaled, 2)


def unlike_ties(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", world)])
    weight = nn.Parameter(torch.ones(2, 2 + rank))
    with pytest.raises(SplitError, match=r"ranks tie different parameters at the same time: \['first', 'second'\]"):
        tie_parameters(("first", "second")[rank], weight)
    with pytest.raises(SplitError, match=r"'weight' must be on at least one rank, with one shape and dtype"):
        tie_parameters("weight", weight)
    with pytest.raises(SplitError, match="must be on at least one rank"):
        tie_parameters("weight", None)


def test_ties_are_alike():
    run_distributed(unlike_ties, 2)


def scaled_between_backwards(rank, world):
    setup_distributed(backend="gloo")
    model = NaiveDDP(nn.Linear(2, 1, bias=False), reduce_op="sum")
    x = torch.ones(1, 2)
    model(x).sum().backward()
    model.reduce_gradients()
    model(x).sum().backward()  # adds to what is a sum over the replicas already
    model.module.weight.grad.mul_(0.5)
    with pytest.raises(PipelineError, match="the gradient of weight is a sum over the replicas.*was changed in place"):
        model(x).sum().backward()


def test_a_sum_is_not_scaled_before_it_is_complete():
    run_distributed(scaled_between_backwards, 2)
