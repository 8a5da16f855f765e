"""Linear layers of other packages, stand-ins of which can be imported here: what is replaced, with what, where."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from torchdistpackage.tools import quantized

BITSANDBYTES = """
from types import SimpleNamespace
from torch import nn as torch_nn

class Linear8bitLt(torch_nn.Linear):
    def __init__(self, in_features, out_features, bias, **options):
        super().__init__(in_features, out_features, bias)
        self.options = options

nn = SimpleNamespace(Linear8bitLt=Linear8bitLt)
"""
BMINF = """
from torch import nn

class QuantizedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
"""


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """The module, imported anew where both packages can be."""
    for name, source in (("bitsandbytes", BITSANDBYTES), ("bminf", BMINF)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("quantized_with_packages", quantized.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("bitsandbytes", "bminf"):
        del sys.modules[name]


class Scaled(nn.Linear):
    """Computes something else than a linear layer."""


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.ModuleDict({"fc": nn.Linear(4, 2).half()}), Scaled(2, 2))


def test_bitsandbytes_gets_weights_types_and_options(tools, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tools.replace_linear_by_bnb(model, {"threshold": 3.0}) is model
    assert [type(layer).__name__ for layer in (model[0], model[1]["fc"], model[2])] == ["Linear8bitLt"] * 2 + ["Scaled"]
    assert model[0].options == {"threshold": 3.0}
    assert model[0].bias is None
    assert model[1]["fc"].weight.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tools.replace_linear_by_bnb(nn.Sequential(nn.Linear(2, 2)))[0].options["has_fp16_weights"] is False


def test_bminf_gets_the_layers_themselves(tools, model):
    first = model[0]
    tools.replace_linear_by_bminf(model)
    assert model[0].linear is first
    assert type(model[1]["fc"]).__name__ == "QuantizedLinear"
    assert type(model[2]) is Scaled


def test_without_a_package_there_is_no_function():
    assert quantized._package("surely_not_installed") is None
