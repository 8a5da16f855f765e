"""A recorded forward as a row that can be cut: what runs where, which values cross a cut, and where none may be.

::

    row      stem  layer1  layer2  up1  up2  head            cuts at 2, 4
    stage      0      0       1     1    2    2
    values   stem -> up2      from stage 0 to stage 2 at once: a skip
             layer1 -> layer2, up1 -> up2: from neighbour to neighbour

A value goes from the stage that makes it to each stage that uses it. Three things bend that rule:

- what costs nothing and is no tensor (a size, an element of a tuple) is computed where its input is made, so that a
  number travels and not the tensor that it was read from;
- a tensor that is changed in place goes on from the stage that changed it last;
- two tensors that share memory cannot both cross a cut before one of them is changed in place: no cut there.

Neighbours: `tracer.py` records, `traced_stage.py` makes modules of the pieces.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchdistpackage.split.marks import pipe_split
from torchdistpackage.split.operations import ASKS_FOR_GRADIENTS, check_holds, check_same
from torchdistpackage.split.recording import Recording

__all__ = ["Flow", "CutRow", "Row"]

_TRAVELS = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice)
_SIZES: tuple[Any, ...] = ("size", "dim", "numel", "ndimension", "stride", "element_size", "get_device", "data_ptr")
_ARITHMETIC: tuple[Callable[..., Any], ...] = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.pow, operator.not_),
)


@final
@dataclass(frozen=True, eq=False)
class Row:
    """The nodes that compute, in order.

    Attributes:
        recording: Where they come from.
    """

    recording: Recording

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What is cut: entry i is before a cut at i + 1."""
        return tuple(n for n in self.recording.graph.nodes if n.op.startswith("call_") and n.target is not pipe_split)

    @cached_property
    def place(self) -> dict[fx.Node, int]:
        """Node -> its index in the row; arguments of the model are before all."""
        found = {node: index for index, node in enumerate(self.nodes)}
        found.update({n: -1 for n in self.recording.graph.nodes if n.op == "placeholder"})
        return found

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """The cut points at which `pipe_split` was called: ascending, without those at the ends and without doubles."""
        marks, count = set(), 0
        for node in self.recording.graph.nodes:
            if node.target is pipe_split:
                marks.add(count)
            count += node in self.place and node.op != "placeholder"
        return tuple(sorted(marks - {0, len(self.nodes)}))

    def rides(self, node: fx.Node) -> bool:
        """Whether the node is computed where its input is made."""
        if node.op == "call_method":
            return node.target in _SIZES or node.target in ASKS_FOR_GRADIENTS
        if node.op != "call_function":
            return False
        if node.target in (check_same, check_holds) or "sym_size" in str(node.target):
            return True
        if node.target is getattr:  # of a tensor, or an entry of a named tuple
            return not self._is_tensor(node) or not isinstance(self.recording.values.get(node.args[0]), Tensor)  # type: ignore[arg-type]
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not inputs or any(self._is_tensor(n) for n in inputs):
            return False
        return node.target is operator.getitem or (node.target in _ARITHMETIC and not self._is_tensor(node))

    def _is_tensor(self, node: fx.Node) -> bool:
        """Without an example: whether it may be one."""
        values = self.recording.values
        if node in values:
            return isinstance(values[node], Tensor)
        return not (node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim"))

    @cached_property
    def uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Value -> the nodes that use it, in order; those that ride with it are not among them, but theirs are."""
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in (*self.nodes, self.output):
            for value in node.all_input_nodes:
                if value.op != "get_attr":
                    found[value].append(node)
        return dict(found)

    @cached_property
    def output(self) -> fx.Node:
        """Where the forward returns."""
        found: fx.Node = next(n for n in reversed(self.recording.graph.nodes) if n.op == "output")
        return found

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The values that the forward returns."""
        return cast("tuple[fx.Node, ...]", self.output.args[0])

    @cached_property
    def trained(self) -> set[fx.Node]:
        """The values that a gradient comes back to: those that a parameter is behind."""
        found: set[fx.Node] = set()
        values = self.recording.values
        for node in self.recording.graph.nodes:
            if node.op == "get_attr":
                value = values.get(node)
                parameters = list(value.parameters()) if isinstance(value, nn.Module) else [value]
                behind = any(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters)
            else:
                behind = node.meta.get("trains", False) or any(n in found for n in node.all_input_nodes)
            if behind:
                found.add(node)
        return found

    @cached_property
    def cut_bytes(self) -> tuple[int, ...]:
        """Bytes of the values that a cut at 1, 2, ... sends, each value once; as far as the example tells."""
        change = [0] * (len(self.nodes) + 2)
        for value, begin, end in self._spans():
            size = sum(leaf.nbytes for leaf in _tensors(self.recording.values.get(value)))
            change[begin] += size
            change[end] -= size
        total, found = 0, []
        for point in range(1, len(self.nodes)):
            total += change[point]
            found.append(total)
        return tuple(found)

    @cached_property
    def crossing(self) -> tuple[int, ...]:
        """How many values travel over a cut at 0, 1, 2, ..."""
        found = [0] * (len(self.nodes) + 1)
        for _, begin, end in self._spans():
            for point in range(begin, end):
                found[point] += 1
        return tuple(found)

    @cached_property
    def forbidden(self) -> dict[int, str]:
        """Cut point -> why there can be no cut."""
        found: dict[int, str] = {}
        for value, begin, end in self._spans():
            kinds = {type(x) for x in pytree.tree_leaves(self.recording.values.get(value))}
            if foreign := [kind for kind in kinds if not issubclass(kind, _TRAVELS)]:
                reason = f"a {foreign[0].__name__} ({value.name}) would have to travel to another stage"
                found.update(dict.fromkeys(range(begin, end), reason))
            elif not _can_be_rebuilt(self.recording.values.get(value)):
                reason = f"{value.name} is in a container that another rank cannot rebuild, such as a named tuple"
                found.update(dict.fromkeys(range(begin, end), reason))
        for index, node in enumerate(self.nodes):
            if node.meta.get("inside") or "decrement_nesting" in str(node.target):
                found[index] = "it would be inside of a transform of torch.func"
        for begin, end, reason in (*self._shared_memory(), *self._stateful()):
            found.update(dict.fromkeys(range(begin, end), reason))
        return found

    def anchor(self, value: fx.Node) -> int:
        """The index in the row of what decides on which stage a value is made; -1 for arguments of the model."""
        inputs = [n for n in value.all_input_nodes if n.op != "get_attr"] if self.place[value] >= 0 else []
        if inputs and self.rides(value):
            return max(self.anchor(n) for n in inputs)
        return self.place[value]

    def _spans(self) -> Iterator[tuple[fx.Node, int, int]]:
        """Each value with the cut points over which it would travel: from begin up to, not including, end."""
        for value, users in self.uses.items():
            last = max(len(self.nodes) - 1 if u is self.output else self.anchor(u) for u in users)
            begin = max(self.anchor(value) + 1, 1)
            if begin <= last:
                yield value, begin, last + 1

    def _shared_memory(self) -> Iterator[tuple[int, int, str]]:
        """Where one of two tensors with the same memory is changed and the other one is used later."""
        values, members = self.recording.values, defaultdict(list)
        for value in self.place:
            for leaf in [] if value.meta.get("inside") else _tensors(values.get(value)):
                if leaf.layout is torch.strided:
                    members[leaf.untyped_storage()._cdata].append((value, id(leaf)))
        for changer, changed in self.recording.changed.items():
            at, touched = self.place[changer], {id(leaf) for n in changed for leaf in pytree.tree_leaves(values[n])}
            for n in changed:
                if n.op == "get_attr":
                    others = [i for i, node in enumerate(self.nodes) if self._reads(node, values[n])]
                    yield min(others) + 1, max(others) + 1, f"{n.target} is changed in place by {changer.name}"
                    continue
                if n.meta.get("inside"):
                    continue
                group = [m for leaf in _tensors(values[n]) for m in members[leaf.untyped_storage()._cdata]]
                first = min(self.place[value] for value, _ in group)
                for value, identity in group:
                    later = any(self.place.get(u, len(self.nodes)) > at for u in self.uses.get(value, ()))
                    if identity not in touched and self.place[value] < at and later:
                        reason = f"{value.name} and {n.name} share memory that {changer.name} changes in place"
                        yield max(first, 0) + 1, at + 1, reason

    def _reads(self, node: fx.Node, tensor: Any) -> bool:
        """Whether a node uses a parameter or buffer, itself or in the module that it calls."""
        given = any(n.op == "get_attr" and self.recording.values.get(n) is tensor for n in node.all_input_nodes)
        return given or id(tensor) in node.meta.get("tensors", ())

    def _stateful(self) -> Iterator[tuple[int, int, str]]:
        """Between the calls of one module that changes its buffers (batch norm)."""
        calls: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            if node.op == "call_module" and node.meta.get("stateful"):
                calls[str(node.target)].append(index)
        for name, places in calls.items():
            if len(places) > 1:
                yield places[0] + 1, places[-1] + 1, f"{name} is called several times and keeps statistics"

    def holder(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """The node whose stage a user gets a value from: its maker, or who changed it in place last before that."""
        found = value
        if user.op == "output" or not self.rides(user):
            end = self.place.get(user, len(self.nodes))
            for changer, changed in self.recording.changed.items():
                at = self.place[changer]
                if value in changed and at < end and at > self.place[found]:
                    found = changer
        return found


@dataclass(frozen=True)
class Flow:
    """A value that travels.

    Attributes:
        value: The node.
        source: The stage that sends it.
        target: The stage that gets it.
    """

    value: fx.Node
    source: int
    target: int


@final
@dataclass(frozen=True, eq=False)
class CutRow:
    """A row, cut.

    Attributes:
        row: What is cut.
        boundaries: p + 1 cut points, from 0 to the length of the row.
    """

    row: Row
    boundaries: Sequence[int]

    @property
    def num_stages(self) -> int:
        """How many pieces there are."""
        return len(self.boundaries) - 1

    @cached_property
    def stage_of(self) -> dict[fx.Node, int]:
        """Node -> the stage that computes it."""
        found: dict[fx.Node, int] = {}
        for node in self.row.place:
            at = self.row.anchor(node)
            found[node] = 0 if at < 0 else min(bisect_right(self.boundaries, at) - 1, self.num_stages - 1)
        found[self.row.output] = self.num_stages - 1
        return found

    @cached_property
    def flows(self) -> tuple[Flow, ...]:
        """All values that travel, by source, then in the order of the row."""
        found: dict[tuple[fx.Node, int, int], Flow] = {}
        stages = self.stage_of
        for value, users in self.row.uses.items():
            for user in users:
                source, target = stages[self.row.holder(value, user)], stages[user]
                if source < target and not isinstance(self.row.recording.values.get(value), torch.device):
                    found.setdefault((value, source, target), Flow(value, source, target))
            for changer, changed in self.row.recording.changed.items():
                source, target = stages[self.row.holder(value, changer)], stages[changer]
                if value in changed and source < target:
                    found.setdefault((value, source, target), Flow(value, source, target))
        order = self.row.place
        return tuple(sorted(found.values(), key=lambda flow: (flow.source, flow.target, order[flow.value])))

    @cached_property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """The pairs of stages that are no neighbours and between which a value travels."""
        pairs = {(flow.source, flow.target) for flow in self.flows}
        return tuple(sorted((a, b) for a, b in pairs if b > a + 1))

    def nodes_of(self, stage: int) -> list[fx.Node]:
        """What a stage computes, in order."""
        return [node for node in self.row.nodes if self.stage_of[node] == stage]


def _can_be_rebuilt(value: Any) -> bool:
    if isinstance(value, _TRAVELS):
        return True
    try:
        pytree.treespec_dumps(pytree.tree_structure(value))
    except NotImplementedError:
        return False
    return True


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
