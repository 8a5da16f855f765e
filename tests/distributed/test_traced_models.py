"""Traced models trained over gloo: long skips, two towers, a tied head, experts; the gradients of the plain loop."""

import copy

import pytest
import torch
import traced_models as models
from distributed_harness import run_distributed
from distributed_pipeline import start
from torch import nn

from torchdistpackage import (
    PipelineError,
    SplitError,
    clip_grad_norm_,
    forward_backward,
    last_plan,
    local_stages,
    split_model,
    tpc,
    whole_model_state_dict,
)
from torchdistpackage.schedule import describe
from torchdistpackage.split import split

MODELS = {
    "UNet": (lambda: models.UNet(depth=5), lambda n: (torch.randn(n, 6).double(),)),
    "TwoTowers": (models.TwoTowers, lambda n: (torch.randn(n, 4).double(), torch.randint(11, (n, 5)))),
    "TiedHead": (lambda: models.TiedHead(count=6), lambda n: (torch.randint(11, (n, 5)),)),
    "MixtureOfExperts": (lambda: models.MixtureOfExperts(count=6), lambda n: (torch.randn(n, 6).double(),)),
}


class Training:
    """This rank's stages of a traced model under a schedule."""

    def __init__(self, model, inputs, schedule, costs="flops"):
        facts = describe(schedule)
        self.count = tpc.get_pp_size() * facts.chunks
        self.schedule, self.pipe = schedule, split_model(model, inputs, self.count, costs=costs)
        self.stages = local_stages(self.pipe, schedule)

    def step(self, inputs, target, m, **options):
        def forward(index, stage):
            if index == self.count - 1 and target is not None:
                return lambda x: nn.functional.mse_loss(stage(x[:-1]), x[-1])
            return stage

        own = [
            [*(inputs if s == 0 else ()), *((target,) if s == self.count - 1 and target is not None else ())]
            for s in self.stages
        ]
        functions = [forward(index, stage) for index, stage in self.stages.items()]
        one = [each or None for each in own]
        return forward_backward(None, functions, None, one, m, schedule=self.schedule, **options)

    def parameters(self):
        return [p for stage in self.stages.values() for p in stage.parameters()]


def train_a_model(rank, world, name, schedule):
    start(world)
    build, example = MODELS[name]
    model = build().double()
    reference = copy.deepcopy(model)
    training = Training(model, example(4), schedule)
    for rows in (6, 9):
        inputs = example(rows)
        target = torch.randn_like(reference(*inputs))
        loss = training.step(inputs, target, 4, broadcast_loss=True)
        whole = nn.functional.mse_loss(reference(*inputs), target)
        whole.backward()
        assert torch.allclose(loss, whole)
    assert last_plan().skips == training.pipe.skips
    norm = clip_grad_norm_(training.parameters(), 0.1)
    assert torch.allclose(norm.double(), nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    for stage in training.stages.values():
        for key, parameter in stage.named_parameters(remove_duplicate=False):
            assert (parameter.grad is None) == (wanted[key].grad is None), key
            assert parameter.grad is None or torch.allclose(parameter.grad, wanted[key].grad), key
            assert key in whole_model_state_dict(stage)
    for stage in training.stages.values():
        stage.eval()
    outputs = training.step(example(5), None, 3, forward_only=True, broadcast_loss=True)
    assert outputs.shape[0] == 5


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-v"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_traced_model_trains_as_in_the_plain_loop(name, schedule, world):
    run_distributed(train_a_model, world, name, schedule, timeout=90)


def cut_by_time(rank, world):
    """Every rank measures something else, but all cut alike."""
    start(world)
    model = models.Blocks(count=8)
    pipe = split_model(model, (torch.randn(4 + 400 * rank, 6),), costs="time")
    mine = pipe.get_stage_module(rank)
    return sorted(mine.state_dict()), str(pipe.report)


def test_ranks_agree_on_measured_cuts():
    (first, table), (second, other) = run_distributed(cut_by_time, 2)
    assert not set(first) & set(second)
    assert len(first) + len(second) == len(models.Blocks(count=8).state_dict())
    assert table == other


def cut_alone(rank, world):
    """Without agreement: what is equal in all processes, or nothing."""
    start(world)
    with pytest.raises(SplitError, match="split_model"):
        split(models.Blocks(), torch.randn(2, 6), 2, costs="time")
    return sorted(split(models.Blocks(), torch.randn(2, 6), 2).get_stage_module(0).state_dict())


def test_ranks_that_do_not_agree_do_not_measure():
    first, second = run_distributed(cut_alone, 2)
    assert first == second


class Broken(models.Blocks):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def refused(rank, world):
    start(world)
    with pytest.raises(SplitError, match="cannot be recorded"):
        split_model(Broken(), torch.randn(2, 6))
    with pytest.raises((SplitError, PipelineError), match="no module 'nothing'"):
        split_model(models.Blocks(), torch.randn(2, 6), stage_of={"nothing": 0})
    with pytest.raises(SplitError, match="cut into 3 stages"):
        local_stages(split_model(models.Blocks(), torch.randn(2, 6), 3), "1f1b")
    training = Training(models.Blocks().double(), torch.randn(2, 6).double(), "1f1b")
    training.step((torch.randn(4, 6).double(),), torch.randn(4, 3).double(), 2)


def test_what_cannot_be_cut_is_refused_on_every_rank():
    run_distributed(refused, 2)
