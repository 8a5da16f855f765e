"""Loss scaling over gloo: all ranks skip or step together, and train what torch's scaler trains in a plain loop."""

import contextlib
import copy
import functools

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import loss_step, make_layers, mse, own_inputs, start
from torch import nn

from torchdistpackage import (
    DDP,
    PipelineError,
    PipelineGradScaler,
    clip_grad_norm_,
    forward_backward,
    partition_uniform,
    tpc,
)

sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
fused = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
fp16 = functools.partial(torch.autocast, "cpu", torch.float16)


def scaled_step(stage, scaler, cast=contextlib.nullcontext):
    def fwd_fn(arguments):
        with cast():
            output = loss_step(stage)(arguments)
        return scaler.scale(output) if scaler is not None and tpc.is_last_in_pipeline_group() else output

    return fwd_fn


def own_part(layers):
    return nn.Sequential(*partition_uniform(list(layers), num_stages=tpc.get_pp_size(), stage=tpc.get_pp_rank()))


def plain_step(model, optimizer, scaler, batches, max_norm, cast):
    """A plain loop over the micro-batches; returns the loss."""
    optimizer.zero_grad()
    total = 0.0
    for x, y in batches:
        with cast():
            loss = mse(model(x), y)
        total += loss.item() / len(batches)
        (scaler.scale(loss) / len(batches)).backward()
    if max_norm:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    return total


def training(rank, world, make_optimizer, options, max_norm, cast):
    start(pipe=2)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = make_layers().float()
    stage, part = own_part(copy.deepcopy(reference)), own_part(reference)
    optimizer, plain_optimizer = make_optimizer(stage.parameters()), make_optimizer(reference.parameters())
    scaler, plain_scaler = PipelineGradScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)
    wrapped = DDP(stage) if d > 1 else stage
    equal = torch.equal if d == 1 and not max_norm else functools.partial(torch.allclose, atol=1e-6)
    scales = []
    for number in range(8):
        given, scale = number % 2 == 1, scaler.get_scale()  # the scaler is an argument, or fwd_fn calls it
        x, y = torch.randn(d, 8, 6), torch.randn(d, 8, 6) * 10
        batches = [pair for one in zip(x, y, strict=True) for pair in zip(*(t.chunk(4) for t in one), strict=True)]
        plain_loss = plain_step(reference, plain_optimizer, plain_scaler, batches, max_norm, cast)
        fwd_fn = scaled_step(wrapped, None if given else scaler, cast)
        inputs = own_inputs(x[r], y[r])
        loss = forward_backward(optimizer, fwd_fn, None, inputs, 4, scaler=scaler if given else None)
        scales.append(scale)
        if max_norm:
            scaler.unscale_(optimizer)
            clip_grad_norm_(stage.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(equal, stage.parameters(), part.parameters()))
        assert scaler.state_dict() == plain_scaler.state_dict()
        if loss is not None and loss.isfinite() and d == 1:
            assert loss.item() / (1 if given else scale) == pytest.approx(plain_loss, rel=1e-5)
    return scales


OVERFLOWS = {"init_scale": 2.0**127, "backoff_factor": 2.0**-4, "growth_interval": 2}  # at first, and then it grows


@pytest.mark.parametrize(
    ("world", "optimizer", "options", "max_norm", "cast"),
    [
        pytest.param(2, sgd, OVERFLOWS, None, contextlib.nullcontext, id="pipe"),
        pytest.param(4, sgd, OVERFLOWS, 0.1, contextlib.nullcontext, id="data-x-pipe-clipped"),
        pytest.param(2, fused, OVERFLOWS, None, contextlib.nullcontext, id="fused"),
        pytest.param(2, sgd, OVERFLOWS | {"init_scale": 2.0**16}, None, fp16, id="float16"),
    ],
)
def test_trains_as_the_plain_loop_with_torchs_scaler(world, optimizer, options, max_norm, cast):
    scales = run_distributed(training, world, optimizer, options, max_norm, cast)
    assert scales[0][0] > scales[0][2] < max(scales[0][3:])
    assert all(one == scales[0] for one in scales)


