"""Where the local part of a DTensor lies in the whole one: boxes, for any placements that torch and this library make.

In every dim the rows of the whole tensor are dealt out over the mesh, and followed here as runs of numbers::

    Shard(0) over 2                              0 1 2 3 4 5   ->  rank 1: 3 4 5                 one run
    Shard(0) over 4 of 6 rows                    0 1 2 3 4 5   ->  2 | 2 | 2 | nothing           as torch.chunk deals
    _StridedShard(0, split_factor=3) over 2      q q k k v v   ->  rank 0: q . k . v .           three runs
    [_StridedShard(0, sf=2), Shard(0)]           fully_shard of a tensor-parallel shard: the right one deals first
    [Shard(0), _StridedShard(0, sf=3)]           refused: torch has no name for the order that fully_shard makes of it

Several runs in a dim are several boxes. `torch.distributed.tensor` computes the offsets of one box only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeAlias, final

from torch import Tensor

from torchdistpackage.checkpoint.boxes import Box, whole_box
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.model_tensors import is_dtensor, local_tensor

__all__ = ["Run", "local_boxes"]

Rows: TypeAlias = list[range]  # of the whole tensor, in the order in which the local one has them


@final
@dataclass(frozen=True)
class Run:
    """A part of the local tensor that lies together in the whole one.

    Attributes:
        local: In the local tensor.
        shift: What is to be added to offsets to find it in the whole one, one a dim.
    """

    local: Box
    shift: tuple[int, ...]


def local_boxes(name: str, tensor: Tensor) -> list[Run]:
    """Where this rank's elements lie; one run for a tensor that is no DTensor, none where a rank holds nothing.

    Args:
        name: For the error.
        tensor: Any.

    Raises:
        CheckpointError: The placement is Partial, or one that is not known.

    Example:
        >>> import torch
        >>> local_boxes("bias", torch.zeros(3))
        [Run(local=Box(offsets=(0,), sizes=(3,)), shift=(0,))]
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return [Run(whole_box(shape), (0,) * len(shape))]
    rows = [_rows_of(name, tensor, dim) for dim in range(len(shape))]
    counts = tuple(sum(len(run) for run in runs) for runs in rows)
    if counts != tuple(local_tensor(tensor).shape):
        raise _unknown(name, tensor)
    found = []
    for runs in product(*(_placed(dealt) for dealt in rows)):
        local = Box(tuple(at for at, _ in runs), tuple(len(run) for _, run in runs))
        if local.numel or not prod(shape):
            found.append(Run(local, tuple(run.start - at for at, run in runs)))
    return found


def _placed(rows: Rows) -> list[tuple[int, range]]:
    """Each run with its place in the local tensor."""
    found, at = [], 0
    for run in rows:
        found.append((at, run))
        at += len(run)
    return found or [(0, range(0))]


def _rows_of(name: str, tensor: Any, dim: int) -> Rows:
    """The rows of the whole tensor in one dim that this rank has."""
    mesh, where = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if any(place.is_partial() for place in tensor.placements) or where is None:
        raise _unknown(name, tensor)
    rows: Rows = [range(tensor.shape[dim])]
    for at, strided in _dealing_order(name, tensor, dim):
        rows = _dealt(rows, mesh.size(at), where[at], strided)
    return rows


def _dealing_order(name: str, tensor: Any, dim: int) -> list[tuple[int, int]]:
    """The mesh dims that share out a dim of the tensor, in the order in which they do; and into how many parts."""
    count, order, later = tensor.dim(), [], []
    for at, place in enumerate(tensor.placements):
        of = getattr(place, "dim", None)
        if of is None or of % count != dim:
            continue
        factor = getattr(place, "split_factor", None) if type(place).__name__ == "_StridedShard" else None
        if factor is None or factor == 1:
            order.append((at, 1))
            continue
        others = [
            other for other, its in enumerate(tensor.placements) if getattr(its, "dim", None) == of and other != at
        ]
        if not others:
            order.append((at, factor))
        elif prod(tensor.device_mesh.size(other) for other in others if other > at) == factor:
            later.append((at, 1))  # what is right of it deals first
        else:
            raise _unknown(name, tensor)
    return order + later[::-1]


def _dealt(rows: Rows, ranks: int, rank: int, parts: int) -> Rows:
    """One rank's rows: of each of some equal parts its chunk, as torch.chunk cuts it."""
    total = sum(len(run) for run in rows)
    found: Rows = []
    each = -(-total // parts)
    for part in range(parts):
        low, high = part * each, min((part + 1) * each, total)
        chunk = -(-(high - low) // ranks)
        found += _cut(rows, min(low + rank * chunk, high), min(low + (rank + 1) * chunk, high))
    return found


def _cut(rows: Rows, low: int, high: int) -> Rows:
    """The rows number low to high."""
    found, at = [], 0
    for run in rows:
        first, last = max(low - at, 0), min(high - at, len(run))
        if first < last:
            found.append(run[first:last])
        at += len(run)
    return found


def _unknown(name: str, tensor: Any) -> CheckpointError:
    return CheckpointError(
        f"{name} is a DTensor {tuple(tensor.shape)} with placements {tuple(tensor.placements)} on a mesh of "
        f"{tuple(tensor.device_mesh.shape)}, of which this rank holds {tuple(local_tensor(tensor).shape)}: its rows "
        "cannot be told. Redistribute it to Shard or Replicate placements before saving or loading"
    )
