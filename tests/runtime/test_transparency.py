"""The law: a pipelined step is the plain loop, bit for bit, over every schedule, p, m and batch size."""

import copy

import pytest
import torch
from loopback_pipeline import (
    assert_same_gradients,
    mse,
    plain_loop,
    run_step,
    stage_functions,
    stage_inputs,
    train,
)
from torch import nn

from torchdistpackage.schedule import build, names


def make_stages(p, width=6):
    torch.manual_seed(p)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True)) for _ in range(p)])


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_training_is_the_plain_loop_bitwise(name, p):
    for m in sorted({*range(1, 2 * p + 2), 5}):
        plan = build(name, p, m)
        for rows in sorted({1, m, 2 * m + 1, 7}):
            stages = make_stages(plan.placement.num_stages)
            reference = copy.deepcopy(stages)
            x, y = torch.randn(rows, 6), torch.randn(rows, 6)
            loss = train(plan, stages, x, y, m)
            assert torch.equal(loss, plain_loop(reference, x, y, m))
            assert_same_gradients(stages, reference)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_evaluation_returns_every_row_in_order(name, p):
    for m in (1, 3, 4, 10):
        x = torch.randn(10, 6)
        plan = build(name, p, m, forward_only=True)
        stages = make_stages(plan.placement.num_stages)
        with torch.no_grad():
            results = run_step(plan, stage_functions(stages, None), stage_inputs(len(stages), x))
        last = results.pop(plan.placement.loss_rank)
        assert torch.allclose(torch.cat(last.outputs), stages(x), atol=1e-6)
        assert all(result.outputs == [] for result in results)


@pytest.mark.parametrize("name", names())
def test_the_gradient_is_the_full_batchs_for_uneven_microbatches(name):
    plan, rows = build(name, 3, 4), 10
    stages = make_stages(plan.placement.num_stages).double()
    reference = copy.deepcopy(stages)
    x, y = torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
    loss = train(plan, stages, x, y, 4)
    whole = mse(reference(x), y)
    whole.backward()
    assert torch.allclose(loss, whole)
    for p, q in zip(stages.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)


def test_the_sum_adds_the_losses_of_the_microbatches():
    stages = make_stages(2)
    reference = copy.deepcopy(stages)
    x, y = torch.randn(7, 6), torch.randn(7, 6)
    loss = train("1f1b", stages, x, y, 3, mean=False)
    parts = [mse(reference(a), b) for a, b in zip(x.split([3, 2, 2]), y.split([3, 2, 2]), strict=True)]
    for part in parts:
        part.backward()
    assert torch.allclose(loss, sum(parts))
    assert_same_gradients(stages, reference)


def test_two_steps_accumulate():
    stages = make_stages(2)
    reference = copy.deepcopy(stages)
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    train("1f1b", stages, x, y, 4, steps=2)
    for _ in range(2):
        plain_loop(reference, x, y, 4)
    assert_same_gradients(stages, reference)


@pytest.mark.parametrize("name", names())
def test_batchnorm_statistics_are_the_plain_loops(name):
    torch.manual_seed(0)
    plan = build(name, 3, 4)
    stages = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in plan.placement.owners])
    reference = copy.deepcopy(stages)
    x, y = torch.randn(12, 4), torch.randn(12, 4)
    train(plan, stages, x, y, 4)
    plain_loop(reference, x, y, 4)
    for mine, theirs in zip(stages.buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_channels_last_activations_stay_channels_last():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    stages = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Probe(), nn.Conv2d(4, 2, 3), nn.Flatten()))
    reference = copy.deepcopy(stages)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    y = torch.randn(4, 32)
    train("1f1b", stages, x, y, 2)
    plain_loop(reference, x, y, 2)
    assert seen == [True, True, True, True]
    assert_same_gradients(stages, reference)


def test_the_users_loss_is_never_touched():
    stages, kept = make_stages(2), []

    def loss_fn(output, target):
        kept.append(mse(output, target))
        return kept[-1]

    x, y = torch.randn(8, 6), torch.randn(8, 6)
    results = run_step(build("1f1b", 2, 4), stage_functions(stages, loss_fn), stage_inputs(2, x, y))
    expected = [mse(stages(a), b) for a, b in zip(x.split(2), y.split(2), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    assert not any(output.requires_grad for output in results[-1].outputs)


def test_nothing_is_left_behind_after_a_step():
    import gc
    import weakref

    stages, alive = make_stages(3), []

    def watch(function):
        def forward(arguments):
            output = function(arguments)
            alive.append(weakref.ref(output))
            return output

        return forward

    functions = [watch(function) for function in stage_functions(stages)]
    results = run_step(build("1f1b", 3, 6), functions, stage_inputs(3, torch.randn(6, 6), torch.randn(6, 6)))
    del results
    gc.collect()
    assert len(alive) == 18
    assert not any(reference() is not None for reference in alive)
