"""Finds the cut of a recorded model: records, measures, cuts, and opens what is too large to balance around.

::

    round 1   stem | encoder                    | head        one node has nine tenths of the cost
    round 2   stem | layers.0  ...  layers.11   | head        opened: whole blocks, balanced within 4 %

Only modules that hold an ideal cut point are opened, so that most of the model stays whole.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, final

import torch
from torch import fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.boundaries import MemoryLimit, balanced_boundaries, boundaries_of_sizes, load_balance
from torchdistpackage.split.calls import CallCost, undisturbed
from torchdistpackage.split.exported import record_exported
from torchdistpackage.split.graph import Row
from torchdistpackage.split.layout_string import layout_boundaries
from torchdistpackage.split.recordable import has_hooks
from torchdistpackage.split.recording import Recording
from torchdistpackage.split.report import SplitReport, StageRow
from torchdistpackage.split.signature import Example
from torchdistpackage.split.tracer import record
from torchdistpackage.split.unit_costs import UnitCosts, parameters_of
from torchdistpackage.split.unrepeatable import Unrepeatable
from torchdistpackage.split.untraceable import Untraceable

__all__ = ["Cut", "Wishes", "closed_again", "find_cut", "matched", "record_as_is", "report_of"]

_ROUNDS = 8  # how often modules are opened; each costs one forward, and the measurement of what is new
_STATE = 4  # times the bytes of the parameters: they, their gradients, and Adam's two moments


@dataclass(frozen=True)
class Cut:
    """A decision: plain data, so that one rank can make it for all.

    Attributes:
        opened: Names of the modules that are recorded node by node.
        closed: Names of the modules that stay whole although they could be opened.
        boundaries: Cut points in the row of the training (or only) recording.
        report: What each stage costs.
    """

    opened: tuple[str, ...]
    closed: tuple[str, ...]
    boundaries: tuple[int, ...]
    report: SplitReport


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a cut; see `split` for the meaning."""

    num_stages: int
    costs: str
    sizes: Sequence[int] | None = None
    layout: str | None = None
    together: Sequence[Sequence[str]] = ()
    stage_of: Mapping[str, int] = field(default_factory=dict)
    memory_limit: float | Sequence[float] | None = None
    open_modules: Collection[str] = ()
    closed: Collection[str] = ()
    leaf_functions: Sequence[Callable[..., Any]] = ()
    repeats: int = 3
    tolerance: float = 0.05
    slack: float = 0.01


def record_as_is(
    model: nn.Module, example: Example | None, opened: Collection[str], closed: set[str], **options: Any
) -> Recording:
    """Records, and leaves modules whole that turn out not to be recordable: their names are added to `closed`.

    Raises:
        Untraceable: The model's own forward cannot be recorded.
    """
    tensors: Any = [*example.args, *example.kwargs.values()] if example is not None else ()
    while True:
        try:
            with undisturbed([model], tensors):
                return record(model, example, opened=set(opened) - closed, closed=closed, **options)
        except Untraceable as error:
            if error.path and error.path not in closed:
                closed.add(error.path)
                continue
            needs_run = isinstance(error.__cause__, Unrepeatable) and "/torch/" not in error.where
            if example is None or options.get("marks_at") or needs_run:  # torch.export cannot know those either
                raise
            with undisturbed([model], tensors):
                return record_exported(model, example, error, options.get("prefix", "t"))


def find_cut(model: nn.Module, example: Example, wishes: Wishes) -> Cut:
    """Finds the best cut that satisfies the wishes.

    Raises:
        Untraceable: The model's own forward cannot be recorded.
        SplitError: No cut satisfies the wishes.
    """
    opened, closed = set(wishes.open_modules), set(wishes.closed)
    units = UnitCosts(model, timed=wishes.costs == "time", repeats=wishes.repeats)
    best: _Draft | None = None
    problem: SplitError | None = None
    for _ in range(_ROUNDS):
        recording = record_as_is(model, example, opened, closed, leaf_functions=wishes.leaf_functions)
        row = Row(recording)
        with undisturbed([model]):
            draft = _Draft.of(model, row, units.of(row), wishes)
        try:
            draft = draft.cut(wishes, tuple(opened), tuple(closed))
            if best is None or draft.worst < best.worst * 0.99:
                best = draft
        except SplitError as error:
            problem = error
        explicit = wishes.sizes is not None or wishes.layout is not None
        more = set() if explicit else draft.to_open(wishes, closed)
        if not more - opened or (best is draft and draft.imbalance <= wishes.tolerance):
            break
        opened |= more
    if best is None:
        assert problem is not None
        raise problem
    if more := _closed_in_other_mode(model, example, best, wishes):
        return find_cut(model, example, replace(wishes, closed={*wishes.closed, *more}))
    report = report_of(best.row, best.costs, best.loads, best.boundaries, model, wishes.costs)
    options = {"leaf_functions": wishes.leaf_functions}
    return closed_again(model, example, best.row, Cut(best.opened, best.closed, best.boundaries, report), options)


