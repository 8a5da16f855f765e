"""What Python does in real forwards: the stages compute the same, or there is one clear refusal."""

import copy
import enum
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from traced_comparison import needs_export_of_vmap
from traced_training import assert_trains, loss_of

from torchdistpackage.errors import SplitError
from torchdistpackage.split import split


class Color(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    first: object
    second: object


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))


class Around(nn.Module):
    """The module in question between two layers: where it cannot be cut it stays whole."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), inner, nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


# --- What a recording cannot repeat: alone refused, inside of a model whole -------------------------------------------


class SetsBuffer(Three):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.b(self.a(x)) - self.mean


class Counts(Three):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x)) * self.calls


class KeepsList(Three):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[1])
        return self.b(self.a(x)) * len(self.seen)


class Draws(Three):
    def forward(self, x):
        return self.b(self.a(x)) * random.random()


class Seeds(Three):
    def forward(self, x):
        torch.manual_seed(3)
        return self.b(self.a(x)) + torch.rand_like(x)


class Catches(Three):
    def forward(self, x):
        x = self.a(x)
        try:
            x = x.view(-1, 2, 6).flatten(0, 1) * 2
        except RuntimeError:
            x = x * 3
        return self.b(x)


class HooksGradients(Three):
    def forward(self, x):
        x, scale = self.a(x), self.c(x).detach().mean()
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * scale)
        return self.b(x)


UNREPEATABLE = [SetsBuffer, Counts, KeepsList, Draws, Seeds, Catches, HooksGradients]


@pytest.mark.parametrize("kind", UNREPEATABLE)
def test_what_no_stage_would_repeat_is_refused(kind):
    with pytest.raises(SplitError, match=rf"forward of {kind.__name__} cannot be recorded.*test_traced_python.py:\d+"):
        split(kind(), torch.randn(3, 6), 2, costs="flops")


@pytest.mark.parametrize("opened", [(), ("inner",)])
@pytest.mark.parametrize("kind", UNREPEATABLE)
def test_and_stays_whole_inside_of_a_model(kind, opened):
    torch.manual_seed(0)
    model = Around(kind())
    reference, state = copy.deepcopy(model), random.getstate()
    pipe = split(model, torch.randn(3, 6), 3, costs="flops", open_modules=opened)
    assert random.getstate() == state
    assert vars(model.inner).get("calls", 0) == 0
    assert not vars(model.inner).get("seen")
    for rows in (3, 6):
        check_step(model, reference, pipe, torch.randn(rows, 6))


def check_step(model, reference, pipe, *args):
    results = []
    for each, run in ((model, pipe), (reference, reference)):
        each.zero_grad()
        torch.manual_seed(1), random.seed(1)
        output = run(*copy.deepcopy(args))
        loss_of(output).backward()
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        results.append([*tensors, *(p.grad for p in each.parameters() if p.grad is not None), *each.buffers()])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- What works -------------------------------------------------------------------------------------------------------


class AddsInPlaceWithoutGradients(Three):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        with torch.no_grad():
            self.count += 1
        return self.c(self.b(self.a(x * self.count)))


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return Pair(self.linear(x), None), Color.RED, True, torch.float32


class Identity(nn.Module):
    """Asks for identity and types of what modules return."""

    def __init__(self):
        super().__init__()
        self.answers, self.last = Answers(), nn.Linear(6, 6)

    def forward(self, x):
        pair, color, flag, dtype = self.answers(x)
        x = pair.first
        x = x * 2 if pair.second is None else x
        x = x * 3 if color is Color.RED and flag is True and dtype is torch.float32 else x
        x = x * 5 if type(pair) is Pair and type(x) is torch.Tensor and x.dtype is torch.float32 else x
        return self.last(x) * (7 if callable(x) else 1)


class OwnParameters(Three):
    """What is computed from parameters that Python has collected."""

    def forward(self, x):
        norm = sum(p.square().sum() for p in self.parameters())
        return self.c(self.b(self.a(x))) / norm + next(self.buffers(), 0)


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, found, table):
        found.append(x * 2)
        table["last"] = x
        return self.linear(x)


class WritesIntoLists(nn.Module):
    """Whole modules append to a list and a dict of the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Writer(), Writer()

    def forward(self, x):
        found, table = [], {}
        x = self.b(self.a(x, found, table), found, table)
        return x + sum(found) * len(found) + table["last"]


