"""The split backward: exact for any module, nothing computed twice, nothing held longer than planned."""

import copy
import threading
import weakref
from collections import Counter

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, plain_loop, run_step, stage_functions, stage_inputs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.schedule import build, complete, names, peak_activations
from torchdistpackage.schedule.plan import Plan

WIDTH = 6


class Scale(torch.autograd.Function):
    """A custom function whose backward makes the gradient of its input and of its weight together."""

    calls = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        Scale.calls += 1
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return self.linear(Scale.apply(self.linear(x), self.weight))


class Twice(nn.Module):
    """One layer called twice, one weight used by two functions, and one layer that is used once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.linear(self.a(torch.tanh(self.a(self.b(x)))), self.a.weight.t())


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.calls = reentrant, 0
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def block(self, x):
        self.calls += 1
        return torch.tanh(self.inside(x))

    def forward(self, x):
        return self.outside(checkpoint(self.block, x, use_reentrant=self.reentrant))


class View(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        return self.linear(x).view(-1, WIDTH)[: x.shape[0]]


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.head(self.body(x.view(-1, 1, 2, 3))).flatten(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.position = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        h = self.norm(x + self.position).unsqueeze(1).expand(-1, 3, -1)
        return x + self.attention(h, h, h, need_weights=False)[0].mean(1)


class Hooked(nn.Module):
    """A hook changes the gradient of a layer's output: it must count once, not once in each half."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.linear(x)
        y.register_hook(lambda gradient: gradient * 0.5)
        return y


def normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

        def forward(self, x):
            return self.lstm(x.unsqueeze(1).expand(-1, 2, -1))[0][:, -1]

    return Last()


KINDS = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)),
    "custom": Custom,
    "twice": Twice,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "view": View,
    "frozen": Frozen,
    "all frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "convolution": Convolution,
    "attention": Attention,
    "hooked": Hooked,
    "parametrized": normed,
    "recurrent": recurrent,
    "no parameters": nn.Tanh,
}


def step(plan, stages, x, y):
    results = run_step(plan, stage_functions(stages), stage_inputs(len(stages), x, y))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zb-h1", "zb-h2", "zb-v", "dualpipe-v"])
def test_the_split_is_the_plain_loop_bitwise(kind, name):
    torch.manual_seed(0)
    plan = build(name, 2, 5)
    stages = nn.Sequential(*[KINDS[kind]() for _ in plan.placement.owners])
    stages[0] = nn.Sequential(nn.Linear(WIDTH, WIDTH), stages[0])
    reference = copy.deepcopy(stages)
    x, y = torch.randn(11, WIDTH), torch.randn(11, WIDTH)
    step(plan, stages, x, y)
    plain_loop(reference, x, y, 5)
    assert_same_gradients(stages, reference)


# One rank, so that nothing but the split can differ: two stages, the second one is looked at.
WHOLE = complete(Plan.from_text("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1"))
SPLIT = complete(Plan.from_text("0F0 1F0 0F1 1F1 1I0 0I0 1I1 0I1 1W1 1W0 0W0 0W1"))


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def counted(plan, stages):
    """The calls of each operator in one step."""
    executor = Executor(plan, loopback(1)[0])
    x, y = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    work = [ChunkWork(stages[0], inputs=x), ChunkWork(lambda xs: mse(stages[1](xs[0]), xs[1]), inputs=y)]
    with Count() as count, torch.autograd.set_multithreading_enabled(False):
        result = executor.run(work)
    return count.calls, result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_twice(kind):
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Linear(WIDTH, WIDTH), KINDS[kind]())
    whole, _ = counted(WHOLE, copy.deepcopy(stages))
    split, _ = counted(SPLIT, stages)
    # A convolution's halves are two calls of one operator, each with a mask that says which half.
    more = {"convolution_backward": 4} if kind == "convolution" else {}
    # And the user's hook on a layer's output sees the gradient in both halves.
    more.update({"mul": 2} if kind == "hooked" else {})
    no_arithmetic = {"detach", "alias", "t", "view", "_unsafe_view", "transpose", "as_strided", "full"}
    names = (whole.keys() | split.keys()) - no_arithmetic
    assert {n: split[n] - whole[n] for n in names if split[n] != whole[n]} == more


@pytest.mark.parametrize(("kind", "forwards"), [("checkpoint", 4), ("reentrant checkpoint", 4)])
def test_checkpointing_runs_each_forward_twice_in_all(kind, forwards):
    stages = nn.Sequential(nn.Linear(WIDTH, WIDTH), KINDS[kind]())
    counted(SPLIT, stages)
    assert stages[1].calls == forwards


def test_a_custom_function_runs_its_backward_once_for_each_microbatch():
    Scale.calls = 0
    counted(SPLIT, nn.Sequential(nn.Linear(WIDTH, WIDTH), Custom()))
    assert Scale.calls == 2


def test_what_cannot_be_split_is_counted_with_its_reason(caplog):
    _, result = counted(SPLIT, nn.Sequential(nn.Linear(WIDTH, WIDTH), Checkpointed(True)))
    assert result.unsplit[1][0] == 2
    assert "CheckpointFunctionBackward" in result.unsplit[1][1]
    assert "stage 1: the backward of 2 of 2 micro-batches could not be split" in caplog.text
    _, result = counted(SPLIT, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    assert result.unsplit[1] == (2, "it has no weight gradient that can be computed by itself")
    _, result = counted(SPLIT, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))
    assert result.unsplit == {}


