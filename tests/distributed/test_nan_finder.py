"""A NaN on one stage of a pipeline: the rank that has it raises, and every rank names the module."""

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import loss_step, make_layers, own_inputs, start
from torch import nn

from torchdistpackage import PipelineError, forward_backward, partition_uniform, tpc
from torchdistpackage.errors import NonFiniteError
from torchdistpackage.tools import find_nan, register_profile_hooks


class Broken(nn.Module):
    """Gives out a NaN, or gives one back."""

    def __init__(self, backward):
        super().__init__()
        self.backward, self.on = backward, True

    def forward(self, x):
        if not self.on:
            return x
        return x + (x * 0).abs().sqrt() if self.backward else x + (x - x) / (x - x)


def own_stage(backward):
    layers = list(make_layers())
    layers[3].append(Broken(backward))
    return nn.Sequential(*partition_uniform(layers, num_stages=tpc.get_pp_size(), stage=tpc.get_pp_rank()))


def step(stage):
    x, y = torch.ones(8, 6).double(), torch.zeros(8, 6).double()
    stage.zero_grad()
    return forward_backward(None, loss_step(stage), None, own_inputs(x, y), num_microbatches=4)


def broken_step(rank, world, backward):
    start(world)
    stage = own_stage(backward)
    with find_nan(stage), pytest.raises((NonFiniteError, PipelineError)) as raised:
        step(stage)
    for module in stage.modules():
        module.on = False
    with find_nan(stage, raise_error=False) as finder:
        step(stage)
    return type(raised.value).__name__, str(raised.value), len(finder.found)


@pytest.mark.parametrize("backward", [False, True])
def test_all_ranks_name_the_module_and_the_next_step_is_right(backward):
    found = run_distributed(broken_step, 2, backward)
    assert [kind for kind, _, _ in found] == ["PipelineError", "NonFiniteError"]
    what = "SqrtBackward0 of 1.2 (Broken)" if backward else "NaN in the output of 1.2 (Broken), inside 1 (Sequential)"
    assert all(what in told for _, told, _ in found)
    assert [left for _, _, left in found] == [0, 0]


def watched_steps(rank, world):
    """Gradients with the hooks of both tools, and without."""
    start(world)
    stage = own_stage(False)
    for module in stage.modules():
        module.on = False
    step(stage)
    expected = [parameter.grad.clone() for parameter in stage.parameters()]
    infos = register_profile_hooks(stage)
    with find_nan(stage):
        step(stage)
    same = all(map(torch.equal, expected, (parameter.grad for parameter in stage.parameters())))
    return same, infos["root"].calls, infos["root"].kept > 0


def test_hooks_change_no_gradient():
    assert run_distributed(watched_steps, 2) == [(True, 1, True)] * 2
