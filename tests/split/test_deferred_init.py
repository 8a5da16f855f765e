"""A model that was recorded has the weights of the model that is built, whichever part of it is filled."""

import copy
import logging

import pytest
import torch
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.deferred_init import record_init
from torchdistpackage.split.init_tape import Tape
from torchdistpackage.split.places import places_of


class Mixed(nn.Module):
    """Most of what models do to their tensors."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(5, 3) * 0.02)
        self.register_buffer("numbers", torch.arange(4))
        self.register_buffer("seen", torch.tril(torch.ones(4, 4)), persistent=False)
        self.embed, self.head = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.data.normal_(0, 0.1)
        self.frequencies = 1.0 / (10000 ** (torch.arange(0, 4, 2).float() / 4))
        self.scales = [torch.randn(2)]
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3)
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        for initialise in (nn.init.orthogonal_, nn.init.eye_, nn.init.kaiming_normal_, nn.init.xavier_uniform_):
            initialise(self.q.weight)
        nn.init.dirac_(self.conv.weight)
        nn.init.trunc_normal_(self.q.bias, std=0.02)
        nn.init.sparse_(self.k.weight, 0.3)
        self.k.weight.data.copy_(self.q.weight.t())
        self.k.weight.data[1:3].uniform_()
        self.k.half()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.3, 5, device="cpu")]
        self.rows = [rate.tolist() for rate in torch.linspace(0, 0.3, 5).split([2, 3])]
        self.attention, self.cell = nn.MultiheadAttention(8, 2), nn.LSTM(3, 4, 2)
        self.copied = copy.deepcopy(self.conv)
        self.turned = nn.Parameter(self.own.data[1:3].clone().t())


def seeded():
    model = Mixed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.z = nn.Linear(3, 3)
    model.y = nn.Linear(2, 2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model.x = nn.Linear(3, 3)
    torch.set_rng_state(state)
    model.w = nn.Linear(3, 3)
    assert torch.initial_seed() == 7
    return model


def careful():
    """Looks where its weights are, as transformers and timm do, and at what they are."""
    model = nn.Linear(3, 3)
    assert torch.tensor([]).device == model.weight.device == torch.device("cpu")
    assert not model.weight.is_meta
    assert model.to("cpu").weight.cpu() is model.weight
    if model.weight.device.type == "cpu":
        nn.init.normal_(model.weight, generator=None)
    model.total = model.weight.abs().sum().item()
    nn.init.normal_(model.bias)
    model.ones = int(torch.ones(3).sum())
    return model


def halves():
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return nn.Sequential(nn.Linear(30, 3), nn.BatchNorm1d(3))
    finally:
        torch.set_default_dtype(usual)


def parametrized():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4), nn.Linear(2, 2))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.nn.utils.parametrizations.spectral_norm(model[1])
    torch.nn.utils.parametrizations.orthogonal(model[2])
    return model


def given():
    return nn.Sequential(nn.Embedding.from_pretrained(torch.ones(3, 2)), nn.Linear(2, 2))


def tensors(module):
    return {place.name: place.tensor for place in places_of(module)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mine = found[name]
        assert torch.equal(mine, tensor), name
        assert (type(mine), mine.dtype, mine.stride()) == (type(tensor), tensor.dtype, tensor.stride())
        assert mine.requires_grad == tensor.requires_grad


def plain(model_init):
    torch.manual_seed(3)
    model = model_init()
    return model, torch.get_rng_state()


@pytest.mark.parametrize("model_init", [Mixed, seeded, careful, halves, parametrized, given])
def test_every_value_and_the_generator_are_those_of_the_built_model(model_init):
    wanted, end = plain(model_init)
    recorded = record_init(model_init, seed=3)
    assert recorded.reason is None
    assert any(parameter.is_meta for parameter in recorded.model.parameters())
    recorded.fill([recorded.model])
    assert torch.equal(torch.get_rng_state(), end)
    assert_same(tensors(recorded.model), tensors(wanted))


@pytest.mark.parametrize("model_init", [Mixed, seeded, parametrized])
def test_each_part_alone_has_them_too(model_init):
    wanted, end = plain(model_init)
    for name, _ in wanted.named_children():
        recorded = record_init(model_init, seed=3)
        recorded.fill([recorded.model.get_submodule(name)])
        assert_same(tensors(recorded.model.get_submodule(name)), tensors(wanted.get_submodule(name)))
        assert torch.equal(torch.get_rng_state(), end)


def test_without_a_seed_it_goes_on_with_the_generator_and_may_be_asked_twice():
    torch.manual_seed(3)
    torch.rand(5)
    recorded = record_init(Mixed)
    again = record_init(Mixed)
    wanted = Mixed()
    for found in (recorded, recorded, again):
        made = found.make([found.model.own, found.model.seen])
        assert torch.equal(made[id(found.model.own)], wanted.own)


def test_shared_parameters_stay_one_and_attributes_of_parameters_stay():
    def tied():
        model = Mixed()
        model.embed.weight.kind = "embedding"
        return model

    recorded = record_init(tied, seed=3)
    recorded.fill([recorded.model.embed, recorded.model.head])
    assert recorded.model.embed.weight is recorded.model.head.weight
    assert recorded.model.head.weight.kind == "embedding"


def closure():
    model = nn.Linear(3, 3)
    weight = model.weight
    model.mine = lambda: weight
    return model


def hooked():
    model = nn.Linear(3, 3)
    model.weight.register_hook(lambda grad: grad)
    return model


def own_generator():
    model = nn.Linear(3, 3)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(3))
    return model


def catches():
    model = nn.Linear(3, 3)
    try:
        model.weight.untyped_storage()
    except Exception:
        model.weight.data.zero_()
    return model


def hidden():
    model = nn.Linear(3, 3)
    model.hidden = (torch.randn(3),)
    return model


def by_numpy():
    model = nn.Linear(3, 3)
    model.weight.data.numpy().fill(2.0)
    return model


@pytest.mark.parametrize("model_init", [closure, hooked, own_generator, catches, hidden, by_numpy])
def test_what_cannot_be_recorded_is_built_for_real(model_init, caplog):
    wanted, end = plain(model_init)
    with caplog.at_level(logging.INFO):
        recorded = record_init(model_init, seed=3)
    assert recorded.reason is not None
    assert "the model is built for real" in caplog.text
    recorded.fill([recorded.model])
    assert torch.equal(torch.get_rng_state(), end)
    assert_same(tensors(recorded.model), tensors(wanted))


def test_pythons_and_numpys_numbers_are_drawn_once():
    import random

    import numpy

    def model_init():
        model = closure()
        model.bias.data.fill_(random.random() + numpy.random.rand())
        return model

    values = []
    for build in (model_init, lambda: record_init(model_init).model):
        random.seed(1)
        numpy.random.seed(1)
        values.append(build().bias[0].item())
    assert values[0] == values[1]


def test_only_what_is_wanted_is_kept():
    def model_init():
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))

    recorded = record_init(model_init, seed=0)
    tape = recorded._record._tape
    assert isinstance(tape, Tape)
    work = tape.plan({0})
    alive, most = set(), 0
    for number in sorted(work.frees):
        alive |= tape.entries[number].writes
        most = max(most, len(alive))
        alive -= work.frees[number]
    assert most <= 2
    assert not alive


def test_clear_errors():
    with pytest.raises(SplitError, match="must return a torch.nn.Module, it returned a int"):
        record_init(lambda: 3)
    with pytest.raises(SplitError, match="leaves weight, bias on the meta device"):
        record_init(lambda: nn.Linear(2, 2, device="meta"))
    with pytest.raises(ZeroDivisionError):
        record_init(lambda: 1 / 0)


def test_the_seed_of_the_start_again_behind_any_draw():
    def again():
        first = nn.Linear(2, 2)
        torch.manual_seed(3)  # the number of the entry that drew last, too
        return nn.Sequential(first, nn.Linear(2, 2))

    torch.manual_seed(3)
    whole, recorded = again(), record_init(again, seed=3)
    recorded.fill([recorded.model])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), recorded.model.parameters(), strict=True))


def test_statistics_that_a_first_forward_leaves():
    def warm():
        norm = nn.BatchNorm1d(3)
        norm(torch.randn(5, 3))
        return norm

    torch.manual_seed(0)
    whole, recorded = warm(), record_init(warm, seed=0)
    recorded.fill([recorded.model])
    assert torch.equal(whole.running_mean, recorded.model.running_mean)
    assert torch.equal(whole.running_var, recorded.model.running_var)


def test_a_buffer_of_a_class_of_its_own_keeps_it():
    class Marked(torch.Tensor):
        pass

    def marked():
        layer = nn.Linear(2, 2)
        layer.register_buffer("mark", torch.randn(3).as_subclass(Marked))
        return layer

    recorded = record_init(marked, seed=0)
    assert "Marked" in recorded.reason
    assert type(recorded.model.mark) is Marked
