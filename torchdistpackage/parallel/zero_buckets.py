"""The tensors of a sharded optimizer: what it steps on, and how gradients and weights come there and back.

::

    param.grad  --fill-->  [ bucket ]  --sum over ranks-->  [ chunk ]  --views-->  piece.grad
    param       <--write-  [ bucket ]  <-----gather-------  [ chunk ]  <---cast--  piece

A piece is what the wrapped optimizer sees in the place of a parameter: the elements that this rank owns. It is a view
of the parameter's own memory, unless that is in half precision: then it is a float32 copy, the master weight.

All of this runs under `torch.no_grad()`; `zero_reduce.py` says when.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.zero_group import ShardGroup, Sum
from torchdistpackage.parallel.zero_layout import BucketLayout

__all__ = ["Bucket", "Member", "Piece"]

HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Member:
    """A parameter that is sharded.

    Attributes:
        parameter: The model's own.
        index: Its place among all parameters of the wrapped optimizer, as in that one's state_dict.
        group: The number of its parameter group.
        master: Whether pieces of it are copies in float32.
        present: Whether any rank has had a gradient of it since the last `zero_grad`.
        version: Of the parameter when it was last written from its pieces; another one means: by somebody else.
        seen: The gradient that was last found in it reduced, and its version; None if there was none.
    """

    parameter: Tensor
    index: int
    group: int
    master: bool
    present: bool = False
    version: int = -1
    seen: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of its pieces."""
        return torch.float32 if self.master else self.parameter.dtype

    def local(self) -> Tensor:
        """This rank's values."""
        return local_tensor(self.parameter.detach())

    def gradient(self) -> Tensor | None:
        """This rank's gradient, laid out as the parameter."""
        gradient = self.parameter.grad
        if gradient is None:
            return None
        if gradient.layout is not torch.strided:
            raise PipelineError(
                f"parameter {self.index} of the optimizer has a {gradient.layout} gradient, which cannot be sharded: "
                "make its layer with sparse=False, or give it to an optimizer of its own"
            )
        mine, wanted = getattr(gradient, "placements", None), getattr(self.parameter, "placements", None)
        if mine != wanted:
            gradient = gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]
        return local_tensor(gradient)

    def changed(self) -> bool:
        """Whether its gradient is another one than was last found reduced."""
        gradient = self.parameter.grad
        if gradient is None or self.seen is None:
            return gradient is not None or self.seen is not None
        return self.seen[0]() is not gradient or self.seen[1] != gradient._version

    def remember(self) -> None:
        """The gradient that is there now is reduced."""
        gradient = self.parameter.grad
        self.seen = None if gradient is None else (weakref.ref(gradient), gradient._version)


@final
class Piece:
    """Elements [start, stop) of a member, which this rank owns.

    Args:
        member: Whose.
        start: First element.
        stop: One after the last.
        at: Place of the first one in this rank's chunk of the bucket.
    """

    def __init__(self, member: Member, start: int, stop: int, at: int) -> None:
        self.member, self.start, self.stop, self.at = member, start, stop, at
        values = member.local()
        self.whole = stop - start == values.numel()
        self.shape = values.shape if self.whole else torch.Size([stop - start])
        self.copied = member.master or not values.is_contiguous()
        part = self.read(values)
        self.tensor = (part.to(member.dtype, copy=True) if self.copied else part).requires_grad_()

    @property
    def parameter(self) -> Tensor:
        """The model's."""
        return self.member.parameter

    @property
    def is_master(self) -> bool:
        """Whether it is a copy in float32."""
        return self.member.master

    def read(self, values: Tensor) -> Tensor:
        """This piece's part of something that is laid out as the parameter; a view where that is contiguous."""
        return values.detach().reshape(-1)[self.start : self.stop].view(self.shape)

    def refresh(self) -> None:
        """Takes over what somebody else has written into the parameter since this library did.

        Elements that only differ by the rounding of the parameter keep their master weight.
        """
        values = self.member.local()
        if not self.copied:
            if self.tensor.data_ptr() != values.data_ptr() + self.start * values.element_size():
                self.tensor.data = self.read(values)  # somebody has given the parameter other memory
        elif self.member.parameter._version != self.member.version:
            new = self.read(values)
            same = self.tensor.to(new.dtype) == new
            self.tensor.copy_(torch.where(same, self.tensor, new.to(self.tensor.dtype)))


