"""NaN and Inf in values of every kind and type."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchdistpackage.tools import bwd_hook_wrapper, check_model_params, check_tensors, fwd_hook_wrapper
from torchdistpackage.tools.finite import Trouble, trouble_in
from torchdistpackage.tools.values import num_bytes, tensors_in

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_tells_nan_from_inf(dtype):
    values = {Trouble.NONE: [1.0, -2.0], Trouble.INF: [1.0, -math.inf], Trouble.NAN: [math.inf, math.nan]}
    for trouble, value in values.items():
        tensor = torch.tensor(value).to(dtype)
        assert trouble_in([torch.zeros(3), tensor]) is trouble
        assert check_tensors(tensor) == (trouble is Trouble.NONE)


def test_what_holds_no_floats_is_finite():
    for value in (
        torch.tensor([2**62]),
        torch.tensor([True]),
        torch.empty(0),
        torch.empty(2, device="meta"),
        None,
        "x",
    ):
        assert check_tensors(value)
    assert check_tensors(torch.tensor([1e308], dtype=torch.float64))  # too large for float32, but finite


def test_containers_are_searched():
    bad = torch.tensor([1.0, math.nan])
    for value in (
        [{"a": (bad,)}],
        {1, bad},
        SimpleNamespace(sample=bad),
        bad.to_sparse(),
        torch.diag(bad).to_sparse_csr(),
    ):
        assert not check_tensors(value)
    loop = [bad]
    loop.append(loop)
    assert len(tensors_in(loop)) == 1


def test_bytes_count_each_tensor_once_and_views_as_shown():
    x = torch.zeros(4, 4, dtype=torch.bfloat16)
    assert num_bytes([x, x]) == 32
    assert num_bytes([x[:2], x.expand(3, 4, 4)]) == 16 + 96
    assert num_bytes([torch.eye(3).to_sparse()]) == 3 * 4 + 2 * 3 * 8


def test_bad_parameters_are_named(caplog):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert check_model_params(model) is True
    with torch.no_grad():
        model[1].bias[0] = math.inf
    assert check_model_params(model) is False
    assert caplog.messages == ["parameter 1.bias holds Inf"]


def test_hooks_warn_with_the_modules_name(caplog, capsys):
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(fwd_hook_wrapper("blocks.0.fc"))
    layer.register_full_backward_hook(bwd_hook_wrapper("blocks.0.fc"))
    with caplog.at_level(logging.WARNING):
        layer(torch.ones(1, 2)).sum().backward()
        assert caplog.messages == []
        x = torch.tensor([[1.0, math.nan]], requires_grad=True)
        (layer(x) * math.inf).sum().backward()
    told = ["input", "output", "grad_output", "grad_input"]
    assert [message.split(" of blocks.0.fc holds ")[0] for message in caplog.messages] == told
    assert capsys.readouterr() == ("", "")
