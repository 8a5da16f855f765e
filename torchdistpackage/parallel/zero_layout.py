"""Which rank owns which elements: the arithmetic of a sharded optimizer, without tensors and processes.

The trainable parameters of one kind (parameter group, dtype, device) lie one after another, and are cut into buckets.
A bucket is what one collective moves; each of its ranks owns one chunk of it::

    parameters   | a a a a a a | b b b | c c c c c |              bucket_size = 8, 2 ranks
    buckets      | a a a a a a   b b | b   c c c c c |
    owned by     | 0 0 0 0 1 1   1 1 | 0   0 0 1 1 1 |            by elements: chunks of equal size, the last one padded
    owned by     | 0 0 0 0 0 0 |     | 1 1 1 | 1 1 1 1 1 |        by parameters: whole ones, the largest first

By elements a rank owns 1/d whatever the sizes are. One bucket (the default size is larger than most models) is the
plain partition: rank i of d owns elements [i * n / d, (i + 1) * n / d).

Neighbours: `zero_buckets.py` puts tensors into these places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

__all__ = ["BucketLayout", "Slot", "by_elements", "by_parameters"]


@final
@dataclass(frozen=True)
class Slot:
    """Elements [start, stop) of a parameter, which lie at `at` of a bucket.

    Attributes:
        parameter: Its number.
        start: First element, as the parameter is read row by row.
        stop: One after the last.
        at: Place of the first one in the bucket.
    """

    parameter: int
    start: int
    stop: int
    at: int

    @property
    def numel(self) -> int:
        """How many."""
        return self.stop - self.start


@final
@dataclass(frozen=True)
class BucketLayout:
    """One bucket.

    Attributes:
        slots: What lies in it, in order, without gaps.
        bounds: Rank r owns places [bounds[r], bounds[r + 1]); d + 1 entries. What lies behind the last slot is padding.
    """

    slots: tuple[Slot, ...]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Places, with padding."""
        return self.bounds[-1]

    @property
    def even(self) -> bool:
        """Whether all ranks own equally many.

        Example:
            >>> BucketLayout((), (0, 2, 4, 6)).even, BucketLayout((), (0, 2, 3, 6)).even
            (True, False)
        """
        return len({high - low for low, high in pairwise(self.bounds)}) == 1

    def owned(self, rank: int) -> list[Slot]:
        """What a rank owns: the slots, cut to its chunk.

        Example:
            >>> layout = by_elements({0: 6, 1: 2}, num_ranks=2, bucket_size=8)[0]
            >>> layout.owned(1)
            [Slot(parameter=0, start=4, stop=6, at=4), Slot(parameter=1, start=0, stop=2, at=6)]
        """
        low, high = self.bounds[rank], self.bounds[rank + 1]
        found = []
        for slot in self.slots:
            first, last = max(slot.at, low), min(slot.at + slot.numel, high)
            if first < last:
                shift = slot.start - slot.at
                found.append(Slot(slot.parameter, first + shift, last + shift, first))
        return found


def by_elements(
    numels: Mapping[int, int], *, num_ranks: int, bucket_size: int, whole: bool = False
) -> list[BucketLayout]:
    """Cuts buckets of `bucket_size` elements, each of which all ranks share equally.

    Args:
        numels: Number of a parameter -> its elements, in order.
        num_ranks: d.
        bucket_size: In elements, before padding.
        whole: A parameter lies in one bucket, which then may be larger: what is reduced during the backward.

    Example:
        >>> [layout.bounds for layout in by_elements({0: 6, 1: 3, 2: 5}, num_ranks=2, bucket_size=8)]
        [(0, 4, 8), (0, 3, 6)]
    """
    buckets: list[list[Slot]] = [[]]
    used = 0
    for number, numel in numels.items():
        start = 0
        while start < numel:
            if used and used + (numel if whole else 1) > bucket_size:
                buckets.append([])
                used = 0
            count = numel if whole else min(numel - start, bucket_size - used)
            buckets[-1].append(Slot(number, start, start + count, used))
            start, used = start + count, used + count
    return [_shared_equally(slots, num_ranks) for slots in buckets if slots]


def _shared_equally(slots: list[Slot], num_ranks: int) -> BucketLayout:
    chunk = -(-(slots[-1].at + slots[-1].numel) // num_ranks)
    return BucketLayout(tuple(slots), tuple(range(0, chunk * num_ranks + 1, chunk)))


def by_parameters(numels: Mapping[int, int], *, bucket_size: int, loads: list[int]) -> list[BucketLayout]:
    """Gives whole parameters to ranks, the largest first, each to the rank that has the least.

    Args:
        numels: Number of a parameter -> its elements, in order.
        bucket_size: In elements; a larger parameter has a bucket of its own.
        loads: The elements that each rank has already, an entry a rank; is changed.

    Example:
        >>> [layout.bounds for layout in by_parameters({0: 6, 1: 3, 2: 5}, bucket_size=9, loads=[0, 0])]
        [(0, 6, 9), (0, 0, 5)]
    """
    owners: dict[int, int] = {}
    for number in sorted(numels, key=lambda number: -numels[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += numels[number]
    buckets: list[list[int]] = [[]]
    for number, numel in numels.items():
        if buckets[-1] and sum(numels[other] for other in buckets[-1]) + numel > bucket_size:
            buckets.append([])
        if numel:
            buckets[-1].append(number)
    return [_by_owner(numbers, numels, owners, len(loads)) for numbers in buckets if numbers]


def _by_owner(numbers: list[int], numels: Mapping[int, int], owners: Mapping[int, int], num_ranks: int) -> BucketLayout:
    ordered = sorted(numbers, key=lambda number: owners[number])
    places = accumulate((numels[number] for number in ordered), initial=0)
    slots = tuple(Slot(number, 0, numels[number], at) for number, at in zip(ordered, places, strict=False))
    sizes = [sum(numels[number] for number in numbers if owners[number] == rank) for rank in range(num_ranks)]
    return BucketLayout(slots, tuple(accumulate(sizes, initial=0)))
