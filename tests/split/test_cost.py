"""What layers cost, and that counting leaves no trace."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.cost import cut_bytes, flop_counts, layer_costs, measured_times, parameter_counts
from torchdistpackage.split.sequential import balanced_partition, flatten_model


class Sleepy(nn.Module):
    """Takes its time on the way there and on the way back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        x.register_hook(lambda gradient: time.sleep(0.02))
        return x * 2


class Restless(nn.Module):
    """A layer that changes a buffer in place, replaces another one, draws random numbers, and works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.count: torch.Tensor
        self.last: torch.Tensor
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = torch.rand(1)
        return x.add_(torch.rand_like(x))


def test_parameters_of_a_shared_layer_count_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert parameter_counts([first, nn.ReLU(), second, first, nn.Linear(4, 1)]) == (20, 0, 0, 0, 5)


def test_flops_are_those_of_the_formula() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5), nn.Linear(5, 5)]
    convolution = 2 * (8 * 16) * (3 * 9)
    assert flop_counts(layers, torch.zeros(1, 3, 4, 4)) == (convolution, 0, 0, 2 * 128 * 5, 2 * 25)


def test_flops_of_a_resnet_add_up_to_the_known_number() -> None:
    model = torchvision.models.resnet18()
    names: list[Any] = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    row = flatten_model(model, [*names, nn.Flatten(), "fc"], return_list=True)
    assert sum(flop_counts(row, torch.zeros(1, 3, 224, 224))) == 2 * 1_814_073_344  # 1.8 billion multiply-adds


def test_bytes_at_the_cuts() -> None:
    layers = [nn.Linear(3, 4), nn.Linear(4, 2).half(), nn.Identity()]
    layers.insert(1, nn.Sequential(nn.Identity()))
    layers[1].forward = torch.Tensor.half  # type: ignore[assignment, method-assign]
    assert cut_bytes(layers, torch.zeros(5, 3)) == (5 * 4 * 4, 5 * 4 * 2, 5 * 2 * 2)
    assert cut_bytes([nn.LSTM(3, 4)], torch.zeros(5, 3)) == ()
    assert cut_bytes([nn.LSTM(3, 4), nn.Identity()], torch.zeros(5, 3)) == ((5 + 1 + 1) * 4 * 4,)  # output, (h, c)


def test_forward_and_backward_are_measured() -> None:
    layers = [nn.Embedding(10, 4), nn.ReLU(inplace=True), Sleepy(), nn.ReLU(inplace=True), nn.Linear(4, 4)]
    times = measured_times(layers, torch.zeros(3, dtype=torch.long))
    assert len(times) == 5
    assert all(seconds > 0 for seconds in times)
    assert times[2] >= 0.03


@pytest.mark.parametrize("count", [flop_counts, cut_bytes, measured_times])
def test_counting_leaves_no_trace(count: Callable[..., Any]) -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), Restless(), nn.BatchNorm2d(4).eval(), nn.ReLU()]
    row = nn.Sequential(*layers)
    row[0].weight.grad = torch.ones_like(row[0].weight)
    example = torch.rand(2, 3, 4, 4)
    before, last = copy.deepcopy(row), layers[3].last
    kept, state = example.clone(), torch.get_rng_state()
    count([Restless(), *layers], example)
    assert torch.equal(example, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in row.modules()] == [module.training for module in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(row.state_dict().values(), before.state_dict().values(), strict=True))
    assert layers[3].last is last
    assert torch.equal(row[0].weight.grad, torch.ones(4, 3, 1, 1))
    assert row[0].bias.grad is None


@pytest.mark.parametrize("count", [flop_counts, cut_bytes, measured_times])
def test_layers_that_do_not_fit_are_named_and_nothing_stays_changed(count: Callable[..., Any]) -> None:
    layers = [nn.BatchNorm1d(3), nn.Linear(4, 4), nn.ReLU()]
    with pytest.raises(SplitError, match=r"layer 1 \(Linear\) does not run"):
        count(layers, torch.rand(2, 3))
    assert layers[0].training
    assert not layers[0].running_mean.any()


def test_names_of_costs() -> None:
    layers, x = [nn.Linear(2, 2), nn.ReLU()], torch.zeros(1, 2)
    assert layer_costs(layers, "flops", x) == (8, 0)
    assert len(layer_costs(layers, "time", x)) == 2
    assert layer_costs(layers, [1, 2.5]) == (1, 2.5)
    with pytest.raises(SplitError, match=r"1 costs were given for 2 layers"):
        layer_costs(layers, [1])
    with pytest.raises(SplitError, match=r"unknown costs 'memory'; use 'parameters', 'flops', 'time'"):
        layer_costs(layers, "memory")  # type: ignore[arg-type]
    with pytest.raises(SplitError, match=r"pass example_input"):
        layer_costs(layers, "flops")
    with pytest.raises(SplitError, match=r"repeats must be 1 or more, got 0"):
        measured_times(layers, x, repeats=0)


def test_what_is_counted_moves_the_cut() -> None:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 10)]
    x = torch.zeros(1, 1, 8, 8)
    assert [len(balanced_partition(layers, 2, stage)) for stage in range(2)] == [3, 1]
    assert [len(balanced_partition(layers, 2, stage, costs="flops", example_input=x)) for stage in range(2)] == [2, 2]
