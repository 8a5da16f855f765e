"""The arithmetic of checkpoints: what a rank holds of a tensor is a few boxes of it, and boxes fit any layout.

::

    whole tensor, 4 x 6          Shard(0), rank 1 of 2        elements [8, 21) of a flat one: three boxes

    . . . . . .                  . . . . . .                  . . . . . .
    . . . . . .                  . . . . . .                  . . a a a a       offsets (1, 2), sizes (1, 4)
    . . . . . .                  a a a a a a                  b b b b b b       offsets (2, 0), sizes (1, 6)
    . . . . . .                  a a a a a a                  c c c . . .       offsets (3, 0), sizes (1, 3)

A box is a plain slice in every dim. Saving writes boxes that tile the tensor; loading reads, for each box that is
wanted, the overlap with each box that was written. Neither needs to know what the other's layout was called.

No tensors and no processes here; `parts.py` has the tensors, `plan.py` chooses who writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

__all__ = ["Box", "boxes_of_range", "tiling_fault", "whole_box"]


@final
@dataclass(frozen=True, order=True)
class Box:
    """A part of a tensor: in each dim the indices from the offset to offset + size.

    Attributes:
        offsets: Of the first element, one a dim.
        sizes: Elements in each dim.

    Example:
        >>> Box((2, 0), (2, 6)).numel
        12
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What both have; None if nothing. Two boxes without dims are the same one element.

        Example:
            >>> Box((0, 0), (2, 6)).overlap(Box((1, 2), (1, 4)))
            Box(offsets=(1, 2), sizes=(1, 4))
        """
        low, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            first, last = max(a, b), min(a + n, b + m)
            if first >= last:
                return None
            low.append(first)
            sizes.append(last - first)
        return Box(tuple(low), tuple(sizes))

    def moved(self, by: Sequence[int]) -> Box:
        """The box, somewhere else.

        Example:
            >>> Box((1,), (2,)).moved([3])
            Box(offsets=(4,), sizes=(2,))
        """
        return Box(tuple(at + step for at, step in zip(self.offsets, by, strict=True)), self.sizes)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it lies in a tensor that holds the outer box.

        Example:
            >>> Box((4, 0), (2, 3)).within(Box((4, 0), (4, 3)))
            (slice(0, 2, None), slice(0, 3, None))
        """
        begins = [mine - base for mine, base in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.sizes, strict=True))


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor.

    Example:
        >>> whole_box([2, 3])
        Box(offsets=(0, 0), sizes=(2, 3))
    """
    return Box((0,) * len(shape), tuple(shape))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements [start, stop), counted row by row, as boxes: at most 2(n-1)+1 for n dims, in the order of the elements.

    Each is itself a row of elements without gaps, so that a flat tensor of the range can be viewed as the boxes one
    after another.

    Args:
        shape: Of the whole tensor.
        start: First element.
        stop: One after the last.

    Example:
        >>> [(box.offsets, box.sizes) for box in boxes_of_range((4, 6), 8, 21)]
        [((1, 2), (1, 4)), ((2, 0), (1, 6)), ((3, 0), (1, 3))]
    """
    if stop <= start:
        return []
    if not shape:
        return [Box((), ())]
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the rows [first, last) are whole
    if first > last:  # inside of one row
        return _in_row(shape, last, start - last * inner, stop - last * inner)
    found = _in_row(shape, first - 1, start - (first - 1) * inner, inner) if start < first * inner else []
    if first < last:
        found.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + _in_row(shape, last, 0, stop - last * inner)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    inner = boxes_of_range(shape[1:], start, stop)
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in inner]


def tiling_fault(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """What keeps boxes from being the whole tensor, each element once; None if nothing.

    Args:
        shape: Of the whole tensor.
        boxes: In any order.

    Example:
        >>> tiling_fault((4,), [Box((0,), (2,)), Box((3,), (1,))])
        '3 of its 4 elements'
        >>> tiling_fault((4,), [Box((0,), (3,)), Box((2,), (2,))])
        'elements twice: from (0,) to (3,) overlaps from (2,) to (4,)'
    """
    found = [box for box in boxes if box.numel]
    for box in found:
        if any(a < 0 or a + n > size for a, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            return f"elements outside of its shape {tuple(shape)}: {_words(box)}"
    if double := _first_overlap(found):
        return f"elements twice: {_words(double[0])} overlaps {_words(double[1])}"
    held = sum(box.numel for box in found)
    return None if held == prod(shape) else f"{held:,} of its {prod(shape):,} elements"


def _first_overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two that overlap. A sweep along the dim with most cuts: next to linear for shards and for ranges."""
    if len(boxes) < 2:
        return None
    dims = range(len(boxes[0].sizes))
    along = max(dims, key=lambda dim: len({box.offsets[dim] for box in boxes}), default=None)
    if along is None:
        return boxes[0], boxes[1]
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[along]):
        active = [one for one in active if one.offsets[along] + one.sizes[along] > box.offsets[along]]
        for one in active:
            if one.overlap(box) is not None:
                return one, box
        active.append(box)
    return None


def _words(box: Box) -> str:
    return f"from {box.offsets} to {tuple(a + n for a, n in zip(box.offsets, box.sizes, strict=True))}"
