"""Times, calls and kept bytes of every module, and nothing left behind."""

import contextlib
import copy
import dataclasses
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage.split.calls import call_cost
from torchdistpackage.tools import ModelProfile, get_model_profile, register_profile_hooks, report_prof

X = torch.ones(8, 4)


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.act, self.fc2 = nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Sleepy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.inner = seconds, nn.Identity()

    def forward(self, x):
        return self.inner(Sleep.apply(x * 2, self.seconds))


def profile(model, *args, **more):
    return get_model_profile(model, args or (X,), **{"repeats": 1, **more})


def test_kept_is_what_autograd_keeps_and_own_parts_add_up():
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.ReLU(inplace=True), nn.Linear(4, 3))
    found = profile(model)
    assert found["root"].kept == call_cost(model, (X,), timed=False, input_gradients="required").activation_bytes
    for whole, own in (("kept", "kept_self"), ("forward", "forward_self")):
        assert sum(getattr(cost, own) for cost in found.values()) == pytest.approx(getattr(found["root"], whole))


@pytest.mark.parametrize("reentrant", [False, True])
def test_freed_is_what_a_checkpoint_frees(reentrant):
    x = X.clone().requires_grad_()
    first, block, last = nn.Linear(4, 4), Block(), nn.Linear(4, 3)
    plain = profile(nn.Sequential(first, block, last), x)
    model = nn.Sequential(first, Checkpointed(block, reentrant), last)
    again = profile(model, x, backward=True)
    assert plain["1"].freed == plain["root"].kept - again["root"].kept > 0
    assert plain["0"].freed == plain["2"].freed == 0  # a Linear keeps its input, which a checkpoint keeps as well
    assert again["1.inner.fc1"].calls == 1  # the second time is part of the way back
    assert again["1.inner.fc1"].backward > 0


def test_what_several_modules_save_counts_once_and_is_freed_around_them():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.q, self.k = nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.act(x)
            return self.q(y) + self.k(y)

    found = profile(Fork())
    assert [found[name].kept for name in ("root", "act", "q", "k")] == [128, 0, 128, 0]  # act needs no gradient
    found = profile(Fork(), X.clone().requires_grad_())
    assert [found[name].kept for name in ("root", "act", "q", "k")] == [128, 128, 0, 0]
    assert [found[name].freed for name in ("root", "act")] == [128, 0]


def test_times_are_those_of_the_module_that_spends_them():
    found = profile(nn.Sequential(Sleepy(0.02), nn.Sequential(Sleepy(0.04))), X.clone().requires_grad_(), backward=True)
    assert 0.02 <= found["0"].forward_self < found["root"].forward
    assert 0.04 <= found["1.0"].forward_self <= found["1"].forward
    assert 0.04 <= found["0"].backward_self < found["root"].backward
    assert 0.08 <= found["1.0"].backward_self <= found["1"].backward
    others = [found[name] for name in ("root", "0.inner", "1", "1.0.inner")]
    assert sum(cost.forward_self + cost.backward_self for cost in others) < 0.18  # which the two sleep
    assert found["root"].backward == pytest.approx(sum(cost.backward_self for cost in found.values()))


def test_shared_modules_add_up_and_idle_ones_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.again, self.blocks = self.fc, nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.blocks[0](self.again(self.fc(x)))

    found = profile(Net(), min_mem=0)
    assert (found["fc"].calls, found["fc"].parameters, found["fc"].output) == (2, 20, 256)
    assert "again" not in found
    assert (found["heads.0"].calls, found["heads.0"].forward) == (0, 0)
    assert "never called as modules: heads\n" in str(found)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: dict


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, *, scale):
        codes = torch.ones(5, dtype=torch.int8)
        return Output(self.fc(x) * scale, {"codes": codes, "flags": [codes.bool(), None], "half": codes.half()})


def test_any_output_and_keywords_and_every_dtypes_size():
    found = profile(Odd(), X, kwargs={"scale": 2.0}, backward=True)
    assert found["root"].output == 8 * 2 * 4 + 5 + 5 + 10
    assert found["fc"].backward > 0


def test_without_gradients_nothing_is_kept_and_times_are_shown():
    with torch.no_grad():
        found = profile(nn.Sequential(nn.Linear(4, 4), Sleepy(0.01)), backward=True)
    assert (found["root"].kept, found["root"].backward) == (0, 0)
    rows = str(found).splitlines()
    assert [row.split()[0] for row in rows[4:7]] == ["level", "1", "0"]
    assert rows[-1].startswith("nothing is kept")


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.ReLU(inplace=True))
    model[1].eval()
    model(X).sum().backward()
    before, state, inputs = copy.deepcopy(model.state_dict()), torch.get_rng_state(), X.clone()
    gradient, others = model[2].weight.grad, (random.getstate(), np.random.get_state()[1].copy())
    profile(model, backward=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, inputs)
    assert model[2].weight.grad is gradient
    assert (random.getstate(), list(np.random.get_state()[1])) == (others[0], list(others[1]))
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_works_in_place_gets_a_copy():
    x = X.clone() - 2
    profile(nn.Sequential(nn.ReLU(inplace=True)), x)
    assert torch.equal(x, X - 2)