def test_weights_come_with_w_and_not_before():
    seen = []
    stage = nn.Linear(WIDTH, WIDTH)
    for name, parameter in stage.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    first = nn.Linear(WIDTH, WIDTH)
    first.weight.register_post_accumulate_grad_hook(lambda p: seen.append("first"))
    counted(complete(Plan.from_text("0F0 1F0 0F1 1F1 1I0 0I0 0W0 1I1 0I1 0W1 1W0 1W1")), nn.Sequential(first, stage))
    assert seen[:2] == ["first", "first"]
    assert sorted(seen[2:]) == ["bias", "bias", "weight", "weight"]


def test_what_nothing_used_gets_no_gradient():
    class DropsOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return DropsOne.apply(self.a(x), self.b(x))

    stages = nn.Sequential(nn.Linear(WIDTH, WIDTH), Stage())
    counted(SPLIT, stages)
    assert stages[1].b.weight.grad is None
    assert stages[1].a.weight.grad is not None


def test_a_custom_backward_runs_whole():
    a, b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    seen = []

    def backward(output, gradient):
        seen.append(gradient is None)
        torch.autograd.backward(output, gradient)

    executor = Executor(SPLIT, loopback(1)[0])
    x, y = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    result = executor.run(
        [ChunkWork(a, backward, x), ChunkWork(lambda xs: mse(b(xs[0]), xs[1]), backward, y)],
    )
    assert seen == [True, False, True, False]
    assert {stage: count for stage, (count, _) in result.unsplit.items()} == {0: 2, 1: 2}


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_live_microbatches_are_the_plans(name, p):
    """The most stage inputs that are alive at once on a rank is what the plan says: nothing is held any longer."""
    plan = build(name, p, 2 * p + 1)
    lock, live, peak = threading.RLock(), Counter(), Counter()

    class Counting(nn.Linear):
        def __init__(self, rank):
            super().__init__(WIDTH, WIDTH)
            self.rank = rank

        def forward(self, x):
            with lock:
                live[self.rank] += 1
                peak[self.rank] = max(peak[self.rank], live[self.rank])
            kept = x.clone()  # memory of its own: slices of a batch share theirs, and torch may re-wrap a tensor
            weakref.finalize(kept.untyped_storage(), self.gone)
            return super().forward(kept)

        def gone(self):
            with lock:
                live[self.rank] -= 1

    stages = nn.Sequential(*[Counting(rank) for rank in plan.placement.owners])
    step(plan, stages, torch.randn(6 * p + 3, WIDTH), torch.randn(6 * p + 3, WIDTH))
    assert tuple(peak[rank] for rank in range(p)) == peak_activations(plan)
    assert not +live


def test_after_the_first_half_only_what_the_second_needs_is_held():
    """A GELU's input serves its own backward, which runs with I; a Linear's serves the weight's, which runs with W."""
    alive = {"before GELU": [], "before Linear": []}
    stage = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)])
    for block in stage:
        block[0].register_forward_hook(lambda _m, _i, output: alive["before GELU"].append(reference(output)))
        block[1].register_forward_hook(lambda _m, _i, output: alive["before Linear"].append(reference(output)))
    seen = []

    def reference(output):
        return StorageWeakRef(output.untyped_storage())

    def look(_):
        """Runs with the first stage's W, after the second stage's I and before its W."""
        seen.append({kind: sum(not found.expired() for found in all_of) for kind, all_of in alive.items()})

    plan = complete(Plan.from_text("0F0 1F0 1I0 0I0 0W0 1W0"))
    first = nn.Linear(WIDTH, WIDTH)

    def begin(x):
        output = first(x)
        output.register_hook(look)
        return output

    x = torch.randn(5, WIDTH)
    work = [ChunkWork(begin, inputs=x), ChunkWork(lambda h: stage(h).sum())]
    Executor(plan, loopback(1)[0]).run(work)
    assert seen[0] == {"before GELU": 0, "before Linear": 3}
    assert all(parameter.grad is not None for parameter in stage.parameters())


def test_a_result_shared_by_microbatches_is_refused_as_in_the_plain_loop():
    weight, layer = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)
    shared = weight.exp()  # once, outside of the forward
    plan = build("zb-h1", 2, 3)
    functions = [layer, lambda h: (layer(h) @ shared).sum()]
    results = run_step(plan, functions, [torch.randn(6, WIDTH), None])
    assert any("backward through the graph a second time" in str(result) for result in results), results


def test_what_was_computed_once_for_all_micro_batches_is_refused_in_words():
    weight, stages = torch.ones(4, requires_grad=True), [nn.Linear(4, 4), nn.Linear(4, 4)]
    shared = weight.exp()
    functions = [stages[0], lambda a: mse(stages[1](a[0]) * shared, a[1])]
    inputs = stage_inputs(2, torch.randn(4, 4), torch.randn(4, 4))
    results = run_step(build("zb-h1", 2, 2), functions, inputs)
    assert "Does the stage use a result that was computed once, outside of its forward" in str(results[1])
    assert "backward through the graph a second time" in str(results[0])
