"""What a rank holds of an average, each piece with its place in the whole: for `torchdistpackage.checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from torchdistpackage.parallel.ema_layout import Layout, Segment

__all__ = ["AveragePiece", "average_pieces"]


@final
@dataclass(frozen=True, eq=False)
class AveragePiece:
    """Elements of one averaged tensor.

    Attributes:
        name: Of the parameter or buffer.
        shape: Of the whole.
        offsets: Of the block of it that this rank's replica holds.
        sizes: Of that block.
        order: The dims from the outermost to the innermost in memory.
        begin: The first element's number in the block, in that order.
        tensor: The values, flat; not a copy.
        is_parameter: Or else a buffer.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    begin: int
    tensor: Tensor
    is_parameter: bool


def average_pieces(
    layout: Layout, rank: int, segments: Sequence[Segment], shards: Sequence[Tensor], buffers: Mapping[int, Tensor]
) -> Iterator[AveragePiece]:
    """All pieces of a rank.

    Args:
        layout: Of the average.
        rank: Which one.
        segments: Its parameters' elements.
        shards: Their values.
        buffers: Number of the entry -> the values.
    """
    parts = [(one.entry, one.begin, shard) for one, shard in zip(segments, shards, strict=True)]
    parts += [(index, 0, buffer) for index, buffer in buffers.items()]
    for index, begin, values in parts:
        entry, box = layout.entries[index], layout.box(index, rank)
        yield AveragePiece(
            entry.name, entry.shape, box.offset, box.size, entry.order, begin, values.view(-1), entry.is_parameter
        )
