"""torch.profiler's place in the profile: modules in the trace, operations below the table."""

import contextlib
import copy
import gzip
import json
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.checkpoint import checkpoint

from torchdistpackage.tools import get_model_profile, register_profile_hooks, report_prof

X = torch.ones(8, 4)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def network(reentrant=False):
    Again.reentrant = reentrant
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Again())


def slices(path):
    """What lasts a while in a trace, the first first."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X" and event["cat"] != "Trace"]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def inside(found, name):
    """The names of what happens during a slice that occurs once."""
    (outer,) = [event for event in found if event["name"] == name]
    end = outer["ts"] + outer["dur"]
    return [event["name"] for event in found if outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end][1:]


def cut(found):
    """Pairs of which one begins in the other and ends after it."""
    pairs, around = [], []
    for event in found:
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        if around and event["ts"] + event["dur"] > around[-1]["ts"] + around[-1]["dur"] + 1e-3:
            pairs.append((around[-1]["name"], event["name"]))
        around.append(event)
    return pairs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_names_modules_inside_each_other(tmp_path, name, reentrant):
    get_model_profile(network(reentrant), X.clone().requires_grad_(), backward=True, repeats=1, trace=tmp_path / name)
    found = slices(tmp_path / name)
    modules = {event["name"] for event in found if event["cat"] == "user_annotation"}
    assert {"root", "0", "1.1", "2", "1.0 (backward)", "2.inner.0"} <= modules
    assert "1.0" in inside(found, "root")
    assert [op for op in inside(found, "1") if op in ("1.0", "aten::addmm", "1.1", "aten::relu", "2", "0")] == [
        *("1.0", "aten::addmm", "1.1", "aten::relu")
    ]
    assert "ReluBackward0" in inside(found, "1.1 (backward)")
    assert not cut(found)


def test_operations_are_a_table_below_the_modules(capsys):
    found = get_model_profile(network(), X, backward=True, repeats=1, operations=True, topn=-1)
    assert capsys.readouterr().out == f"{found}\n"
    assert str(found).endswith(found.operations)
    names = [line.split()[0] for line in found.operations.splitlines() if "%" in line]
    assert {"aten::addmm", "aten::tanh", "AddmmBackward0"} <= set(names)
    assert not {"root", "0", "1.0", "(backward)"} & set(names)
    assert report_prof(found, max_depth=0).operations == found.operations
    short = get_model_profile(network(), X, repeats=1, operations=True, topn=2).operations
    rows = [line.split() for line in short.splitlines() if line.count("%") == 2]
    shares = [float(row[1].rstrip("%")) for row in rows[1:]]
    assert len(shares) == 2
    assert shares[0] >= shares[1] > 0
    assert get_model_profile(network(), X, repeats=1).operations is None


def test_the_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    get_model_profile(model, X, backward=True, repeats=1, trace=str(tmp_path / "trace.json"), operations=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model[2].weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.autograd._profiler_enabled()


class Untouched(nn.Module):
    def forward(self, x):
        raise AssertionError("the model ran")


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for path, error, told in (
        (tmp_path / "no" / "trace.json", FileNotFoundError, "no folder .*no, create it"),
        (tmp_path / "trace.txt", ValueError, r"end in \.json or \.json\.gz"),
        (tmp_path / "folder.json", ValueError, "which is a folder"),
        ("/proc/self/trace.json", PermissionError, "folder /proc/self is not writable"),
    ):
        if not str(path).startswith("/proc") or sys.platform == "linux":
            with pytest.raises(error, match=told):
                get_model_profile(Untouched(), X, trace=path)
    with torch_profile(activities=[ProfilerActivity.CPU]), pytest.raises(RuntimeError, match="profiler runs already"):
        get_model_profile(Untouched(), X, operations=True)


def test_a_model_that_fails_leaves_no_profiler_and_no_file(tmp_path):
    class Fails(nn.Module):
        def forward(self, x):
            if torch.autograd._profiler_enabled():
                raise KeyError("now")
            return x * 2

    with pytest.raises(KeyError):
        get_model_profile(nn.Sequential(Fails()), X, repeats=1, trace=tmp_path / "trace.json")
    assert not torch.autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())


def test_hooks_name_modules_in_a_trace_of_ones_own(tmp_path):
    model = network()
    infos = register_profile_hooks(model)
    with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(X).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "own.json"))
    assert "aten::addmm" in inside(slices(tmp_path / "own.json"), "1.0")
    assert {"root", "1.0 (backward)"} <= {average.key for average in profiler.key_averages()}
    assert infos["1.0"].backward > 0
    infos.remove()
    with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(X).sum().backward()
    assert not {"root", "0"} & {average.key for average in profiler.key_averages()}


def test_a_profiler_may_end_inside_a_call_and_a_call_may_fail():
    class Ends(nn.Module):
        def forward(self, x):
            profiler.stop()
            return x * 2

    model = nn.Sequential(nn.Linear(4, 4), Ends(), nn.Linear(4, 4))
    infos, profiler = register_profile_hooks(model), torch_profile(activities=[ProfilerActivity.CPU])
    with profiler, pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 3))
    profiler = torch_profile(activities=[ProfilerActivity.CPU])
    profiler.start()
    model(X).sum().backward()
    assert infos["2"].backward > 0
    assert "0" in {average.key for average in profiler.key_averages()}


def test_a_backward_pass_that_fails_leaves_no_range_open(tmp_path):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError("now")

    class Bad(nn.Module):
        def forward(self, x):
            return Fails.apply(x) if bad else x

    model = nn.Sequential(nn.Linear(4, 4), Bad(), nn.Linear(4, 4))
    infos = register_profile_hooks(model)
    with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
        for bad in (True, False):
            with pytest.raises(KeyError) if bad else contextlib.nullcontext():
                model(X).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "own.json"))
    found = slices(tmp_path / "own.json")
    second = [event["ts"] for event in found if event["name"] == "root"][1]
    assert not cut([event for event in found if event["ts"] > second])
    assert infos["0"].backward > 0


def test_numpy_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert get_model_profile(nn.Linear(4, 4), X, repeats=1)["root"].calls == 1
