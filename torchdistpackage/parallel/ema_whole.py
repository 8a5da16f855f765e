"""Puts segments of an average together to tensors and takes tensors apart into segments; see `ema_layout.py`.

`Whole` collects the streams of all ranks in CPU memory, `Blocks` writes them into a model; both take for every rank
the stream of what that rank averages, and know where each byte of it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from torchdistpackage.parallel.dtensors import is_dtensor, local_tensor
from torchdistpackage.parallel.ema_exchange import Stream
from torchdistpackage.parallel.ema_layout import Box, Layout, Segment
from torchdistpackage.parallel.ema_tensors import flat, listed, local_box

__all__ = ["Blocks", "Whole", "bitwise_differences", "part_of", "unfit"]


@final
class Whole:
    """The parameters as the group holds them together, in CPU memory; to be filled from streams.

    Args:
        layout: Who holds what.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._full: dict[int, Tensor] = {}  # dims in the order of memory
        self._flat: dict[tuple[int, Box], Tensor] = {}
        self._aside: list[tuple[Tensor, Tensor]] = []

    def stream(self, rank: int) -> Stream:
        """Where the stream of a rank goes."""
        return Stream.of([self._block(one.entry, rank)[one.begin : one.end] for one in self._layout.segments(rank)])

    def finish(self) -> dict[int, Tensor]:
        """The parameters, by the number of their entry, with strides like the model's."""
        while self._aside:
            block, values = self._aside.pop()
            block.copy_(values.view(block.shape))
        self._flat.clear()
        found = {}
        for index, entry in enumerate(self._layout.entries):
            if entry.is_parameter:
                back = [entry.order.index(dim) for dim in range(len(entry.order))]
                found[index] = self._tensor(index).permute(back)
        return found

    def _tensor(self, index: int) -> Tensor:
        if index not in self._full:
            entry, size = self._layout.entries[index], self._layout.bounds(index).size
            self._full[index] = torch.empty([size[dim] for dim in entry.order], dtype=entry.dtype, device="cpu")
        return self._full[index]

    def _block(self, index: int, rank: int) -> Tensor:
        """The block of a rank, 1-D: a view into the whole tensor if its rows lie together, else put in at the end."""
        box = self._layout.box(index, rank)
        if (index, box) not in self._flat:
            full = self._tensor(index)
            block = full[box.within(self._layout.bounds(index))] if self._layout.entries[index].placement else full
            values = block.view(-1) if block.is_contiguous() else block.new_empty(block.numel())
            if not block.is_contiguous():
                self._aside.append((block, values))
            self._flat[index, box] = values
        return self._flat[index, box]


@final
class Blocks:
    """What this rank holds of a model's parameters; to be overwritten from streams, or from its own segments.

    Args:
        layout: Who holds what.
        rank: This rank in the group.
        tensors: Of the model, by name.
    """

    def __init__(self, layout: Layout, rank: int, tensors: Mapping[str, Tensor]) -> None:
        self._layout, self._rank = layout, rank
        self._flat: dict[int, Tensor] = {}
        self._aside: list[tuple[Tensor, Tensor]] = []
        for index, entry in enumerate(layout.entries):
            if not entry.is_parameter:
                continue
            own = local_tensor(tensors[entry.name].detach()).permute(entry.order)
            direct = own.dtype == entry.dtype and own.is_contiguous()
            values = own.view(-1) if direct else torch.empty(own.numel(), dtype=entry.dtype, device=own.device)
            if not direct:
                self._aside.append((own, values))
            self._flat[index] = values

    def stream(self, rank: int) -> Stream:
        """Where the stream of a rank goes; what belongs to blocks that this rank does not hold is passed over."""
        segments, layout = self._layout.segments(rank), self._layout
        parts = [
            self._flat[one.entry][one.begin : one.end]
            if layout.box(one.entry, rank) == layout.box(one.entry, self._rank)
            else None
            for one in segments
        ]
        return Stream(parts, [(one.end - one.begin) * layout.entries[one.entry].dtype.itemsize for one in segments])

    def write(self, segments: Sequence[Segment], shards: Sequence[Tensor]) -> None:
        """Overwrites segments of this rank's."""
        for one, shard in zip(segments, shards, strict=True):
            self._flat[one.entry][one.begin : one.end].copy_(shard)

    def finish(self) -> None:
        """Comes at the end: puts in what could not be written in place."""
        while self._aside:
            own, values = self._aside.pop()
            own.copy_(values.view(own.shape))