def test_an_error_passes_with_the_module_named_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        profile(model)
    assert getattr(caught.value, "__notes__", ["1.0 (Linear)"])[0].endswith("1.0 (Linear)")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1) or tensor, lambda tensor: tensor):
        X.clone().requires_grad_().exp()
    assert kept  # the profile's own hooks for saved tensors are not in the way


@pytest.mark.parametrize(
    ("model", "args", "error", "told"),
    [
        (nn.Linear(4, 4, device="meta"), (X,), ValueError, "weight is on the meta device.*to_empty"),
        (nn.Linear(4, 4), (X.to("meta"),), ValueError, "an argument is on the meta device"),
        (nn.LazyLinear(4), (X,), ValueError, "not initialised yet: run the model once"),
        (nn.Linear(4, 4), {"x": X}, TypeError, "kwargs=batch"),
    ],
)
def test_what_cannot_be_profiled_is_refused(model, args, error, told):
    with pytest.raises(error, match=told):
        get_model_profile(model, args)
    with pytest.raises(ValueError, match="repeats must be 1 or more"):
        get_model_profile(nn.Linear(4, 4), X, repeats=0)


def test_compiled_modules_are_one_row_or_part_of_the_one_around():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(torch.compile(copy.deepcopy(inner), backend="eager"), copy.deepcopy(inner))
    model[1].compile(backend="eager")
    assert list(profile(model)) == ["root", "0"]
    with pytest.raises(ValueError, match=r"compiled in place.*torch\.compile"):
        profile(model[1])


def test_hooks_follow_a_loop_of_ones_own_until_they_are_removed():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    expected = copy.deepcopy(model)
    infos, own = register_profile_hooks(model), {}
    assert register_profile_hooks(model, own) is own
    for _ in range(2):
        model(X).sum().backward()
        expected(X).sum().backward()
    assert infos["0"].calls == own["0"].calls == 1  # of the last pass
    assert infos["root"].backward > infos["1"].backward > 0
    assert torch.equal(model[0].weight.grad, expected[0].weight.grad)
    infos.remove()
    before = dict(infos)
    model(X)
    assert dict(infos) == before


def test_hooks_outlive_failed_passes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    infos = register_profile_hooks(model)
    for bad in (torch.ones(2, 3), torch.ones(2, 5)):
        with contextlib.suppress(RuntimeError):
            model(bad)
    model(X)
    assert (infos["1"].calls, infos["root"].kept) == (1, 256)


def test_autograd_works_as_ever_under_the_hooks():
    class Cube(nn.Module):
        def forward(self, x):
            y = x**3
            self.saved = y.exp()  # saves its output
            return self.saved

    model, x = Cube(), torch.tensor([0.5], requires_grad=True)
    with contextlib.closing(_Hooks(model)):
        first = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x)[0]
        model(x)
        model.saved.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified in place after it was saved"):
            model.saved.sum().backward()
    plain = torch.autograd.grad(torch.autograd.grad((x**3).exp().sum(), x, create_graph=True)[0].sum(), x)[0]
    assert torch.equal(second, plain)


class _Hooks:
    def __init__(self, model):
        self.close = register_profile_hooks(model).remove


def test_report_prints_what_it_returns(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.Sequential(nn.GELU())))
    found = get_model_profile(model, X, min_mem=0)
    assert capsys.readouterr().out == f"{found}\n"
    assert isinstance(found, ModelProfile)
    assert "modules: " not in str(found)
    report_prof(found, min_mem=1)
    assert "(5 of 5 keep less than min_mem=1 MB: 0.000256 MB at most)" in capsys.readouterr().out
    report_prof(found, topn=1, min_mem=0)
    assert "level 1 (1 of 5, by topn=1 and min_mem=0 MB)" in capsys.readouterr().out
    report_prof(found, max_depth=0)
    assert "level 1 is not shown: max_depth=0" in capsys.readouterr().out


def test_wrong_arguments_are_said():
    from torchdistpackage.tools import find_nan, fix_rand, replace_all_module, report_prof

    for wrong in (lambda: get_model_profile("x"), lambda: register_profile_hooks(3), lambda: find_nan(3)):
        with pytest.raises(TypeError, match="model must be an nn.Module, got"):
            wrong()
    with pytest.raises(TypeError, match="functions of"):
        replace_all_module(nn.ReLU(), 3, 4)
    with pytest.raises(TypeError, match="whole numbers, got 1.5 and 2222"):
        fix_rand(1.5)
    with pytest.raises(ValueError, match="nothing was measured: run the model"):
        report_prof({})