def _closed_in_other_mode(model: nn.Module, example: Example, draft: _Draft, wishes: Wishes) -> set[str]:
    """The modules that this cut has opened and that cannot be recorded in the other mode: they stay whole in both.

    A module that is whole in training and cut in evaluation would change its buffers on one stage and use them on two.
    """
    closed = set(draft.closed)
    with undisturbed([model]):
        model.train(not model.training)
        try:
            record_as_is(model, example, draft.opened, closed, leaf_functions=wishes.leaf_functions)
        except (Untraceable, SplitError):
            pass  # there will be no stages for this mode, which they say
    return closed - set(draft.closed)


def closed_again(model: nn.Module, example: Example | None, row: Row, cut: Cut, options: Mapping[str, Any]) -> Cut:
    """The same cut with every module whole that no cut goes through, the plain containers, too.

    Args:
        model: What is cut.
        example: What it is called with.
        row: The row in which the cut was found.
        cut: What was found.
        options: For `record`.
    """
    reach: dict[tuple[str, int], set[int]] = defaultdict(set)
    for index, node in enumerate(row.nodes):
        for call in node.meta["stack"][1:]:
            reach[call].add(bisect_right(cut.boundaries, index))
    through = {path for (path, _), stages in reach.items() if len(stages) > 1}
    whole = {path for path, _ in reach} - through
    kept = tuple(path for path in cut.opened if not _is_in(path, whole))
    closed = tuple(sorted({*cut.closed, *whole}))
    again = Row(record_as_is(model, example, kept, set(closed), **options))
    points, at, last = {0: 0}, 0, None
    for index, node in enumerate(row.nodes):
        call = next((call for call in node.meta["stack"][1:] if call[0] in whole), None)
        if call is None or call != last:
            same = at < len(again.nodes) and again.nodes[at].target == (node.target if call is None else call[0])
            if not same:
                return cut  # its forward is another one when a part of it is whole; the cut is right as it is
            at += 1
        last = call
        points[index + 1] = at
    boundaries = tuple(points[point] for point in cut.boundaries)
    if at != len(again.nodes) or any(point in again.forbidden for point in boundaries[1:-1]):
        return cut
    return Cut(kept, closed, boundaries, cut.report)


