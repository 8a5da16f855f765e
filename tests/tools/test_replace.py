"""Modules are swapped everywhere, once, and what was shared stays shared."""

import pytest
import torch
from torch import nn

from torchdistpackage.tools import quantized, replace_all_module


def is_linear(name, module):
    return isinstance(module, nn.Linear)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


def test_every_place_is_found_and_the_model_comes_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)])}), nn.ReLU())
    assert replace_all_module(model, is_linear, lambda name, module: Wrapped(module)) is model
    assert isinstance(model[0], Wrapped)
    assert isinstance(model[1]["a"][0].inner, nn.Linear)  # what is put there is not searched
    assert isinstance(model[2], nn.ReLU)


def test_names_are_those_in_the_parent():
    asked = []
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    replace_all_module(model, lambda name, module: asked.append(name), lambda name, module: module)
    assert asked == ["0", "0", "1"]


def test_shared_modules_stay_shared():
    model = nn.Module()
    model.first = model.second = nn.Linear(2, 2)
    model.block = nn.Sequential(model.first)
    made = []
    replace_all_module(model, is_linear, lambda name, module: made.append(nn.Linear(2, 2)) or made[-1])
    assert model.first is model.second is model.block[0] is made[0]
    assert len(made) == 1


def test_new_modules_get_the_training_flag():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].eval()
    replace_all_module(model, is_linear, lambda name, module: nn.Sequential(nn.Dropout()))
    assert [module.training for module in model.modules()] == [True, True, True, False, False]


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"got NoneType for '0' \(Linear\)"):
        replace_all_module(nn.Sequential(nn.Linear(2, 2)), is_linear, lambda name, module: None)


def test_optional_packages_are_none_where_they_are_missing():
    for package, function in (
        (quantized.bnb, quantized.replace_linear_by_bnb),
        (quantized.bminf, quantized.replace_linear_by_bminf),
    ):
        assert (function is None) == (package is None)


@pytest.mark.skipif(quantized.bnb is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_layers_have_the_old_weights():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, bias=False))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    assert quantized.replace_linear_by_bnb(model, {"has_fp16_weights": True}) is model
    assert torch.equal(model[0].weight.float(), weight)
    assert torch.equal(model[0].bias.float(), bias)
    assert model[1].bias is None
