"""Functions that stay whole, and what only torch.export can record."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from traced_comparison import assert_same, needs_export_of_vmap

from torchdistpackage.split import split


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor * 7, None  # not what autograd would find


@torch.jit.script
def scripted(x, shift: float):
    return x + shift


class Settings:
    shift = 0.5


def shifted(x, settings):
    return x + settings.shift


class Opaque(nn.Module):
    """Calls what looks at types, or has a backward of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.settings = nn.Linear(6, 6), nn.Linear(6, 6), Settings()

    def forward(self, x):
        x = Double.apply(self.a(x), 2.0)
        x = scripted(x, 1.0)
        x = torch.utils.checkpoint.checkpoint(self.b, x, use_reentrant=False)
        return shifted(x, self.settings) + torch.rand(x.shape[0], 1)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_functions_that_stay_whole(num_stages):
    model = Opaque()
    pipe = split(model, torch.randn(2, 6), num_stages, costs="flops", leaf_functions=[shifted])
    assert_same(model, pipe, torch.randn(3, 6))


class Functional(nn.Module):
    """What symbols cannot pass through, but torch.export can: torch.func, and training that is burnt in there."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x, shift=None):
        x = self.norm(self.a(x))
        x = torch.func.vmap(lambda row: row * torch.linalg.vector_norm(row))(x)
        return {"out": nn.functional.dropout(self.b(x), 0.5, self.training) + shift, "name": "functional"}


def test_the_second_door_is_torch_export():
    needs_export_of_vmap()
    torch.manual_seed(0)
    model = Functional()
    pipe = split(model, torch.randn(4, 6), 2, {"shift": torch.randn(6)}, costs="flops")
    assert {key for i in range(2) for key in pipe.get_stage_module(i).state_dict()} == set(model.state_dict())
    reference = copy.deepcopy(model)
    for training in (True, False):
        pipe.train(training), reference.train(training)
        x, shift, found = torch.randn(7, 6), torch.randn(6), []
        for run in (pipe, reference):
            torch.manual_seed(1)
            output = run(x, shift=shift)
            output["out"].square().sum().backward()
            found.append(output["out"])
        assert torch.allclose(*found)
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert torch.equal(model.norm.running_mean, reference.norm.running_mean)
