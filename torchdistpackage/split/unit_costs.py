"""What each node of a row costs: the numbers from which `boundaries.py` finds the cuts of a traced model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchdistpackage.split.calls import CallCost, call_cost
from torchdistpackage.split.graph import Row
from torchdistpackage.split.operations import ASKS_FOR_GRADIENTS, arguments_of
from torchdistpackage.split.unrepeatable import as_they_were, random_as_it_was

__all__ = ["UnitCosts", "parameters_of"]

_NOTHING = CallCost(0.0, 0.0, 0, 0)


@final
class UnitCosts:
    """Measures nodes, each once: what a model costs is asked again after one of its modules has been opened.

    Args:
        model: The model; in the mode in which it is to be measured.
        timed: Whether to take the time as well as to count.
        repeats: Measurements of each node.
    """

    def __init__(self, model: nn.Module, *, timed: bool, repeats: int = 3) -> None:
        self._model, self._timed, self._repeats = model, timed, repeats
        self._known: dict[tuple[str, str, int], CallCost] = {}

    def of(self, row: Row) -> list[CallCost]:
        """One entry a node."""
        with as_they_were(self._model), random_as_it_was():
            return self._of(row)

    def _of(self, row: Row) -> list[CallCost]:
        count: Counter[tuple[str, str]] = Counter()
        found = []
        for node in row.nodes:
            kind = (node.op, str(node.target))
            key = (*kind, count[kind])
            count[kind] += 1
            if node.op == "call_module":
                if key not in self._known:
                    self._known[key] = self._measure(row, node)
                found.append(self._known[key])
            else:  # counted anew: names of functions say little, and they are cheap
                alone = not row.rides(node) and not node.meta.get("inside") and "nesting" not in str(node.target)
                found.append(self._measure(row, node) if alone else _NOTHING)
        return found

    def _measure(self, row: Row, node: fx.Node) -> CallCost:
        values = row.recording.values
        if node not in values or node.target in ASKS_FOR_GRADIENTS:
            return _NOTHING
        args, kwargs = arguments_of(node, {n: _as_leaf(values[n], n in row.trained) for n in node.all_input_nodes})
        function: Any = node.target
        if node.op == "call_module":
            function = self._model.get_submodule(str(node.target))
        elif node.op == "call_method":
            function = getattr(type(args[0]), str(node.target))
        held = [n for n in node.all_input_nodes if n.op == "get_attr"]
        options: dict[str, Any] = {
            "parameters": [p for n in held for p in _tensors_of(values[n])],
            "repeats": self._repeats,
            "timed": self._timed,
        }
        try:
            return call_cost(function, args, kwargs, **options, input_gradients="required")
        except RuntimeError:  # its backward cannot be asked for alone (reentrant checkpoints): twice its forward
            cost = call_cost(function, args, kwargs, **options, grad=False)
            return replace(cost, backward=2 * cost.forward)


def _as_leaf(value: Any, trained: bool) -> Any:
    """A value as it comes in training: with or without a gradient to give back."""

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.clone() if tensor.is_inference() else tensor.detach()
        return copy.requires_grad_() if copy.is_floating_point() or copy.is_complex() else copy

    plain = not trained or isinstance(value, (nn.Module, nn.Parameter))
    return value if plain else pytree.tree_map_only(Tensor, leaf, value)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    else:
        yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def parameters_of(model: nn.Module, row: Row) -> list[list[nn.Parameter]]:
    """The parameters that each node uses; one that several nodes use is at the first of them only."""
    seen: set[int] = set()
    found = []
    for node in row.nodes:
        mine: list[nn.Parameter] = []
        if node.op == "call_module":
            mine += model.get_submodule(str(node.target)).parameters()
        for n in node.all_input_nodes:
            if n.op == "get_attr":
                mine += [p for p in _tensors_of(row.recording.values.get(n)) if isinstance(p, nn.Parameter)]
        new = list({id(p): p for p in mine if id(p) not in seen}.values())
        seen.update(map(id, new))
        found.append(new)
    return found
