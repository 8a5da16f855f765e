"""Stages that torch.compile has compiled: like any other where backwards run whole, refused where they are split."""

import copy

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, run_step, stage_functions, stage_inputs
from torch import nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.schedule import complete
from torchdistpackage.schedule.plan import Plan

# One rank: torch.compile is not meant for several threads at a time.
WHOLE = complete(Plan.from_text("0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"))
SPLIT = complete(Plan.from_text("0F0 1F0 1I0 0F1 0I0 1F1 1I1 1W0 0W0 0I1 1W1 0W1"))


def make():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5)) for _ in range(2)])


def train(plan, stages, steps=1, executor=None):
    executor = executor or Executor(plan, loopback(1)[0])
    functions = stage_functions(stages)
    torch.manual_seed(1)
    x, y = torch.randn(8, 5), torch.randn(8, 5)
    for _ in range(steps):
        result = executor.run([ChunkWork(functions[0], inputs=x), ChunkWork(functions[1], inputs=y)])
    return result


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_with_whole_backwards_they_work(which):
    stages = make()
    compiled = [torch.compile(s, backend="aot_eager") if i in which else s for i, s in enumerate(stages)]
    reference = copy.deepcopy(stages)
    train(WHOLE, compiled, steps=2)
    train(WHOLE, reference, steps=2)
    assert_same_gradients(stages, reference)


@pytest.mark.parametrize("which", [0, 1])
def test_with_split_backwards_they_are_refused_before_anything_is_computed(which):
    stages = make()
    compiled = list(stages)
    compiled[which] = torch.compile(stages[which], backend="aot_eager")
    executor = Executor(SPLIT, loopback(1)[0])
    for _ in range(2):
        with pytest.raises(PipelineError, match=rf"stage {which} is compiled .* whole backwards \(1f1b"):
            train(SPLIT, compiled, executor=executor)
        assert all(parameter.grad is None for parameter in stages.parameters())
    train(SPLIT, stages, executor=executor)  # uncompiled, on the same objects
    reference = make()
    train(WHOLE, reference)
    assert_same_gradients(stages, reference)


def test_on_several_ranks_all_are_told():
    stages = make()
    compiled = torch.compile(stages[1], backend="aot_eager")
    plan = complete(Plan.from_text("0F0 0I0 0W0\n1F0 1I0 1W0"))
    functions = [stages[0], lambda xs: mse(compiled(xs[0]), xs[1])]
    results = run_step(plan, functions, stage_inputs(2, torch.randn(4, 5), torch.randn(4, 5)))
    assert all(isinstance(result, PipelineError) and "torch.compile" in str(result) for result in results)
