"""The tensors of checkpoints: a part is a view of this rank's memory, and the box of the whole tensor that it is.

::

    plain tensor              one part, the whole tensor
    DTensor                   one part; several where its rows are strided (q, k and v in one, each sharded)
    elements [a, b) of one    what a rank of `Bf16ZeroOptimizer` owns: a few parts, see `boxes.py`
    a block of one            what a rank of `ShardedEMA` averages

Parts are written from and read into as they are: no whole tensor is ever put together. Neighbours: `local_boxes.py`
says where the local part of a DTensor lies; `plan.py` chooses which rank writes which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

from torch import Tensor

from torchdistpackage.checkpoint.boxes import Box, boxes_of_range, whole_box
from torchdistpackage.checkpoint.local_boxes import local_boxes
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.model_tensors import is_dtensor, local_tensor

__all__ = ["Part", "parts_of", "parts_of_block", "parts_of_range"]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One box of one tensor, in this rank's memory.

    Attributes:
        key: Of the tensor in the checkpoint.
        shape: Of the whole tensor.
        box: Which part of it.
        tensor: The values; a view, with the sizes of the box.
        kind: "parameter", "buffer" or "state": who writes it if several ranks hold it, see `plan.py`.
        tied: Whether other stages may hold it, too.
        expert: Whether ranks of one expert-parallel group hold different ones.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    kind: str = "parameter"
    tied: bool = False
    expert: bool = False

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.tensor.numel() * self.tensor.element_size()


def parts_of(key: str, tensor: Tensor, *, kind: str = "parameter", tied: bool = False) -> list[Part]:
    """A whole tensor, or what this rank holds of a DTensor.

    Args:
        key: In the checkpoint.
        tensor: Dense, on any device; it is not copied.
        kind: See `Part`.
        tied: See `Part`.

    Raises:
        CheckpointError: It has no values, is sparse, or is a sum over ranks that was not made (Partial).

    Example:
        >>> import torch
        >>> [part.box for part in parts_of("model.weight", torch.zeros(2, 3))]
        [Box(offsets=(0, 0), sizes=(2, 3))]
    """
    check_dense(key, tensor)
    local = local_tensor(tensor.detach())
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return [Part(key, shape, whole_box(shape), local, kind, tied)]  # by far the most: no view is made
    return [
        Part(key, shape, run.local.moved(run.shift), local[run.local.within(whole_box(local.shape))], kind, tied)
        for run in local_boxes(key, tensor)
    ]


def parts_of_range(
    key: str,
    whole: Tensor,
    start: int,
    stop: int,
    values: Tensor,
    *,
    kind: str = "state",
    tied: bool = False,
) -> list[Part]:
    """Elements [start, stop) of a tensor, or of this rank's part of a DTensor, counted row by row.

    Args:
        key: In the checkpoint.
        whole: The tensor of which they are elements; its values do not matter.
        start: First element.
        stop: One after the last.
        values: stop - start values without gaps.
        kind: See `Part`.
        tied: See `Part`.

    Raises:
        CheckpointError: The number of values is another one, or they have gaps.

    Example:
        >>> import torch
        >>> [part.tensor.tolist() for part in parts_of_range("w", torch.zeros(2, 3), 2, 6, torch.arange(4))]
        [[[0]], [[1, 2, 3]]]
    """
    if values.numel() != stop - start or not values.is_contiguous():
        raise CheckpointError(
            f"{key}: {values.numel()} values, contiguous {values.is_contiguous()}, for elements {start} to {stop}; "
            "this optimizer's state is not laid out as its parameters, save it with its own state_dict"
        )
    flat, at = values.detach().view(-1), 0
    shape, runs = tuple(whole.shape), local_boxes(key, whole)
    found = []
    for box in boxes_of_range(tuple(local_tensor(whole).shape), start, stop):
        view = flat[at : at + box.numel].view(box.sizes)
        at += box.numel
        for run in runs:
            if (common := run.local.overlap(box)) is not None:
                inside = view[common.within(box)]
                found.append(Part(key, shape, common.moved(run.shift), inside, kind, tied))
    return found


def parts_of_block(
    key: str, shape: Sequence[int], block: Box, order: Sequence[int], start: int, values: Tensor, *, kind: str = "state"
) -> list[Part]:
    """Values in the order of memory, from element `start` on, of a block of a tensor.

    Args:
        key: In the checkpoint.
        shape: Of the whole tensor.
        block: The block.
        order: Its dims from the outermost to the innermost in memory.
        start: The first element's number in that order.
        values: Without gaps.
        kind: See `Part`.

    Example:
        >>> import torch
        >>> part, = parts_of_block("w", (2, 3), Box((0, 0), (2, 3)), (1, 0), 2, torch.arange(2))
        >>> part.box, part.tensor.tolist()
        (Box(offsets=(0, 1), sizes=(2, 1)), [[0], [1]])
    """
    flat, at = values.detach().view(-1), 0
    places = [order.index(dim) for dim in range(len(order))]
    found = []
    for box in boxes_of_range([block.sizes[dim] for dim in order], start, start + values.numel()):
        view = flat[at : at + box.numel].view(box.sizes).permute(places)
        at += box.numel
        inside = Box(tuple(box.offsets[place] for place in places), tuple(box.sizes[place] for place in places))
        found.append(Part(key, tuple(shape), inside.moved(block.offsets), view, kind))
    assert at == values.numel() <= prod(block.sizes)
    return found


def check_dense(key: str, tensor: Tensor) -> None:
    """Raises for what has no values to save.

    Raises:
        CheckpointError: It is on the meta device, or sparse.
    """
    if tensor.is_meta:
        raise CheckpointError(f"{key} is on the meta device and has no values; call to_empty(device=...) first")
    if str(tensor.layout) != "torch.strided":
        raise CheckpointError(f"{key} is {tensor.layout}; checkpoints hold dense tensors: convert it with to_dense()")