def part_of(layout: Layout, state: Mapping[str, Tensor], segment: Segment, rank: int) -> Tensor:
    """A segment of a rank, 1-D, out of tensors that are whole, or the block of them that the group holds."""
    entry = layout.entries[segment.entry]
    value = _first(state, entry.names).detach()
    whole = Box((0,) * len(entry.shape), entry.shape)
    outer = whole if tuple(value.shape) == entry.shape else layout.bounds(segment.entry)
    block = value[layout.box(segment.entry, rank).within(outer)]
    return flat(block, entry.order)[segment.begin : segment.end].to(entry.dtype)


def unfit(layout: Layout, state: Mapping[str, Tensor]) -> str:
    """Why a whole state cannot be loaded; "" if it can. Tensors of other stages are no reason."""
    missing = [entry.name for entry in layout.entries if not any(name in state for name in entry.names)]
    if missing:
        return (
            f"the state has {len(state)} tensors, but not {listed(missing)}; check that it is of this model, and merge "
            "the files of all stages if it was written by another split"
        )
    wrong = []
    for index, entry in enumerate(layout.entries):
        value = _first(state, entry.names)
        if local_tensor(value) is not value:
            return f"{entry.name} is a DTensor in the state; pass whole tensors (value.full_tensor())"
        if tuple(value.shape) not in (entry.shape, layout.bounds(index).size):
            wrong.append(f"{entry.name} is {tuple(value.shape)} in the state and {entry.shape} in the model")
    return listed(wrong, "; ")


def bitwise_differences(layout: Layout, state: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Which parameters of a model differ from the average in any bit; "" if none does.

    Args:
        layout: Of the average.
        state: Name -> the average, whole or the block that the group holds.
        theirs: Name -> the model's tensor; of a DTensor the part that is here is compared.
    """
    parameters = [(index, entry) for index, entry in enumerate(layout.entries) if entry.is_parameter]
    known = {name for _, entry in parameters for name in entry.names}
    found = [f"{n} is not in the average" for n, t in theirs.items() if isinstance(t, nn.Parameter) and n not in known]
    for index, entry in parameters:
        name = next((name for name in entry.names if name in theirs), None)
        if name is None:
            found.append(f"{entry.name} is in the average only")
            continue
        ours, value, bounds = state[entry.name], local_tensor(theirs[name].detach()), layout.bounds(index)
        if is_dtensor(theirs[name]):
            ours = ours[local_box(name, theirs[name]).within(bounds)]
        elif tuple(value.shape) == entry.shape:
            value = value[bounds.within(Box((0,) * value.dim(), entry.shape))]
        text = _bits(ours, value.cpu())
        found += [f"{name}: {text}"] if text else []
    return f"{len(found)} of {len(parameters)} parameters differ: {listed(found, '; ')}" if found else ""


def _bits(ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        kinds = [f"{tuple(one.shape)} {one.dtype}" for one in (ours, theirs)]
        return f"the average is {kinds[0]}, the other {kinds[1]}"
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    pairs = [one.contiguous().view(torch.uint8).view(one.numel(), -1) for one in (ours, theirs)] if len(ours) else []
    wrong = (pairs[0] != pairs[1]).any(1) if pairs else torch.zeros(0, dtype=torch.bool)
    if not wrong.any():
        return ""
    wide = torch.complex128 if ours.is_complex() else torch.float64
    apart = (ours[wrong].to(wide) - theirs[wrong].to(wide)).abs().max().item()
    return f"{int(wrong.sum())} of {len(ours)} elements, at most {apart:.3g} apart"


def _first(state: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return next(state[name] for name in names if name in state)
