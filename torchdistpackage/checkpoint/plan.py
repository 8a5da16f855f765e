"""Who writes what: of every box that several ranks hold, one rank writes it, so that all have about as much to do.

::

    rank 0   embed [a], block.0 [b] [c]        holds a b c      writes a c          a, b, c: boxes; ranks 0 and 1 are
    rank 1   embed [a], block.0 [b] [c]        holds a b c      writes b            replicas of one stage
    rank 2   head (= embed) [a'], block.1 [d]  holds a' d       writes d            a' is a's twin on another stage

Parameters and the optimizer's state go to the holder with the fewest bytes so far; replicas hold the same bits. Buffers
go to the first holder: replicas may differ there, and DistributedDataParallel takes its first rank's. What two stages
hold is taken from the first of them whose boxes make up the whole tensor.

Plain data and arithmetic: every rank is told what all hold, and comes to the same plan by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, final

import torch

from torchdistpackage.checkpoint.boxes import Box, tiling_fault
from torchdistpackage.checkpoint.parts import Part
from torchdistpackage.errors import CheckpointError

__all__ = ["Chosen", "Listing", "choose_writers", "listing", "total_bytes"]

Place: TypeAlias = tuple[int, int]  # in the pipeline, and among the ranks that share out experts
Listing: TypeAlias = "dict[str, Any]"  # what one rank holds, as JSON can say it


@final
@dataclass(frozen=True)
class Chosen:
    """One box that a rank writes.

    Attributes:
        key: Of the tensor.
        dtype: Of the tensor, as "float32".
        shape: Of the whole tensor.
        box: The box.
        part: The number of the part among those that the rank listed.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    part: int


def listing(place: Place, parts: Sequence[Part]) -> Listing:
    """What a rank tells the others about its parts.

    Args:
        place: The rank's: ranks with equal ones are replicas, or shards of one another.
        parts: All of its parts.
    """
    return {
        "place": place,
        "parts": [_told(one, place) for one in parts],
    }


def _told(part: Part, place: Place) -> list[Any]:
    expert = place[1] if part.expert else 0
    box, dtype = part.box, str(part.tensor.dtype).removeprefix("torch.")
    return [part.key, dtype, part.shape, box.offsets, box.sizes, part.kind, part.tied, place[0], expert]


def choose_writers(everyone: Sequence[Listing]) -> list[list[Chosen]]:
    """What each rank writes.

    Args:
        everyone: What each rank holds, in the order of the ranks.

    Returns:
        A list a rank, in the order of its parts.

    Raises:
        CheckpointError: One name is two parameters, or has two shapes or dtypes, or its boxes have gaps or overlap.
    """
    keys: dict[str, _Key] = {}
    for rank, told in enumerate(everyone):
        for number, (key, dtype, shape, offsets, sizes, kind, tied, *where) in enumerate(told["parts"]):
            entry = keys.setdefault(key, _Key(key, dtype, tuple(shape), kind, {}, {}))
            entry.check(rank, dtype, tuple(shape))
            box = Box(tuple(offsets), tuple(sizes))
            place = (where[0], where[1])
            entry.places.setdefault(place, {}).setdefault(box, []).append((rank, number))
            entry.tied[place] = entry.tied.get(place, True) and tied
    loads = [0] * len(everyone)
    found: list[list[Chosen]] = [[] for _ in everyone]
    for entry in keys.values():
        itemsize = _itemsize(entry.dtype)
        for box, holders in entry.chosen_place().items():
            rank, number = holders[0] if entry.kind == "buffer" else min(holders, key=lambda one: (loads[one[0]], one))
            loads[rank] += box.numel * itemsize
            found[rank].append(Chosen(entry.key, entry.dtype, entry.shape, box, number))
    return [sorted(mine, key=lambda one: one.part) for mine in found]


@dataclass
class _Key:
    """One tensor, and who holds which boxes of it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    places: dict[Place, dict[Box, list[tuple[int, int]]]]  # place -> box -> [(rank, number of its part)]
    tied: dict[Place, bool]

    def check(self, rank: int, dtype: str, shape: tuple[int, ...]) -> None:
        if (dtype, shape) != (self.dtype, self.shape):
            other = self._first_rank()
            raise CheckpointError(
                f"{self.key} is {self.dtype} {self.shape} on rank {other} and {dtype} {shape} on rank {rank}; one "
                "name must be one tensor on all ranks: use the same model and dtype, and names of the whole model"
            )

    def chosen_place(self) -> dict[Box, list[tuple[int, int]]]:
        """The boxes of the first place in the pipeline that has all of the tensor.

        Raises:
            CheckpointError: No place has all of it, or two places have parameters of that name that are not tied.
        """
        if self.kind == "parameter" and len(self.places) > 1 and not all(self.tied.values()):
            first, second, *_ = sorted(self.places)
            ranks = [min(rank for holders in self.places[at].values() for rank, _ in holders) for at in (first, second)]
            hint = (
                "Give every stage its whole-model names: flatten_model, partition_chunks, partition_causal_lm and "
                "split_model do, and note ties. In modules that you cut by hand give attributes the names that they "
                "have in the whole model, or pass {stage: module}, whose names begin with the number of the stage"
                if first[0] != second[0]
                else "Name experts by their number in the whole model, not by their number on the rank"
            )
            raise CheckpointError(
                f"{self.key} is a parameter of rank {ranks[0]} (place {first[0]} in the pipeline) and of rank "
                f"{ranks[1]} (place {second[0]}), but no tie of the two is known. {hint}"
            )
        faults = {place: tiling_fault(self.shape, boxes) for place, boxes in sorted(self.places.items())}
        for place, fault in faults.items():
            if fault is None:
                return self.places[place]
        place, fault = next(iter(faults.items()))
        raise CheckpointError(
            f"the ranks at place {place[0]} of the pipeline do not hold {self.key} {self.shape} once: {fault}. "
            "Construct the Checkpointer on every rank, with all of that rank's modules and optimizers"
        )

    def _first_rank(self) -> int:
        return min(rank for boxes in self.places.values() for holders in boxes.values() for rank, _ in holders)


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def total_bytes(shape: Sequence[int], dtype: str) -> int:
    """Of a whole tensor.

    Example:
        >>> total_bytes((2, 3), "float32")
        24
    """
    return prod(shape) * _itemsize(dtype)
