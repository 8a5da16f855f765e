"""Optimizers and learning rates: the defaults, and what a user brings."""

from functools import partial

import pytest
import torch
from torch import nn

from torchdistpackage import TrainerError
from torchdistpackage.trainer import PipelineTrainingArguments, default_optimizer, make_optimizer, make_scheduler


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    layers[2].bias.requires_grad_(False)
    layers.norm_2 = nn.Linear(2, 2)
    return layers


def test_what_decays():
    args = PipelineTrainingArguments(weight_decay=0.1, learning_rate=0.5, adam_beta2=0.9, adam_epsilon=1e-3)
    optimizer = default_optimizer(model().named_parameters(), args)
    assert isinstance(optimizer, torch.optim.AdamW)
    told = [(group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
    assert told == [(0.1, ["0.weight", "2.weight"]), (0.0, ["1.weight", "1.bias", "norm_2.weight", "norm_2.bias"])]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.9, 0.9), 1e-3)


def test_a_step_is_that_of_adamw():
    args = PipelineTrainingArguments(weight_decay=0.1, learning_rate=0.5)
    results = []
    for make in (
        lambda net: default_optimizer(net.named_parameters(), args),
        lambda net: torch.optim.AdamW(
            [
                {"params": [net[0].weight, net[2].weight], "weight_decay": 0.1},
                {"params": [*net[1].parameters(), *net.norm_2.parameters()], "weight_decay": 0.0},
            ],
            lr=0.5,
        ),
    ):
        net = model()
        optimizer = make(net)
        for _ in range(3):
            net(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([each.detach().flatten() for each in net.parameters()]))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer_factory": partial(torch.optim.SGD, lr=0.1)},
        {"optimizer_factory": lambda named: torch.optim.SGD([each for _, each in named], lr=0.1)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.9})},
    ],
)
def test_a_rank_without_parameters_steps_too(given):
    args = PipelineTrainingArguments()
    optimizer = make_optimizer([], args, **given)
    scheduler = make_scheduler(optimizer, args, 3)
    optimizer.step()
    scheduler.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 0
    assert not any(group.get("param_names") for group in optimizer.param_groups)
    optimizer.load_state_dict(optimizer.state_dict())


def test_what_a_user_brings():
    args = PipelineTrainingArguments(weight_decay=0.2, learning_rate=0.3)
    factory = make_optimizer(model().named_parameters(), args, partial(torch.optim.SGD, lr=0.1))
    assert factory.param_groups[0]["param_names"][0] == "0.weight"
    by_class = make_optimizer(model().named_parameters(), args, None, (torch.optim.SGD, {"momentum": 0.9}))
    assert [(group["lr"], group["weight_decay"]) for group in by_class.param_groups] == [(0.3, 0.2), (0.3, 0.0)]
    with pytest.raises(TrainerError, match="both given"):
        make_optimizer([], args, torch.optim.SGD, (torch.optim.SGD, {}))
    with pytest.raises(TrainerError, match="must return an optimizer, got int"):
        make_optimizer([], args, lambda named: 3)


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 4, 12])
@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), ("cosine", {}), ("cosine", {"num_cycles": 1.5}), ("constant", {}), ("constant_with_warmup", {})],
)
def test_rates_are_those_of_transformers(name, options, warmup):
    transformers = pytest.importorskip("transformers")
    args = PipelineTrainingArguments(lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=warmup)
    ours, theirs = (default_optimizer(model().named_parameters(), args) for _ in range(2))
    expected = transformers.get_scheduler(name, theirs, warmup, 10, scheduler_specific_kwargs=options)
    assert rates(make_scheduler(ours, args, 10), ours, 13) == rates(expected, theirs, 13)


def test_the_other_rates_of_transformers():
    transformers = pytest.importorskip("transformers")
    args = PipelineTrainingArguments(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0})
    optimizer = default_optimizer(model().named_parameters(), args)
    expected = transformers.get_polynomial_decay_schedule_with_warmup(
        default_optimizer(model().named_parameters(), args), 0, 10, power=2.0
    )
    assert rates(make_scheduler(optimizer, args, 10), optimizer, 5) == rates(expected, expected.optimizer, 5)
    with pytest.raises(TrainerError, match="no schedule lr_scheduler_type='zigzag'"):
        make_scheduler(optimizer, PipelineTrainingArguments(lr_scheduler_type="zigzag"), 10)


def test_factories_of_rates():
    args = PipelineTrainingArguments(warmup_steps=3)
    optimizer = make_optimizer(model().named_parameters(), args)
    given = {}

    def takes_all(optimizer, num_training_steps, num_warmup_steps):
        given.update(total=num_training_steps, warmup=num_warmup_steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    make_scheduler(optimizer, args, 10, takes_all)
    assert given == {"total": 10, "warmup": 3}
    assert make_scheduler(optimizer, args, 10, partial(torch.optim.lr_scheduler.StepLR, step_size=7)).step_size == 7
    assert make_scheduler(optimizer, args, 10, lambda mine: mine) is optimizer


def test_options_that_a_schedule_does_not_take():
    args = PipelineTrainingArguments(lr_scheduler_kwargs={"num_cycles": 2})
    optimizer = make_optimizer(model().named_parameters(), args)
    with pytest.raises(TrainerError, match=r"'linear' takes no lr_scheduler_kwargs; got \{'num_cycles': 2\}"):
        make_scheduler(optimizer, args, 10)