def _is_in(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


@final
@dataclass(frozen=True, eq=False)
class _Draft:
    """A row with its costs, and a cut of it."""

    model: nn.Module
    row: Row
    costs: list[CallCost]
    loads: list[float]
    boundaries: tuple[int, ...] = ()
    opened: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, row: Row, costs: list[CallCost], wishes: Wishes) -> _Draft:
        held = parameters_of(model, row)
        if wishes.costs == "parameters":
            loads = [float(sum(p.numel() for p in mine)) for mine in held]
        elif wishes.costs == "flops":
            loads = [float(cost.flops) for cost in costs]
        else:
            loads = [cost.forward + cost.backward for cost in costs]
        return cls(model, row, costs, loads)

    def cut(self, wishes: Wishes, opened: tuple[str, ...], closed: tuple[str, ...]) -> _Draft:
        """The same with the best cut of this row."""
        count = len(self.row.nodes)
        if wishes.sizes is not None:
            boundaries = boundaries_of_sizes(wishes.sizes, count)
        elif wishes.layout is not None:
            first, last = blocks_of(self.row)
            boundaries = layout_boundaries(
                wishes.layout, before=first, blocks=last - first, after=count - last, num_stages=wishes.num_stages
            )
        else:
            boundaries = balanced_boundaries(
                self.loads,
                wishes.num_stages,
                cut_bytes=self.row.cut_bytes,
                slack=wishes.slack,
                forbidden=sorted({*self.row.forbidden, *self._pinned(wishes)}),
                stage_of=self._places(wishes.stage_of),
                memory=self._memory(wishes),
            )
        for point in boundaries[1:-1]:
            if point in self.row.forbidden:
                node = self.row.nodes[point]
                raise SplitError(f"no cut can be right before {node.name}: {self.row.forbidden[point]}")
        return _Draft(self.model, self.row, self.costs, self.loads, boundaries, opened, closed)

    @property
    def worst(self) -> float:
        """The load of the most loaded stage."""
        return max(sum(self.loads[a:b]) for a, b in pairwise(self.boundaries))

    @property
    def imbalance(self) -> float:
        """How much that is above the mean."""
        mean = sum(self.loads) / (len(self.boundaries) - 1)
        return self.worst / mean - 1 if mean else 0.0

    def to_open(self, wishes: Wishes, closed: Collection[str]) -> set[str]:
        """Modules that hold an ideal cut point and are large enough to matter."""
        total = sum(self.loads)
        prefix = list(accumulate(self.loads, initial=0.0))
        p = wishes.num_stages
        if not self.boundaries:
            large = sorted(range(len(self.loads)), key=self.loads.__getitem__, reverse=True)
            chosen = [i for i in large if self._can_open(i, closed)][: max(1, p)]
        else:
            ideal = {min(bisect_right(prefix, total * s / p) - 1, len(self.loads) - 1) for s in range(1, p)}
            around = {i for point in self.boundaries[1:-1] for i in (point - 1, point)}
            chosen = [i for i in ideal | around if self.loads[i] > wishes.tolerance * total / p / 2]
            chosen = [i for i in chosen if self._can_open(i, closed)]
        return {str(self.row.nodes[i].target) for i in chosen}

    def _can_open(self, index: int, closed: Collection[str]) -> bool:
        node = self.row.nodes[index]
        if node.op != "call_module" or node.target in closed:
            return False
        module = self.model.get_submodule(str(node.target))
        scripted = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
        return any(True for _ in module.children()) and not has_hooks(module) and not scripted

    def _pinned(self, wishes: Wishes) -> set[int]:
        """Cut points that would part what is to stay together."""
        found: set[int] = set()
        for names in wishes.together:
            places = [place for name in names for place in self._named(name)]
            found.update(range(min(places) + 1, max(places) + 1))
        return found

    def _places(self, stage_of: Mapping[str, int]) -> dict[int, int]:
        return {place: stage for name, stage in stage_of.items() for place in self._named(name)}

    def _named(self, name: str) -> list[int]:
        """The places in the row of a module, or of what is in it."""
        found = []
        for index, node in enumerate(self.row.nodes):
            at = str(node.target) if node.op == "call_module" else node.meta["stack"][-1][0]
            if at == name or at.startswith(f"{name}."):
                found.append(index)
        if not found:
            modules = [path for path, _ in self.model.named_modules() if path]
            close = difflib.get_close_matches(name, modules, n=1)
            if name in modules:
                raise SplitError(
                    f"{name} is part of a module that stays whole; name that one, or add it to open_modules"
                )
            raise SplitError(f"the model has no module {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return found

    def _memory(self, wishes: Wishes) -> MemoryLimit | None:
        if wishes.memory_limit is None:
            return None
        static = [_STATE * sum(p.nbytes for p in mine) for mine in parameters_of(self.model, self.row)]
        live = [wishes.num_stages - stage for stage in range(wishes.num_stages)]
        return MemoryLimit(wishes.memory_limit, static, [cost.activation_bytes for cost in self.costs], live)


def blocks_of(row: Row) -> tuple[int, int]:
    """Where the blocks of the model begin and end in the row: the longest run of modules of one class in one list.

    Raises:
        SplitError: There is none.
    """
    runs: list[tuple[int, int]] = []
    begin = 0
    kinds = [_kind_of(node) for node in row.nodes]
    for index in range(1, len(kinds) + 1):
        if index == len(kinds) or kinds[index] != kinds[begin]:
            if kinds[begin] is not None:
                runs.append((begin, index))
            begin = index
    if not runs:
        raise SplitError("a layout string needs a model with a list of like blocks; pass sizes or costs instead")
    return max(runs, key=lambda run: run[1] - run[0])


def _kind_of(node: fx.Node) -> str | None:
    parent, _, name = str(node.target).rpartition(".")
    return parent if node.op == "call_module" and name.isdigit() else None


def matched(row: Row, other: Row, boundaries: Sequence[int]) -> tuple[int, ...]:
    """The cut of one recording as a cut of another one of the same model, in the other mode."""
    mine, theirs = ([(n.op, str(n.target)) for n in r.nodes] for r in (row, other))
    found = {0: 0, len(mine): len(theirs)}
    for a, b, size in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
        found.update({a + i: b + i for i in range(size)})
    points = [0]
    for point in boundaries[1:-1]:
        here = next(p for p in range(point, len(mine) + 1) if p in found)
        points.append(max(found[here], points[-1]))
    return (*points, len(theirs))


def report_of(
    row: Row,
    costs: Sequence[CallCost],
    loads: Sequence[float],
    boundaries: Sequence[int],
    model: nn.Module,
    unit: str,
) -> SplitReport:
    """The table of a cut."""
    timed = unit == "time"
    held = parameters_of(model, row)
    rows = []
    for stage, (a, b) in enumerate(pairwise(boundaries)):
        mine = costs[a:b]
        rows.append(
            StageRow(
                stage,
                tuple(str(n.target) if n.op == "call_module" else n.name for n in row.nodes[a:b] if not row.rides(n)),
                sum(p.numel() for parameters in held[a:b] for p in parameters),
                sum(cost.flops for cost in mine),
                sum(cost.forward for cost in mine) if timed else None,
                sum(cost.backward for cost in mine) if timed else None,
                sum(cost.activation_bytes for cost in mine),
                row.cut_bytes[b - 1] if b < len(row.nodes) else 0,
                sum(loads[a:b]),
            )
        )
    best = load_balance(loads, balanced_boundaries(loads, len(rows))).worst if len(rows) <= len(loads) else None
    return SplitReport(tuple(rows), unit, best)