def planted(rank, world, config, make_optimizer):
    """Each rank in turn finds an inf alone; a scaler of torch's that sees all of it goes along."""
    start(pipe=1, config=config)
    stage = own_part(make_layers(3).float())
    optimizer = make_optimizer(stage.parameters())
    options = {"init_scale": 8.0, "growth_interval": 2}
    scaler, plain = PipelineGradScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)
    everything = nn.Parameter(torch.zeros(1))
    plain_optimizer = sgd([everything])
    for victim in [*range(world), None, None, world - 1, None]:
        x, y = torch.randn(4, 6), torch.randn(4, 6)
        forward_backward(optimizer, scaled_step(stage, scaler), None, own_inputs(x, y), num_microbatches=2)
        if rank == victim:
            next(stage.parameters()).grad[0] = float("inf")
        before = copy.deepcopy(list(stage.parameters()))
        scaler.step(optimizer)
        scaler.update()
        same = list(map(torch.equal, stage.parameters(), before))
        assert all(same) if victim is not None else not any(same)
        plain.scale(everything.sum()).backward()
        everything.grad.fill_(0.0 if victim is None else float("nan"))
        plain.step(plain_optimizer)
        plain.update()
        assert scaler.state_dict() == plain.state_dict()
    return scaler.get_scale()


@pytest.mark.parametrize(
    ("world", "config", "optimizer"),
    [
        pytest.param(3, [("pipe", 3)], sgd, id="pipe"),
        pytest.param(2, [("data", 2)], sgd, id="data"),
        pytest.param(4, [("pipe", 2), ("tensor", 2)], fused, id="pipe-x-tensor-fused"),
    ],
)
def test_an_inf_on_one_rank_is_skipped_by_all(world, config, optimizer):
    assert run_distributed(planted, world, config, optimizer) == [2.0 ** (3 - world)] * world


def without_gradients(rank, world):
    """Stage 1 is frozen, stage 2 has an optimizer without parameters, and stage 3 overflows in the second step."""
    start(pipe=4)
    stage = own_part(make_layers(4).float()).requires_grad_(rank != 1)
    optimizer = sgd(stage.parameters() if rank != 2 else [{"params": []}])
    scaler = PipelineGradScaler(device="cpu")
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for step in range(3):
        x, y = torch.randn(4, 6), torch.randn(4, 6)
        fwd_fn = scaled_step(stage, scaler)
        forward_backward(optimizer, fwd_fn, None, own_inputs(x, y), num_microbatches=2)
        if rank == 3 and step == 1:
            stage[0][0].bias.grad[0] = float("nan")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return len(steps), scaler.get_scale()


def test_stages_without_gradients_take_part():
    assert run_distributed(without_gradients, 4) == [(2, 2.0**15)] * 4


def saved_and_loaded(rank, world):
    start(pipe=2)
    stage = own_part(make_layers().float())
    optimizer = sgd(stage.parameters())
    state = {"scale": 64.0, "growth_factor": 4.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 1}
    scaler, plain = PipelineGradScaler("cpu"), torch.amp.GradScaler("cpu")
    for _ in range(2):  # before the first step, and after it
        plain.load_state_dict(state)
        scaler.load_state_dict(plain.state_dict())
        assert scaler.state_dict() == state
        x, y = torch.randn(4, 6), torch.randn(4, 6)
        for expected in [(64.0, 2), (256.0, 0)]:
            forward_backward(optimizer, scaled_step(stage, scaler), None, own_inputs(x, y), num_microbatches=2)
            scaler.step(optimizer)
            scaler.update()
            plain.load_state_dict(scaler.state_dict())
            assert (plain.get_scale(), plain.state_dict()["_growth_tracker"]) == expected
    scaler.update(8.0)
    return scaler.get_scale()


def test_state_is_torchs():
    assert run_distributed(saved_and_loaded, 2) == [8.0, 8.0]


def wrong_and_disabled(rank, world):
    start(pipe=2)
    stage = own_part(make_layers().float())
    optimizer = sgd(stage.parameters())
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    forward_backward(optimizer, loss_step(stage), None, own_inputs(x, y), num_microbatches=2)
    disabled = PipelineGradScaler("cpu", enabled=False)
    for _ in range(1 + rank):  # not collective
        disabled.unscale_(optimizer)
        disabled.step(optimizer)
        disabled.update()
    with pytest.raises(PipelineError, match=r"return scaler\.scale\(loss\)"):
        PipelineGradScaler("cpu").step(optimizer)


def test_a_loss_that_nobody_scaled_is_an_error_on_every_rank():
    run_distributed(wrong_and_disabled, 2)


def test_without_a_set_up_it_is_torchs():
    reference = nn.Linear(3, 1)
    model = copy.deepcopy(reference)
    scalers = [PipelineGradScaler("cpu", growth_interval=1), torch.amp.GradScaler("cpu", growth_interval=1)]
    with pytest.raises(AssertionError, match="_scale is None"):
        scalers[0].step(sgd(model.parameters()))
    for scaler, module in zip(scalers, [model, reference], strict=True):
        optimizer = sgd(module.parameters())
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale(module(torch.ones(2, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert all(map(torch.equal, model.parameters(), reference.parameters()))
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert PipelineGradScaler().is_enabled()