class HooksItsTensor(Three):
    def forward(self, x):
        x = self.a(x)
        x.register_hook(lambda gradient: gradient * 3)
        return self.c(x + self.b(x))


class Checkpoints(Three):
    """Functions that hold values and modules."""

    def forward(self, x):
        y = self.a(x)
        return self.c(checkpoint(lambda u: self.b(u) * y, x, use_reentrant=False))


class Reentrant(Three):
    def forward(self, x):
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))


class Inference(Three):
    def forward(self, x):
        with torch.inference_mode():
            y = self.b(x)
        return self.c(self.a(x)) + y.clone()


class Many(Three):
    def forward(self, *xs):
        half, rest = divmod(xs[0].shape[1], 4)
        return self.c(self.b(sum(self.a(x) for x in xs))) * half + rest


class Momentum(Three):
    """A second network that follows the first one, changed by the forward."""

    def forward(self, x):
        with torch.no_grad():
            for mine, theirs in zip(self.a.parameters(), self.b.parameters(), strict=True):
                theirs.mul_(0.9).add_(mine, alpha=0.1)
            y = self.b(x)
        return self.c(self.a(x)) * y


WORKING = [
    AddsInPlaceWithoutGradients,
    Identity,
    OwnParameters,
    WritesIntoLists,
    HooksItsTensor,
    Checkpoints,
    Reentrant,
    Inference,
    Many,
    Momentum,
]


@pytest.mark.parametrize("kind", WORKING)
def test_the_stages_are_the_model(kind):
    torch.manual_seed(0)
    model = kind()
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    args = [torch.randn(3, 6)] * (2 if kind is Many else 1)
    pipe = split(model, tuple(args), 2, costs="time", repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for rows in (3, 1, 4):
        check_step(model, reference, pipe, *[torch.randn(rows, 6) for _ in args])
    held = {id(p) for index in range(2) for p in pipe.get_stage_module(index).parameters()}
    assert all(id(p) in held for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", [HooksItsTensor, Many, Identity, WritesIntoLists])
def test_through_the_runtime(kind):
    torch.manual_seed(0)
    model = kind()
    args = [torch.randn(8, 6) for _ in range(2 if kind is Many else 1)]
    reference = copy.deepcopy(model)
    assert_trains(model, reference, split(model, tuple(args), 4, costs="flops"), "zb-v", args, exact=False)


def test_no_cut_between_the_calls_of_a_module_that_counts():
    model = nn.Sequential(*[Counts()] * 2, nn.Linear(6, 6))
    with pytest.raises(SplitError, match="called several times"):
        split(model, torch.randn(3, 6), 2, costs="flops", sizes=[1, 2])
    assert split(model, torch.randn(3, 6), 2, costs="flops").num_stages == 2


def test_what_belongs_to_the_whole_model_or_has_no_shape_is_refused():
    model = Around(nn.ReLU())
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(SplitError, match="Around itself has hooks"):
        split(model, torch.randn(3, 6), 2, costs="flops")
    with pytest.raises(SplitError, match="inner.weight has no shape yet"):
        split(Around(nn.LazyLinear(6)), torch.randn(3, 6), 2, costs="flops")


class Branches(Three):
    def forward(self, x):
        x = torch.func.vmap(lambda row: row * torch.linalg.vector_norm(row))(self.a(x))
        return self.c(self.b(x if x.shape[0] % 2 else x * 2))


def test_a_branch_that_the_export_has_taken_is_checked():
    needs_export_of_vmap()
    pipe = split(Branches(), torch.randn(3, 6), 2, costs="flops")
    assert pipe(torch.randn(5, 6)).shape == (5, 6)
    with pytest.raises(SplitError, match="another way"):
        pipe(torch.randn(4, 6))


def test_a_device_context_works_after_the_first_one_was_within_a_recording():
    program = """
import torch
from torch import nn
from torchdistpackage.split import split

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        with torch.device("cpu"):
            return self.last(self.first(x) + torch.zeros(2))

split(Net(), torch.ones(1, 2), 2)
with torch.device("meta"):
    assert torch.tensor([]).is_meta
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
