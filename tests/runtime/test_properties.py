"""The law, for models that nobody thought of: random pytrees between random stages, under any schedule.

Stages use a tensor at most twice, and bring it and its gradient into one memory order: sums then have one order, too.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_pipeline import assert_same_gradients, on_every_rank
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.microbatch import microbatch_sizes
from torchdistpackage.schedule import build, describe, names

THOROUGH = [pytest.mark.slow, pytest.mark.timeout(1500)]
WIDTH = 5
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]


def hold(count, check, *drawn):
    """Checks the same few examples in every run, or many new ones; a failing one is printed so that it runs again."""
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    how = settings(max_examples=count, derandomize=count < 100, print_blob=True, **quiet)
    how(given(*drawn)(check))()


@dataclass(frozen=True)
class Leaf:
    """A place in a drawn tree: a tensor, made anew for each micro-batch, or several values in turn."""

    kind: str = ""
    used: bool = True  # by the next stage; the gradient of what it does not use is None
    rows: bool = False  # the one that is surely used, and tells the number of rows
    values: tuple = ()


def value(leaf, time, make=None):
    """What a place of a drawn tree holds."""
    leaf = leaf.values[time % len(leaf.values)] if isinstance(leaf, Leaf) and leaf.values else leaf
    return make(leaf.kind) if isinstance(leaf, Leaf) else leaf


# What a stage makes of a new tensor h of [rows, WIDTH]
ANY = {
    "as it is": lambda stage, h: h,
    "scaled": lambda stage, h: h * stage.gain,
    "strided": lambda stage, h: h[:, ::2],
    "expanded": lambda stage, h: h.unsqueeze(1).expand(-1, 2, -1),
    "channels last": lambda stage, h: h[:, :4].reshape(-1, 2, 2, 1).to(memory_format=torch.channels_last),
    "no columns": lambda stage, h: h[:, :0],
    **{str(dtype): lambda stage, h, dtype=dtype: h.to(dtype) for dtype in DTYPES[:4]},
    "transposed": lambda stage, h: h.t(),
    "element": lambda stage, h: h[0, 0],
    "growing": lambda stage, h: h[:, : stage.calls % WIDTH],
    "complex": lambda stage, h: torch.complex(h, h * 2),
    "parameter": lambda stage, h: stage.gain,
    "detached": lambda stage, h: h.detach(),
    "flags": lambda stage, h: h > 0,
    "bytes": lambda stage, h: (h > 0).to(torch.uint8).t(),
    "numbers": lambda stage, h: torch.arange(len(h)),
    "table": lambda stage, h: stage.table,
    "counter": lambda stage, h: stage.counter.add_(1) if stage.sends else stage.counter.add(stage.calls),
    "rows": lambda stage, h: len(h),
}
TALL = list(ANY)[:10]  # have a gradient, and tell the number of rows
GIVEN = {
    "samples": lambda rows: torch.randn(rows, 3),
    "wants a gradient": lambda rows: torch.randn(rows, 3, requires_grad=True),
    "every other": lambda rows: torch.randn(2 * rows, 2)[::2],
    "one for all": lambda rows: torch.randn(1, 2).expand(rows, 2),
    "ids": lambda rows: torch.randint(0, 9, (rows,)),
    "mask": lambda rows: torch.randn(rows, 4) > 0,
}
VIEWS = [
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: x[..., ::2] if x.dim() else x,
    lambda x: x.unsqueeze(-1).expand(*x.shape, 2),
    lambda x: x.conj(),
    lambda x: x.requires_grad_(x.is_floating_point() or x.is_complex()),
]
named = lambda entries: dict(zip(["a", 1, "", -2, "b", 0, "c"], entries, strict=False))  # noqa: E731
one_of = st.sampled_from
alike = one_of([0, False, 0.0, -0.0, 0j, 1, True, 1.0])
types = [st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(), alike]
constants = one_of(types).flatmap(lambda values: values)


@st.composite
def nested(draw, tensors, depth=2):
    """Tuples, lists and dicts in each other; at the end a tensor, a constant, or one after the other."""
    kind = draw(one_of([list, tuple, named, "tensor", "tensor", "constant", "turns"][0 if depth else 3 :]))
    if not isinstance(kind, str):
        return kind(draw(st.lists(nested(tensors, depth - 1), max_size=3)))
    turns = st.builds(Leaf, values=st.tuples(tensors | alike, alike | st.none(), tensors | alike))
    return draw({"tensor": tensors, "constant": constants, "turns": turns}[kind])


@st.composite
def trees(draw, kinds, telling, more=((),)):
    """A tree that somewhere holds one tensor that tells the rows; `more` is what may be in it, all or nothing."""
    entries = draw(st.lists(nested(st.builds(Leaf, one_of(list(kinds)), st.booleans())), max_size=4))
    tells = draw(st.builds(Leaf, one_of(telling), rows=st.just(True)))
    entries.insert(draw(st.integers(0, len(entries))), draw(one_of([tells, (tells,), {"deep": [None, tells]}])))
    entries += [Leaf(kind, draw(st.booleans())) for kind in draw(one_of(more))]
    return draw(one_of([list, tuple, named, lambda all: all[0] if len(all) == 1 else all]))(entries)


@st.composite
def cases(draw):
    """A model, its batches and how it is run."""
    name, p = draw(one_of(names())), draw(st.integers(1, 4))
    count = p * draw(one_of([v for v in range(1, 5) if describe(name).runs(v)]))
    between = draw(st.lists(trees(ANY, TALL, [(), (), ("twin", "twin"), ("handed on",)]), min_size=1, max_size=3))
    later = draw(st.lists(st.none() | nested(st.builds(Leaf, one_of(list(GIVEN)))), min_size=1, max_size=2))
    step = {"rows": one_of(range(1, 14)), "m": one_of(range(1, 10)), "training": st.booleans(), "mean": st.booleans()}
    step["evaluates_in"] = one_of([torch.no_grad, torch.inference_mode, nullcontext])
    return SimpleNamespace(
        name=name,
        p=p,
        dtype=draw(one_of(DTYPES[:2])),
        wires=[*[between[s % len(between)] for s in range(count - 1)], draw(trees(TALL, TALL))],  # the last: outputs
        inputs=[draw(trees(GIVEN, list(GIVEN))), *[later[s % len(later)] for s in range(1, count)]],
        frozen=draw(st.sets(st.integers(0, count - 1), max_size=3)) - {count - 1},
        in_place=draw(st.booleans()),
        loss=draw(one_of([torch.sum, torch.mean])),
        steps=draw(st.lists(st.builds(SimpleNamespace, **step), min_size=1, max_size=3)),
        seed=draw(st.integers(0, 2**31)),
    )


def steady(tensor):
    """Brings its gradient into one memory order, in which sums over it are the same bits."""
    if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
        tensor.register_hook(lambda gradient: gradient.clone(memory_format=torch.contiguous_format))
    return tensor


class DrawnStage(nn.Module):
    """Folds all tensors that it gets into one of [rows, WIDTH], and makes of that what it returns."""

    def __init__(self, case, index):
        super().__init__()
        arriving = tree_leaves(case.wires[index - 1] if index else case.inputs[0])
        self.rows_at = next(at for at, leaf in enumerate(arriving) if isinstance(leaf, Leaf) and leaf.rows)
        self.unused = {at for at, leaf in enumerate(arriving) if isinstance(leaf, Leaf) and not leaf.used}
        self.in_place = case.in_place and index > 0 and arriving[self.rows_at].kind != "expanded"
        self.sends = case.p > 1  # what is handed over to the next stage of the rank is the same memory
        self.wire, self.dtype = case.wires[index], case.dtype
        self.loss = case.loss if index == len(case.wires) - 1 else None
        self.inner, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.scale, self.table = nn.Parameter(torch.randn(4)), torch.randn(3, 2)
        self.counter, self.calls, self.seen = torch.tensor(0), 0, []
        self.to(case.dtype).requires_grad_(index not in case.frozen)

    def forward(self, argument, training):
        self.calls += 1
        self.seen.append(tree_map(lambda leaf: noted(leaf, training), argument))
        leaves = tree_leaves(argument)
        first = leaves[self.rows_at].mul_(2) if self.in_place else leaves[self.rows_at]
        x = torch.zeros(len(first), WIDTH, dtype=self.dtype)
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and at not in self.unused:
                leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
                flat = leaf.contiguous().to(self.dtype).reshape(-1)
                x = x + self.scale[at % 4] * nn.functional.pad(flat, (0, x.numel() - len(flat))).view_as(x)
        h = torch.tanh(steady(self.inner(steady(x))))
        if training and self.loss:
            return self.loss(h * h)
        whole = {"twin": steady(h * 2), "handed on": first}
        make = lambda kind: whole[kind] if kind in whole else steady(ANY[kind](self, steady(h * 1.5)))  # noqa: E731
        return tree_map(lambda leaf: value(leaf, 0 if self.loss else self.calls, make), self.wire)


def noted(leaf, training):
    """A leaf as it was when it came, and whether it wanted a gradient."""
    return (leaf.detach().clone(), training and leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def assert_same(mine, theirs):
    """Bitwise, and of the same structure."""
    (leaves, spec), (others, other_spec) = tree_flatten(mine), tree_flatten(theirs)
    assert spec == other_spec
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)
        else:
            assert (type(a), repr(a)) == (type(b), repr(b))  # nan is nan here, and -0.0 is not 0.0


class Run:
    """The stages of a case, and for each step the inputs of every stage."""

    def __init__(self, case):
        torch.manual_seed(case.seed)
        self.case, self.stages = case, [DrawnStage(case, index) for index in range(len(case.wires))]
        given = [(step.rows, lambda kind, rows=step.rows: GIVEN[kind](rows)) for step in case.steps]
        self.batches = [[tree_map(lambda leaf, at=at: value(leaf, *at), tree) for tree in case.inputs] for at in given]

    def pipelined(self, rank, transport):
        """For each step, the last stage's outputs with their weights."""
        case, results, executors = self.case, [], {}
        for step, batch in zip(case.steps, self.batches, strict=True):
            plan = build(case.name, case.p, step.m, chunks=len(self.stages) // case.p, forward_only=not step.training)
            functions = [partial(stage, training=step.training) for stage in self.stages]
            work = [ChunkWork(functions[s], inputs=batch[s]) for s in plan.placement.local_stages(rank)]
            with nullcontext() if step.training else step.evaluates_in():
                result = executors.setdefault(plan, Executor(plan, transport)).run(work, mean=step.mean)
            assert len(result.outputs) == (min(step.rows, step.m) if rank == plan.placement.loss_rank else 0)
            results.append(list(zip(result.outputs, result.weights, strict=False)))
        return results

    def plain(self):
        """The same from the plain loop, micro-batch after micro-batch."""
        results = []
        for step, batch in zip(self.case.steps, self.batches, strict=True):
            results.append([])
            sizes = [rows for rows in microbatch_sizes(step.rows, step.m) if rows]
            for at in torch.arange(step.rows).split(sizes):
                output, weight = None, len(at) / step.rows if step.mean else 1.0
                with nullcontext() if step.training else step.evaluates_in():
                    for stage, own in zip(self.stages, batch, strict=True):
                        cut = tree_map(lambda leaf, at=at: leaf[at] if isinstance(leaf, Tensor) else leaf, own)
                        arguments = [*spread(output), *spread(cut)]
                        output = stage(arguments[0] if len(arguments) == 1 else arguments, step.training)
                if step.training:
                    (output * weight).backward()
                results[-1].append((output.detach() if step.training else output, weight))
        return results


def spread(value):
    """A list or tuple is several arguments."""
    return list(value) if type(value) in (list, tuple) else [] if value is None else [value]


def check_pipeline(case):
    mine = Run(case)
    other = copy.deepcopy(mine)
    found = on_every_rank(case.p, mine.pipelined)
    for error in [rank for rank in found if isinstance(rank, Exception)]:
        raise error
    assert_same([next(filter(None, step)) for step in zip(*found, strict=True)], other.plain())
    for stage, reference in zip(mine.stages, other.stages, strict=True):
        assert_same_gradients(stage, reference)
        assert_same(stage.seen, reference.seen)
    for x, y in zip(tree_leaves(mine.batches), tree_leaves(other.batches), strict=True):
        assert_same(getattr(x, "grad", None), getattr(y, "grad", None))


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=THOROUGH)])
def test_a_pipeline_is_the_plain_loop(count):
    hold(count, check_pipeline, cases())


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4) | st.just([2000]))  # the last one is longer than a slot
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return draw(one_of(VIEWS))(torch.randint(0, 9, shape).to(draw(one_of([*DTYPES, torch.bool]))))


