"""Which elements of a model each rank of a group averages: arithmetic, without processes.

The parameters of one dtype that the same ranks hold lie behind each other in one line, and the line is cut into equal
parts, wherever a parameter begins or ends::

    embedding.weight                                                      | fc.weight | fc.bias
    |------ rank 0 ------|------ rank 1 ------|------ rank 2 ------|------ rank 3 ------------|

A cut inside a parameter falls on a multiple of 64 of its elements. For bfloat16 and float16, torch's kernels on the
CPU round an element in the last incomplete vector of a tensor more often than its other elements; a cut between two
vectors leaves every element where it was, and so every bit of its average.

Of a DTensor, a rank holds a box. Ranks of the group whose boxes are equal (tensor parallel: all of the data group)
share the elements of the box; one that is alone with its box (`fully_shard`) averages all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias, final

import torch

from torchdistpackage.errors import CheckpointError

__all__ = ["Box", "Entry", "Layout", "Segment"]

_VECTORS = 64  # elements: two AVX-512 vectors of 16-bit numbers, which torch's loops take at a time


Kind: TypeAlias = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Entry:
    """One tensor of a model, alike on every rank of the group.

    Attributes:
        names: All of its names; a tied parameter has several.
        shape: Of the whole tensor.
        dtype: In which it is held.
        order: Its dims from the outermost to the innermost in memory.
        is_parameter: Or else a buffer.
        placement: Of a DTensor, how it lies on which mesh, for those that lie alike; "" if every rank holds it whole.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    is_parameter: bool
    placement: str = ""

    @property
    def kind(self) -> Kind:
        """Entries of one kind are cut into the same boxes."""
        return self.shape, self.placement

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]


@dataclass(frozen=True)
class Box:
    """A part of a tensor: in each dim the indices from `offset` to `offset + size`."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.size)

    @property
    def end(self) -> tuple[int, ...]:
        """The index behind the last one, in each dim."""
        return tuple(map(sum, zip(self.offset, self.size, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it is in a tensor that holds the outer box.

        Example:
            >>> Box((4, 0), (2, 3)).within(Box((4, 0), (4, 3)))
            (slice(0, 2, None), slice(0, 3, None))
        """
        begins = [mine - base for mine, base in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(begin, begin + size) for begin, size in zip(begins, self.size, strict=True))


@dataclass(frozen=True)
class Segment:
    """Elements `begin` to `end` of a rank's box of an entry, counted in the order of memory."""

    entry: int
    begin: int
    end: int


@final
class Layout:
    """What every rank of a group holds.

    Args:
        entries: The tensors of the model.
        size: Ranks in the group.
        boxes: For every kind of DTensor among the entries, the box of each rank.

    Raises:
        CheckpointError: The boxes of an entry do not make up a box.

    Example:
        >>> weight = Entry(("weight",), (4, 64), torch.float32, (0, 1), True)
        >>> [Layout([weight], 2, {}).segments(rank) for rank in range(2)]
        [(Segment(entry=0, begin=0, end=128),), (Segment(entry=0, begin=128, end=256),)]
    """

    def __init__(self, entries: Sequence[Entry], size: int, boxes: Mapping[Kind, Sequence[Box]]) -> None:
        self.entries, self.size, self._boxes = tuple(entries), size, boxes
        self._everyone = tuple(range(size))
        self._holders: dict[Kind, dict[Box, tuple[int, ...]]] = {}
        for kind, found in boxes.items():
            holders: dict[Box, list[int]] = {}
            for rank, box in enumerate(found):
                holders.setdefault(box, []).append(rank)
            self._holders[kind] = {box: tuple(ranks) for box, ranks in holders.items()}
        for index, entry in enumerate(entries):
            held = self._holders.get(entry.kind, {})
            if held and sum(box.numel for box in held) != self.bounds(index).numel:
                raise CheckpointError(
                    f"the parts of {entry.name} that the {size} ranks of the group hold do not make up a whole block "
                    "of it; pass the data group, tpc.get_group('data'), or the group of one dim of its mesh (shards of "
                    "fused layers, such as q, k and v in one, interleave over the tensor group)"
                )

    def box(self, index: int, rank: int) -> Box:
        """What a rank holds of an entry."""
        entry = self.entries[index]
        if entry.placement:
            return self._boxes[entry.kind][rank]
        return Box((0,) * len(entry.shape), entry.shape)

    def bounds(self, index: int) -> Box:
        """What the ranks of the group together hold of an entry."""
        held = [box for box in self._holders.get(self.entries[index].kind, {}) if box.numel]
        if not held:
            return self.box(index, 0)
        low = [min(at) for at in zip(*(box.offset for box in held), strict=True)]
        high = [max(at) for at in zip(*(box.end for box in held), strict=True)]
        return Box(tuple(low), tuple(end - begin for begin, end in zip(low, high, strict=True)))

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What a rank averages."""
        lines: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
        for index, entry in enumerate(self.entries):
            if entry.is_parameter:
                lines.setdefault((entry.dtype, self._held_by(index, rank)), []).append(index)
        found: list[Segment] = []
        for (_, ranks), members in lines.items():
            sizes = [self.box(index, rank).numel for index in members]
            part = ranks.index(rank)
            low, high = _cut(sizes, len(ranks), part), _cut(sizes, len(ranks), part + 1)
            start = 0
            for index, size in zip(members, sizes, strict=True):
                begin, end = max(low - start, 0), min(high - start, size)
                if begin < end:
                    found.append(Segment(index, begin, end))
                start += size
        return tuple(found)

    def nbytes(self, rank: int) -> int:
        """Bytes of the segments of a rank."""
        return sum((one.end - one.begin) * self.entries[one.entry].dtype.itemsize for one in self.segments(rank))

    @cached_property
    def shares(self) -> bool:
        """Whether any rank averages only a part of what it holds."""
        kinds = {entry.kind for entry in self.entries if entry.is_parameter}
        parted = any(len(ranks) > 1 for kind in kinds for ranks in self._holders.get(kind, {}).values())
        return parted or (self.size > 1 and any(kind not in self._holders for kind in kinds))

    def _held_by(self, index: int, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same of an entry as this one."""
        kind = self.entries[index].kind
        return self._holders[kind][self._boxes[kind][rank]] if kind in self._holders else self._everyone


def _cut(sizes: Sequence[int], parts: int, at: int) -> int:
    """The place in the line, in elements, at which part `at` of `parts` begins."""
    if at == parts:
        return sum(sizes)
    target, start = sum(sizes) * at // parts, 0
    for size in sizes:
        if target <= start + size:
            return start + min(size, (target - start + _VECTORS // 2) // _VECTORS * _VECTORS)
        start += size
    return start