@final
class Bucket:
    """One bucket on this rank.

    Args:
        layout: What lies where.
        members: Of all buckets, by number.
        shards: Who shares.
        reduce_dtype: In which gradients are added up; None for their own.
    """

    def __init__(
        self, layout: BucketLayout, members: Sequence[Member], shards: ShardGroup, reduce_dtype: torch.dtype | None
    ) -> None:
        self.layout, self._shards = layout, shards
        self.slots = [(slot, members[slot.parameter]) for slot in layout.slots]
        self._low = layout.bounds[shards.rank]
        self.pieces = [
            Piece(members[slot.parameter], slot.start, slot.stop, slot.at - self._low)
            for slot in layout.owned(shards.rank)
        ]
        first = self.slots[0][1]
        self._dtype, self._grad_dtype = first.dtype, reduce_dtype or first.parameter.dtype
        self._device = first.local().device
        self.gradient: Tensor | None = None  # this rank's chunk of the averaged gradient
        self._begun: Sum | None = None

    # ---- gradients ----

    def begin_reduce(self, *, keep: bool) -> None:
        """Starts to average the gradients that the parameters have.

        They are scaled before they are added up, as DistributedDataParallel does: the same bits on two ranks.

        Args:
            keep: Every parameter gets its averaged gradient; else it loses the one that it has.
        """
        share = 1.0 / (self._shards.size * self._shards.replicas)
        flat = torch.empty(self.layout.numel, dtype=self._grad_dtype, device=self._device)
        filled = 0
        for slot, member in self.slots:
            part = flat[slot.at : slot.at + slot.numel]
            filled = slot.at + slot.numel
            gradient = member.gradient()
            if gradient is None:
                part.zero_()
                continue
            source = gradient.reshape(-1)[slot.start : slot.stop]
            if source.dtype == part.dtype:
                torch.mul(source, share, out=part)
            else:
                part.copy_(source).mul_(share)
            if not keep and slot.start == 0:  # the buckets go last first: nobody needs the rest any more
                member.parameter.grad = None
        flat[filled:].zero_()
        self._begun = self._shards.begin_sum(flat, self.layout, everywhere=keep)

    def finish_reduce(self, *, keep: bool) -> None:
        """Waits, and adds the chunk to what this rank has; with `keep`, it is all that this rank has."""
        if self._begun is None:
            return
        result, self._begun = self._shards.finish_sum(self._begun), None
        if keep:
            self._write_gradients(result)
            chunk = result[self._low : self.layout.bounds[self._shards.rank + 1]]
            self.gradient = chunk.to(self._dtype, copy=True)
        elif self.gradient is not None:
            self.gradient.add_(result)
        else:
            shared = result.untyped_storage().nbytes() > result.numel() * result.element_size()
            self.gradient = result.to(self._dtype, copy=shared)

    def _write_gradients(self, flat: Tensor) -> None:
        for slot, member in self.slots:
            parameter = member.parameter
            if not member.present:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            _write(local_tensor(parameter.grad), slot.start, slot.stop, flat[slot.at : slot.at + slot.numel])

    def publish(self) -> None:
        """Gives the pieces their gradients; those of parameters without one have None, so that no optimizer steps."""
        for piece in self.pieces:
            piece.tensor.grad = None
            if piece.member.present and self.gradient is not None:
                part = self.gradient[piece.at : piece.at + piece.stop - piece.start]
                piece.tensor.grad = part.view(piece.shape)

    # ---- weights ----

    def begin_gather(self) -> tuple[Tensor, list[Any]]:
        """Starts to gather what the ranks' optimizers have made of their pieces."""
        if self._shards.group is None and not any(piece.copied for piece in self.pieces):
            return torch.empty(0), []  # the pieces are the parameters
        flat = torch.empty(self.layout.numel, dtype=self.slots[0][1].parameter.dtype, device=self._device)
        own = flat[self._low : self.layout.bounds[self._shards.rank + 1]]
        for piece in self.pieces:
            own[piece.at : piece.at + piece.stop - piece.start].copy_(piece.tensor.reshape(-1))
        return flat, self._shards.begin_gather(flat, self.layout)

    def finish_gather(self, flat: Tensor, works: list[Any]) -> None:
        """Waits, and writes the weights."""
        for work in works:
            work.wait()
        for slot, member in self.slots if flat.numel() else ():
            if member.present:
                _write(member.local(), slot.start, slot.stop, flat[slot.at : slot.at + slot.numel])


def _write(target: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Writes elements [start, stop), counted row by row whatever the memory's layout is."""
    if target.is_contiguous():
        target.view(-1)[start:stop].copy_(values)
        return
    flat = target.reshape(-1).clone()
    flat[start:stop] = values
    target.copy_(flat.view(target.shape))