def check_stream(trees, steps):
    """A message is (which tree, kind, stage, whether its tensors change before, when it is taken)."""
    a, b = loopback(2)
    for number, step in enumerate(steps):
        training, expected = number % 2 == 0, []
        for transport in (a, b):
            transport.begin_step(f"step {number % 3}", training=training)
        for at, (which, kind, stage, changes, _) in enumerate(step):
            tree = tree_map(lambda leaf, at=at: value(leaf, at), trees[which % len(trees)])
            for leaf in tree_leaves(tree):
                if changes and isinstance(leaf, Tensor) and leaf.numel() and leaf.is_contiguous():
                    leaf.data.view(-1)[0] = leaf.data.view(-1)[0] == 0  # the version counter does not tell
            a.outlet(1).send(kind, stage, at, len(step), *flatten(tree))
            expected.append(tree_map(lambda leaf, training=training: noted(leaf, training), tree))
        for at in sorted(range(len(step)), key=lambda at, step=step: step[at][-1]):
            layout, arrived, rows = b.inlet(0).take(step[at][1], step[at][2], at)
            wants = [about.requires_grad for about in layout.tensors]
            assert_same((rows, layout.tree(list(zip(arrived, wants, strict=True)))), (len(step), expected[at]))
        for transport in (a, b):
            transport.finish_step(None, None)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=THOROUGH)])
def test_any_message_arrives_as_it_was(count):
    message = st.tuples(st.integers(0, 2), one_of(list(Kind)[:2]), st.integers(0, 1), st.booleans(), st.integers(0, 9))
    steps = st.lists(st.lists(message, max_size=6), min_size=1, max_size=4)
    hold(count, check_stream, st.lists(nested(tensors()), min_size=1, max_size=3), steps)
