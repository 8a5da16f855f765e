"""What one call costs: times apart, FLOPs, and exactly what autograd keeps."""

from __future__ import annotations

import copy
import gc
import operator
import time
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage.errors import SplitError
from torchdistpackage.split.calls import CallCost, call_cost, undisturbed


def sleepy(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.01)
    y = x * 2
    y.register_hook(lambda gradient: time.sleep(0.05))
    return y


def kept(function: Any, *args: Any, **options: Any) -> int:
    return call_cost(function, args, timed=False, **options).activation_bytes


def test_forward_and_backward_are_timed_apart() -> None:
    cost = call_cost(sleepy, (torch.ones(3),))
    assert 0.01 <= cost.forward < cost.backward
    assert cost.backward >= 0.05
    assert call_cost(sleepy, (torch.ones(3),), timed=False) == CallCost(0.0, 0.0, 0, 0)


def test_calls_without_tensors_cost_nothing() -> None:
    assert call_cost(operator.add, (2, 3)) == CallCost(0.0, 0.0, 0, 0)
    assert call_cost(torch.Size.numel, (torch.Size([2, 3]),)) == CallCost(0.0, 0.0, 0, 0)
    assert call_cost(lambda: None, ()) == CallCost(0.0, 0.0, 0, 0)


def test_sizes_in_or_out_and_integers_have_no_backward() -> None:
    x = torch.ones(4, 5)
    for function, args in [
        (torch.Tensor.size, (x, 0)),
        (torch.heaviside, (x, x)),
        (torch.arange, (5,)),
        (torch.argmax, (x,)),
        (x.long, ()),
    ]:
        cost = call_cost(function, args)
        assert cost.forward > 0
        assert (cost.backward, cost.flops, cost.activation_bytes) == (0, 0, 0)


def test_flops_are_those_of_the_forward_pass() -> None:
    assert call_cost(torch.matmul, (torch.ones(3, 4), torch.ones(4, 5))).flops == 2 * 3 * 4 * 5
    assert call_cost(nn.Linear(4, 5), (torch.ones(3, 4),), timed=False).flops == 2 * 3 * 4 * 5


def test_inputs_are_activations_and_parameters_are_not() -> None:
    linear = nn.Linear(4, 5)
    assert kept(linear, torch.ones(3, 4)) == 3 * 4 * 4
    weight = torch.ones(5, 4, requires_grad=True)
    assert kept(F.linear, torch.ones(3, 4), weight) == (3 * 4 + 5 * 4) * 4
    assert kept(lambda x: F.linear(x, weight), torch.ones(3, 4), parameters=[weight]) == 3 * 4 * 4


def test_each_storage_counts_once_and_whole() -> None:
    x = torch.ones(4, 6)
    assert kept(lambda x: x * x.T.T, x) == 4 * 6 * 4  # two views of one
    assert kept(lambda x: torch.sigmoid(x).pow(2), x) == 4 * 6 * 4  # saved as an output and as an input
    assert kept(lambda x: torch.sigmoid(torch.sigmoid(x)), x) == 2 * 4 * 6 * 4
    assert kept(lambda x: torch.sigmoid(x)[0].pow(2), x) == 4 * 6 * 4  # a row keeps the rest
    assert kept(lambda x: x + 1, x) == 0


def test_what_is_gone_when_the_forward_is_over_does_not_count() -> None:
    x = torch.ones(8)
    assert kept(lambda x: [torch.sigmoid(x * i) for i in range(5)][-1], x) == 2 * 8 * 4 - 8 * 4
    assert kept(lambda x: torch.sigmoid(x).sum().item(), x) == 0
    assert kept(lambda x: torch.sigmoid(x), x, grad=False) == 0
    assert kept(lambda x: checkpoint(lambda y: y.sin().sin().sin(), x, use_reentrant=False), x) == 8 * 4


def test_a_repeated_argument_is_not_made_large() -> None:
    mask = torch.ones(1, 1, 4).expand(100, 100, 4)
    assert kept(lambda a, b: a * b, mask, torch.ones(4)) <= (4 + 4) * 4
    assert call_cost(lambda a: a * 2, (mask,)).backward > 0


def test_gradients_go_to_all_inputs_or_to_those_that_require_one() -> None:
    a, b = torch.ones(6, requires_grad=True), torch.ones(6)
    assert kept(torch.mul, a, b) == 2 * 6 * 4
    assert kept(torch.mul, a, b, input_gradients="required") == 6 * 4  # the gradient of a needs b alone
    assert call_cost(torch.sin, (b,), input_gradients="required").backward == 0
    assert call_cost(torch.sin, (b,), grad=False).backward == 0


def test_nested_arguments_in_place_work_and_no_traces() -> None:
    linear, x = nn.Linear(4, 4), torch.rand(2, 4)
    before, weight = x.clone(), copy.deepcopy(linear.weight)
    with torch.no_grad():
        cost = call_cost(lambda pair, *, scale: linear(pair["x"].mul_(scale)), ({"x": x},), {"scale": 2})
    assert cost.backward > 0
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(linear.weight, weight)
    assert linear.weight.grad is None


def test_a_function_that_differentiates_itself() -> None:
    seen: list[torch.Tensor] = []

    def force(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.autograd.grad(torch.sigmoid(x).sum(), x, create_graph=True)[0])
        return torch.autograd.grad(seen[-1].sum(), x, create_graph=True)[0]

    x = torch.ones(4, dtype=torch.double)
    assert call_cost(force, (x,)).backward > 0
    assert torch.equal(seen[0], seen[-1])  # while the counting goes on, too
    assert torch.allclose(seen[0], torch.sigmoid(x) * torch.sigmoid(-x))


def test_nothing_is_kept_afterwards() -> None:
    made: list[Any] = []

    def remembered(x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(x)
        made.append(weakref.ref(y))
        return y

    call_cost(remembered, (torch.ones(4),))
    gc.collect()
    assert len(made) == 5
    assert not any(reference() is not None for reference in made)


def test_on_the_meta_device_there_is_no_time() -> None:
    with torch.device("meta"):
        linear, x = nn.Linear(4, 5), torch.empty(3, 4)
    with undisturbed([linear], x):
        assert call_cost(linear, (x,), timed=False) == CallCost(0.0, 0.0, 120, 48)
        with pytest.raises(SplitError, match=r"meta device.*timed=False"):
            call_cost(linear, (x,))
    with pytest.raises(SplitError, match=r"repeats must be 1 or more, got 0"):
        call_cost(torch.sin, (torch.ones(1),), repeats=0)


def test_undisturbed_puts_flags_buffers_and_random_numbers_back() -> None:
    norm, meta = nn.BatchNorm1d(2), nn.BatchNorm1d(2, device="meta")
    state, mean, on_meta = torch.get_rng_state(), norm.running_mean, meta.running_mean
    with undisturbed([nn.Sequential(norm), meta], {"x": torch.ones(1)}):
        norm(torch.rand(3, 2))
        norm.eval()
        norm.running_mean, meta.running_mean = torch.rand(2), torch.rand(2)
    assert norm.training
    assert norm.running_mean is mean
    assert not norm.running_mean.any()
    assert meta.running_mean is on_meta
    assert torch.equal(torch.get_rng_state(), state)
