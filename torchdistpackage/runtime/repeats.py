"""Which tensors of a message are the same object as in the message before: they need not travel again.

A mask or a table of positions that every micro-batch passes on is one tensor in the user's code. What says that it has
not changed: it is the same object, its version counter is the same, and on the CPU, where looking is cheaper than
sending, its numbers are (a write through `.data` or numpy does not count as a version). Tensors that want a gradient
always travel: each micro-batch has its own gradient to give back.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, final

from torch import Tensor
from torch import equal as same_numbers

from torchdistpackage.runtime.layout import Travel

__all__ = ["Repeats"]

_Place = tuple[int, int]  # kind of message, the sender's stage


class _Value(NamedTuple):
    """A tensor as it was in the last message."""

    tensor: weakref.ref[Tensor]
    version: int
    numbers: Tensor | None  # what the receiver keeps; None if it keeps nothing, or if comparing would stop a device
    kept: bool

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor of the next message is this one, unchanged."""
        if self.tensor() is not tensor or tensor._version != self.version:
            return False
        return self.numbers is None or same_numbers(tensor, self.numbers)


@final
class Repeats:
    """What one outlet has sent in this step, and what it has learnt in earlier ones.

    Example:
        >>> import torch
        >>> repeats, mask = Repeats(), torch.ones(3)
        >>> [repeats.travels((0, 0), [torch.zeros(2), mask]) for _ in range(3)]
        [(0, 0), (0, 1), (0, 2)]
        >>> repeats.begin_step()
        >>> [repeats.travels((0, 0), [torch.zeros(2), mask]) for _ in range(3)]
        [(0, 1), (0, 2), (0, 2)]
    """

    def __init__(self) -> None:
        self._last: dict[_Place, dict[int, _Value]] = {}
        self._learnt: dict[_Place, set[int]] = {}

    def begin_step(self) -> None:
        """Forgets the values, not which places in a message repeat: the receiver keeps nothing over a step either."""
        self._last = {}

    def travels(self, place: _Place, leaves: list[Any]) -> tuple[int, ...]:
        """For each leaf of the next message, how its tensor travels.

        Args:
            place: Kind of message, and the sender's stage.
            leaves: Tensors and constants.
        """
        last, learnt = self._last.setdefault(place, {}), self._learnt.setdefault(place, set())
        found = []
        for at, leaf in enumerate(leaves):
            travel: int = Travel.ALWAYS
            if isinstance(leaf, Tensor) and not leaf.requires_grad and not leaf.is_inference():
                travel = self._travel(at, leaf, last, learnt)
            found.append(int(travel))
        return tuple(found)

    def _travel(self, at: int, leaf: Tensor, last: dict[int, _Value], learnt: set[int]) -> int:
        before = last.get(at)
        if before is not None and before.is_still(leaf):
            if before.kept:
                return Travel.KEPT
            learnt.add(at)
        elif before is not None and before.kept:
            learnt.discard(at)  # it was kept for nothing
        kept = at in learnt
        numbers = leaf.detach().clone() if kept and leaf.device.type == "cpu" else None
        last[at] = _Value(weakref.ref(leaf), leaf._version, numbers, kept)
        return Travel.KEEP if kept else Travel.ALWAYS
