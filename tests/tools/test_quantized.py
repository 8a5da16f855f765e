"""Linear layers of another package, here a stand-in for it: what is replaced, with what, where."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchdistpackage.tools import quantized


class Linear8bitLt(nn.Linear):
    def __init__(self, in_features, out_features, bias, **options):
        super().__init__(in_features, out_features, bias)
        self.options = options


class QuantizedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear


class Scaled(nn.Linear):
    """Computes something else than a linear layer."""


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.ModuleDict({"fc": nn.Linear(4, 2).half()}), Scaled(2, 2))


def test_bitsandbytes_gets_weights_types_and_options(monkeypatch, model):
    monkeypatch.setattr(quantized, "bnb", SimpleNamespace(nn=SimpleNamespace(Linear8bitLt=Linear8bitLt)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert quantized._by_bnb(model, {"threshold": 3.0}) is model
    assert [type(model[0]), type(model[1]["fc"]), type(model[2])] == [Linear8bitLt, Linear8bitLt, Scaled]
    assert model[0].options == {"threshold": 3.0}
    assert model[0].bias is None
    assert model[1]["fc"].weight.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert quantized._by_bnb(nn.Sequential(nn.Linear(2, 2)))[0].options["has_fp16_weights"] is False


def test_bminf_gets_the_layers_themselves(monkeypatch, model):
    monkeypatch.setattr(quantized, "bminf", SimpleNamespace(QuantizedLinear=QuantizedLinear))
    first = model[0]
    quantized._by_bminf(model)
    assert model[0].linear is first
    assert isinstance(model[1]["fc"], QuantizedLinear)
    assert type(model[2]) is Scaled


def test_without_a_package_there_is_no_function():
    assert quantized._package("surely_not_installed") is None
