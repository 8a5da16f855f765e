"""Who made the first NaN or Inf: module, parameter, operation or nobody in the model."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage.errors import NonFiniteError
from torchdistpackage.tools import find_nan

X = torch.ones(2, 4)


class Apply(nn.Module):
    def __init__(self, function, *inner):
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(inner)

    def forward(self, x):
        x = self.function(x)
        for module in self.inner:
            x = module(x)
        return x


def caught(model, x=X, loss=torch.sum, **more):
    with find_nan(model, raise_error=False, **more) as finder:
        output = model(x)
        if output.requires_grad:
            loss(output).backward()
    return finder.found


def net(*middle):
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(*middle), nn.ReLU(inplace=True), nn.Linear(4, 3))


def test_a_healthy_model_trains_as_ever_and_keeps_no_hook():
    model = net(nn.ReLU(inplace=True), nn.LayerNorm(4))
    model(X).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert caught(model) == []
    assert all(map(torch.equal, expected, (parameter.grad for parameter in model.parameters())))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_first_module_is_named_with_all_around_it():
    model = net(Apply(torch.exp, nn.Softplus(), Apply(lambda x: (x - x.max() - 1).log())))
    with find_nan(model), pytest.raises(NonFiniteError) as raised:
        model(X)
    assert raised.value.module == "1.0.inner.1"
    assert "NaN in the output of 1.0.inner.1 (Apply), inside 1.0 (Apply) < 1 (Sequential)" in str(raised.value)
    assert "8 NaN and 0 Inf in 8 elements, shape (2, 4), float32, the first at (0, 0)" in str(raised.value)
    assert isinstance(raised.value, FloatingPointError)


def test_the_first_is_named_and_not_who_passes_it_on():
    (found,) = caught(net(Apply(lambda x: x.abs() / 0), nn.Softplus(), nn.Identity()))
    assert (found.module, found.trouble, found.phase) == ("1.0", "Inf", "forward")


def test_code_between_modules_belongs_to_the_one_around_them():
    (found,) = caught(net(Apply(lambda x: x * math.nan, nn.Linear(4, 4))))
    assert (found.module, found.trouble) == ("1.0", "NaN")
    assert "what 1.0 (Apply) computes before it calls 1.0.inner.0 (Linear)" in found.what


def test_what_works_in_place_is_no_excuse():
    (found,) = caught(net(Apply(lambda x: x.abs_().neg_().sub_(1).log_())))
    assert (found.module, found.trouble) == ("1.0", "NaN")


def test_a_bad_parameter_is_named_instead_of_its_module():
    model = net(nn.Linear(4, 4))
    with torch.no_grad():
        model[1][0].weight[2, 1] = math.inf
    (found,) = caught(model)
    assert (found.parameter, found.count.inf, found.count.first) == ("1.0.weight", 1, (2, 1))
    assert "it was so before this call" in str(found)


def test_masks_are_nobodys_fault_but_a_nan_made_of_them_is():
    class Attention(nn.Module):
        def forward(self, scores, mask):
            return (scores + mask).softmax(-1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x, torch.full((4,), -math.inf).where(x > 0, 0.0))

    assert caught(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.ones(1, 3, 4)) == []
    assert caught(Net(), -X) == []
    (found,) = caught(Net(), X)
    assert (found.module, found.trouble) == ("attention", "NaN")
    assert "its inputs held Inf already" in found.advice


def test_bad_inputs_and_losses_come_from_outside():
    bad = X.clone()
    bad[1, 2] = math.nan
    (found,) = caught(net(), bad)
    assert (found.module, found.count.first) == (None, (1, 2))
    assert caught(net(), bad, check_inputs=False) == []
    (found,) = caught(net(), loss=lambda output: output.sum() * math.inf)
    assert (found.module, found.phase, found.trouble) == (None, "backward", "Inf")
    assert caught(net(), loss=lambda output: output.sum() * math.inf, inf=False) == []


def test_backward_the_operation_and_its_module_are_named():
    (found,) = caught(net(Apply(lambda x: x + (x * 0).abs().sqrt())))
    assert (found.module, found.operation, found.phase) == ("1.0", "SqrtBackward0", "backward")


def test_the_gradient_of_a_parameter_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.scale.sqrt()

    (found,) = caught(nn.Sequential(Root()))
    assert (found.module, found.parameter, found.operation) == ("0", "0.scale", "SqrtBackward0")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_are_looked_at_again(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    calls = []

    def second(x):
        calls.append(1)
        return x * (math.nan if len(calls) > 1 else 1.0)

    found = caught(net(Checkpointed(nn.Sequential(nn.Linear(4, 4), Apply(second), nn.Linear(4, 4)))))[0]
    assert (found.module, found.phase) == ("1.0.inner.1", "forward, recomputed")
    assert found.inside == ("1.0.inner (Sequential)", "1.0 (Checkpointed)", "1 (Sequential)", "root (Sequential)")


def test_findings_are_logged_and_the_next_pass_starts_anew(caplog):
    model = net()
    with find_nan(model, raise_error=False) as finder:
        for scale in (1.0, math.nan, 1.0, math.nan):
            model(X * scale).sum().backward()
    assert len(finder.found) == len(caplog.messages) == 2
    assert finder.first is finder.found[0]


def test_nothing_is_said_after_the_end():
    model = net()
    with find_nan(model):
        loss = model(X).sum()
    (loss * math.nan).backward()
    assert find_nan(model).first is None
