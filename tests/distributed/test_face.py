"""The public API over gloo with real processes: what users call, against the plain loop on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, loss_step, make_layers, mse, own_inputs, start
from torch import nn

from torchdistpackage import (
    PipelineError,
    ScheduleError,
    TopologyError,
    clip_grad_norm_,
    forward_backward,
    forward_eval,
    partition_uniform,
    setup_distributed,
    tie_parameters,
    tpc,
)
from torchdistpackage.schedule import describe, names


def train_everywhere(rank, world, pipe):
    start(pipe)
    reference = make_layers()
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=pipe, stage=tpc.get_pp_rank()))
    for name in (name for name in names() if describe(name).chunks == 1):
        for rows, m in ((8, 4), (10, 4), (3, 4), (32, 2)):
            x, y = torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
            reference.zero_grad()
            stage.zero_grad()
            whole = mse(reference(x), y)
            whole.backward()
            fwd_fn = loss_step(stage)
            loss = forward_backward(
                fwd_fn=fwd_fn, inputs=own_inputs(x, y), num_microbatches=m, schedule=name, broadcast_loss=True
            )
            assert torch.allclose(loss, whole.detach())
            assert close(stage.parameters(), part.parameters())
            out = forward_backward(
                None, stage, None, x if tpc.is_first_in_pipeline_group() else [], num_microbatches=m, forward_only=True
            )
            if tpc.is_last_in_pipeline_group():
                assert torch.allclose(out, reference(x))
                assert not out.requires_grad
            else:
                assert out is None


@pytest.mark.parametrize("pipe", [1, 2, 3, 4])
def test_training_and_evaluation_of_any_batch(pipe):
    run_distributed(train_everywhere, pipe, pipe)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle[1](self.middle[0](self.embedding(ids))))


def tied_weights(rank, world, pipe, by_hand):
    start(pipe)
    model = Tied().double()
    reference = copy.deepcopy(model)
    if by_hand:
        cut = copy.deepcopy([model.embedding, *model.middle, nn.Linear(4, 7, bias=False).double()])
        stage = nn.Sequential(*partition_uniform(cut))
        ends = {0: cut[0].weight, pipe - 1: cut[-1].weight}
        tie_parameters("embedding", ends.get(tpc.get_pp_rank()))
    else:
        stage = nn.Sequential(*partition_uniform([model.embedding, *model.middle, model.head]))
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.1)
    other = torch.optim.Adam(reference.parameters(), lr=0.1)
    ce = nn.functional.cross_entropy
    last = tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        return ce(stage(a[0]), a[1]) if last else stage(a)

    for _ in range(3):
        ids, targets = torch.randint(0, 7, (8,)), torch.randint(0, 7, (8,))
        optimizer.zero_grad()
        other.zero_grad()
        for _ in range(2):  # gradients accumulate over two calls
            loss = forward_backward(None, fwd_fn, None, own_inputs(ids, targets), num_microbatches=3)
            whole = ce(reference(ids), targets)
            whole.backward()
        assert loss is None or torch.allclose(loss, whole.detach())
        norm = clip_grad_norm_(stage.parameters(), 0.5)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
        optimizer.step()
        other.step()
    weights = {0: reference.embedding.weight, pipe - 1: reference.embedding.weight}
    if tpc.get_pp_rank() in weights:
        mine = next(p for p in stage.parameters() if p.shape == (7, 4))
        assert torch.allclose(mine, weights[tpc.get_pp_rank()])


@pytest.mark.parametrize("pipe", [2, 3])
@pytest.mark.parametrize("by_hand", [False, True])
def test_tied_weights_are_one_parameter(pipe, by_hand):
    run_distributed(tied_weights, pipe, pipe, by_hand)


def tensor_group_transfer(rank, world):
    start(pipe=2, config=[("pipe", 2), ("tensor", 2)])
    reference = make_layers(2)
    stage = copy.deepcopy(reference[tpc.get_pp_rank()])
    for rows in (8, 5):
        x, y = torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
        stage.zero_grad()
        reference.zero_grad()
        for _ in range(2):
            forward_backward(
                fwd_fn=loss_step(stage), inputs=own_inputs(x, y), num_microbatches=3, scatter_gather_tensors=True
            )
            mse(reference(x), y).backward()
        assert close(stage.parameters(), reference[tpc.get_pp_rank()].parameters())


def test_scatter_gather_over_the_tensor_group_is_exact():
    run_distributed(tensor_group_transfer, 4)


def wrong_use(rank, world):
    setup_distributed(backend="gloo")
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    with pytest.raises(TopologyError, match="setup_process_groups"):
        forward_backward(fwd_fn=layer, inputs=x)
    tpc.setup_process_groups([("pipe", world)])
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        return layer(a[0] if isinstance(a, list) else a).mean() if last else layer(a)

    own = x if first else None
    with pytest.raises(ScheduleError, match="at least 1, got 0"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=0)
    with pytest.raises(ScheduleError, match="known schedules: 1f1b, .*gpipe"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, schedule="zigzag")
    with pytest.raises(PipelineError, match="loss_reduction must be"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, loss_reduction="median")
    with pytest.raises(PipelineError, match="fwd_fn is missing"):
        forward_backward(inputs=own)
    for wrong in (None, [], [3]):
        with pytest.raises(PipelineError, match="the first stage got no input"):
            forward_backward(fwd_fn=fwd_fn, inputs=wrong if first else None, num_microbatches=2)
    with pytest.raises(PipelineError, match="4 rows on the first stage"):
        forward_backward(fwd_fn=fwd_fn, inputs=x if first else torch.randn(3, 4) if last else None)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=2 if first else 4)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=4, schedule="gpipe" if last else "1f1b")
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=4, forward_only=not last)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, loss_reduction="sum" if last else "mean")
    with pytest.raises((PipelineError, ScheduleError), match="zigzag"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, schedule="zigzag" if last else "1f1b")
    layer.zero_grad()
    forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=2)  # after all of that the next step works
    assert layer.weight.grad is not None


@pytest.mark.parametrize("world", [2, 3])
def test_wrong_use_is_one_clear_error_on_every_rank_and_loses_nothing(world):
    run_distributed(wrong_use, world, timeout=40)


WRONG_ARGUMENTS = [
    ({"forward_only": "zb-h1"}, "forward_only must be True or False, got .* 'zb-h1'; .*schedule='zb-h1'"),
    ({"forward_only": 1}, 'got a value of type int, 1; .* by keyword, schedule="zb-h1"'),
    ({"schedule": "auto", "memory_limit": "2GB"}, "number of bytes above 0, such as memory_limit=2e9 .*got '2GB'"),
    ({"schedule": "auto-v", "memory_limit": -5}, "memory_limit must be a number of bytes above 0, .*got -5"),
    (
        {"fwd_fn": torch.optim.SGD([torch.ones(1)])},
        r"fwd_fn must be callable, got .*SGD; .*\(optimizer, fwd_fn, bwd_fn",
    ),
    ({"fwd_fn": torch.ones(8, 4)}, r"fwd_fn must be callable, got a value of type Tensor, float32 \(8, 4\);"),
    ({"fwd_fn": [None]}, r"fwd_fn\[0\] must be callable, got .* None;"),
    ({"bwd_fn": torch.ones(8, 4)}, r"bwd_fn must be a function .*, got a value of type Tensor, float32 \(8, 4\);"),
    ({"bwd_fn": [torch.ones(8, 4)]}, r"bwd_fn\[0\] must be a function .*, inputs, \.\.\.\)"),
    ({"scaler": 1}, "scaler must be a PipelineGradScaler or None, got a value of type int, 1"),
    ({"data_parallel": True}, "data_parallel holds a value of type bool, True; pass the data-parallel modules"),
    ({"schedule": "autos"}, "unknown schedule 'autos'; did you mean 'auto'[?] known schedules: 1f1b, .* auto, auto-v;"),
]


def wrong_arguments(rank, world):
    start(world)
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    last = tpc.is_last_in_pipeline_group()
    good = {
        "fwd_fn": lambda a: layer(a).mean() if last else layer(a),
        "inputs": x if tpc.is_first_in_pipeline_group() else None,
        "num_microbatches": 4,
    }
    for wrong, reason in WRONG_ARGUMENTS:
        for who in range(-1, world):  # every rank is wrong, or one of them
            with pytest.raises((PipelineError, ScheduleError), match=reason):
                forward_backward(**{**good, **(wrong if who in (-1, rank) else {})})
    assert layer.weight.grad is None
    forward_backward(**good)
    assert layer.weight.grad is not None


@pytest.mark.parametrize("world", [1, 2])
def test_an_argument_of_another_kind_is_named_with_the_next_thing_to_try(world):
    run_distributed(wrong_arguments, world, timeout=60)


def a_rank_that_leaves(rank, world):
    start(pipe=3)
    if rank == 1:
        return None
    layer = nn.Linear(4, 4)
    x = torch.randn(4, 4)
    with pytest.raises(PipelineError):
        forward_backward(
            fwd_fn=lambda a: layer(a[0]).mean() if rank == 2 else layer(a), inputs=x if rank == 0 else None
        )
    return "raised"


def one_process(rank, world):
    tpc.setup_process_groups([("data", 1), ("pipe", 1)]) if dist.is_initialized() else start(pipe=1)
    net = nn.Linear(4, 1)
    x = torch.randn(7, 4)
    loss = forward_backward(fwd_fn=lambda a: net(a).mean(), inputs=x, num_microbatches=3)
    assert torch.allclose(loss, net(x).mean())
    assert torch.allclose(forward_eval(net, x), net(x))
    assert torch.allclose(forward_eval(net, x, num_microbatches=3), net(x))


def test_one_process_needs_no_partner():
    run_distributed(one_process, 1)


def autocast_step(rank, world):
    start(pipe=2)
    net = make_layers(2).float()[tpc.get_pp_rank()]
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    last = tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mse(net(a[0]).float(), a[1]) if last else net(a)

    loss = forward_backward(None, fwd_fn, None, own_inputs(x, y), num_microbatches=4, dtype=torch.bfloat16)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert loss is None or loss.dtype == torch.float32


def test_autocast_and_a_dtype_on_the_wire():
    run_distributed(autocast_step, 2)
