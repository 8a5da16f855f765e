"""Gradients side by side in one piece of memory, so that a collective moves many of them at once.

A bucket is laid out for parameters of one dtype and device. Behind the gradients there is one number for each of them,
and one for the bucket: what the replicas have to agree on travels with the gradients, not in a message of its own::

    | gradient | gradient | gradient | ... | has | has | has | ... | late |
      1 / N of this replica's (mean)         1 where this replica      1 where a gradient changed
      or all of it (sum)                     has a new gradient        after it had been sent

A sum that is 0 says of a gradient that nobody has one, and it stays None; of the bucket, that nothing has to be sent
again. On CUDA the first is read only for a gradient that this replica has not.

Neighbours: `gradient_reduction.py` says when a bucket goes; `sparse_gradients.py` reduces what has no fixed size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import is_dtensor, local_tensor

__all__ = ["Bucket", "Slot", "bucket_layout", "dense"]


@final
class Slot:
    """One parameter: what of its gradient is new since the last reduction, and its place in a bucket.

    The parameter is held weakly: its hooks hold this, and a circle would keep a dropped model until the garbage
    collector comes.

    Args:
        name: For messages.
        parameter: The parameter.
        sums: Whether gradients are summed: then what was reduced before must not be sent again. A mean of equals is
            what it was.
        sparse: Whether its gradients are sparse; it has no place in a bucket then.
    """

    def __init__(self, name: str, parameter: Tensor, *, sums: bool, sparse: bool = False) -> None:
        self.name, self.sums, self.sparse = name, sums, sparse
        self._parameter = weakref.ref(parameter)  # its module holds it; five times quicker than TensorWeakRef
        self._handles: list[Any] = []
        self.bucket: int | None = None  # its number
        self.view: Tensor | None = None  # in the bucket, shaped like this rank's part of the parameter
        self.on_its_way = False
        self.hits = 0
        self.new = self.skipped = self.idle = False
        self._base: Tensor | None = None  # sums: the part of the gradient that is a sum already
        self._seen: tuple[Tensor | None, int] | None = None  # while it is sent, or is added to a base
        self._left: tuple[TensorWeakRef, int] | None = None  # what the last reduction left

    @property
    def parameter(self) -> Any:
        """The parameter; None if nobody has it any more."""
        return self._parameter()

    @property
    def gradient(self) -> Any:
        """Its gradient; None if there is none."""
        parameter = self.parameter
        return None if parameter is None else parameter.grad

    @property
    def kind(self) -> tuple[bool, torch.dtype, torch.device] | None:
        """What the layout depends on: whether it is trained, its dtype and its device; None if nobody has it."""
        parameter = self.parameter
        return None if parameter is None else (parameter.requires_grad, parameter.dtype, parameter.device)

    def hook(self, before: Any, after: Any) -> None:
        """Calls `before` and `after` whenever a backward adds to the gradient."""
        parameter = self.parameter
        if not self._handles:
            self._handles.append(parameter.register_post_accumulate_grad_hook(after))
            if before is not None:
                self._handles.append(parameter.register_hook(before))

    def unhook(self) -> None:
        """Calls nothing from here on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def has_base(self) -> bool:
        """Whether a part of the gradient is a sum already, and was not sent."""
        return self._base is not None

    def is_new(self) -> bool:
        """Whether there is something that the last reduction has not left there."""
        gradient = self.gradient
        if gradient is None or self.skipped or self.idle:
            return False
        if self._left is None or self._left[0]() is not gradient:
            return True
        return not self.sums and self._left[1] != gradient._version

    def is_other(self) -> bool:
        """Whether the gradient was cleared, replaced or changed since the last reduction."""
        gradient = self.gradient
        if gradient is None or self._left is None:
            return gradient is not None or self._left is not None
        return self._left[0]() is not gradient or self._left[1] != gradient._version

    def before_adding(self) -> None:
        """Comes right before a backward adds to the gradient."""
        parameter, gradient = self.parameter, self.gradient
        if self.on_its_way and gradient is not None and gradient is self.view:
            parameter.grad = None  # what is added now follows by itself
            return
        if not self.sums:
            return
        if gradient is None:
            self._base = None
        elif self._left is not None and self._left[0]() is gradient:
            self._base, self._left = local_tensor(gradient).clone(), None
        elif self._base is not None and not self._is_as_seen(gradient):
            if self._seen is not None and self._seen[0] is gradient and bool(local_tensor(gradient).any()):
                raise PipelineError(
                    f"the gradient of {self.name} is a sum over the replicas to which this replica has added, and it "
                    "was changed in place before the next reduction: call reduce_gradients() before gradients are "
                    "scaled or clipped, or clear them with zero_grad()"
                )
            self._base = None

    def after_adding(self) -> None:
        """Comes right after a backward has added to the gradient."""
        if self._base is not None or self._seen is not None:
            self.look()

    def look(self) -> None:
        """Remembers the gradient as it is now."""
        gradient = self.gradient
        self._seen = (gradient, 0 if gradient is None else gradient._version)

    def was_changed(self) -> bool:
        """Whether somebody else than a backward has changed or cleared the gradient since `look`."""
        return self._seen is not None and not self._is_as_seen(self.gradient)

    def write(self, view: Tensor, replicas: int) -> None:
        """Puts what this replica sends into a bucket; `view` may be the gradient itself."""
        parameter, gradient = self.parameter, self.gradient
        self.new = self.is_new()
        if self.skipped and gradient is view:
            parameter.grad = gradient.clone()
        if gradient is None or self.skipped:
            view.zero_()
            return
        if is_dtensor(gradient) and gradient.placements != parameter.placements:
            gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
        part = dense(local_tensor(gradient))
        if not self.sums:
            # As DistributedDataParallel, to the bit.
            view.div_(replicas) if part is view else torch.mul(part, 1.0 / replicas, out=view)
        elif not self.new:
            self._base = part.clone()
            view.zero_()
        elif self._base is not None:
            torch.sub(part, dense(self._base), out=view)
        elif part is not view:
            view.copy_(part)

    def take(self, view: Tensor, *, as_view: bool) -> None:
        """Makes what the replicas have together the gradient."""
        parameter, gradient = self.parameter, self.gradient
        if parameter is None or self.skipped:
            return
        if self._base is not None:
            view.add_(dense(self._base))
        if as_view:
            parameter.grad = view
        elif gradient is None or local_tensor(gradient).is_sparse:
            parameter.grad = torch.empty_like(parameter)
            local_tensor(parameter.grad).copy_(view)
        else:
            local_tensor(gradient).copy_(view)

    def settle(self) -> None:
        """Comes at the end of a reduction: what is there now is reduced."""
        gradient = self.gradient
        if not self.skipped:
            self._left = None if gradient is None else (TensorWeakRef(gradient), gradient._version)
        self._base = self._seen = None
        self.rewind()

    def rewind(self) -> None:
        """Begins anew; what is there is still to be reduced."""
        self.hits, self.new, self.skipped, self.idle, self.on_its_way = 0, False, False, False, False

    def amount_to_send(self) -> Tensor | None:
        """This replica's new gradient by itself, for those without a place in a bucket."""
        self.new = self.is_new()
        gradient = self.gradient
        if gradient is None or self.skipped or (self.sums and not self.new):
            return None
        part: Tensor = local_tensor(gradient)
        return part if self._base is None else part - self._base

    def add_base(self, amount: Tensor) -> Tensor:
        """What was a sum before, and what is added to it now."""
        base = self.gradient if self.sums and not self.new else self._base
        return amount if base is None else base + amount

    def _is_as_seen(self, gradient: Tensor | None) -> bool:
        if self._seen is None:
            return False
        seen, version = self._seen
        return seen is gradient and (gradient is None or gradient._version == version)


@final
class Bucket:
    """Gradients that are reduced together.

    Args:
        slots: In the order in which gradients are expected.
        group: The replicas.
        sums: Sum instead of mean.
        as_view: Gradients live in the bucket.
    """

    def __init__(self, slots: Sequence[Slot], group: Any, *, sums: bool, as_view: bool) -> None:
        self.slots, self._group, self._sums = slots, group, sums
        self._as_view = as_view and not is_dtensor(slots[0].parameter)  # a DTensor's gradient is a DTensor
        self._replicas = dist.get_world_size(group)
        parts = [local_tensor(slot.parameter) for slot in slots]
        self._dtype, self._device = parts[0].dtype, parts[0].device
        # The strides of the parameter, where those leave no holes.
        self._places = [(part.shape, torch.empty_like(part, device="meta").stride(), part.numel()) for part in parts]
        self._gradients = sum(part.numel() for part in parts)
        self._buffer: Tensor | None = None
        self._again: Tensor | None = None
        self.pending = len(slots)
        self.work: Any = None

    def launch(self, *, late: bool = False) -> None:
        """Sends what is there, and does not wait."""
        if self._buffer is None:
            self._buffer = self._new_buffer()
            views = self._views(self._buffer)
            for slot, view in zip(self.slots, views, strict=True):
                slot.view = view
        for slot in self.slots:
            assert slot.view is not None
            slot.write(slot.view, self._replicas)
            if self._as_view and slot.gradient is not None and not slot.skipped:
                slot.parameter.grad = slot.view
        self._send(self._buffer, late=late)
        for slot in self.slots:
            slot.on_its_way = True
            slot.look()

    def launch_again(self) -> None:
        """Sends what has changed since; where gradients live in the bucket, what came in addition.

        There, this replica's share is gone by now: the sum has taken its place.
        """
        if not self._as_view:
            self.launch()
            return
        self._again = self._new_buffer()
        for slot, view in zip(self.slots, self._views(self._again), strict=True):
            gradient = slot.gradient
            if gradient is not None and gradient is not slot.view:
                torch.mul(dense(gradient), 1.0 if self._sums else 1.0 / self._replicas, out=view)
                slot.new = True
        self._send(self._again)

    def wait(self) -> None:
        """Returns when it is reduced; on CUDA, when what is computed next will see it so."""
        if self.work is not None:
            self.work.wait()

    def is_late(self) -> bool:
        """Whether any replica said so. Waits for the device."""
        assert self._buffer is not None
        return bool(self._buffer[-1] != 0)

    def take(self) -> None:
        """Makes what came the gradients."""
        assert self._buffer is not None
        if self._again is not None:
            self._buffer += self._again
            self._again = None
        somewhere: list[bool] | None = None
        for number, slot in enumerate(self.slots):
            if not slot.new and somewhere is None:
                numbers = self._buffer[self._gradients : self._gradients + len(self.slots)]
                somewhere = (numbers != 0).tolist()
            assert slot.view is not None
            if slot.new or (somewhere is not None and somewhere[number]) or (self._as_view and slot.has_base):
                slot.take(slot.view, as_view=self._as_view)

    def rewind(self) -> None:
        """Begins anew: every gradient is still to come."""
        self.work, self.pending = None, len(self.slots)

    def _new_buffer(self) -> Tensor:
        return torch.zeros(self._gradients + len(self.slots) + 1, dtype=self._dtype, device=self._device)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """The place of each gradient."""
        views, begin = [], 0
        for shape, strides, numel in self._places:
            # `.data`: a version of its own. Views count the changes of all of the buffer, and a gradient would look as
            # if somebody had changed it as soon as its neighbour gets something added.
            views.append(torch.as_strided(buffer, shape, strides, begin).data)
            begin += numel
        return views

    def _send(self, buffer: Tensor, *, late: bool = False) -> None:
        has = buffer[self._gradients : -1]
        if all(slot.new for slot in self.slots):
            has.fill_(1)
        else:
            has.copy_(torch.tensor([float(slot.new) for slot in self.slots]))
        buffer[-1] = float(late)
        numbers = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        self.work = dist.all_reduce(numbers, group=self._group, async_op=True)


def bucket_layout(slots: Sequence[Slot], cap: float) -> list[list[Slot]]:
    """Cuts parameters into buckets, in the order in which buckets fill up.

    Args:
        slots: In the order in which gradients are expected: the last layer's first.
        cap: Bytes of a bucket; a larger parameter is one by itself.
    """
    done: list[tuple[int, list[Slot]]] = []
    filling: dict[Any, tuple[int, int, list[Slot]]] = {}  # (position of the last one, bytes, slots)
    for position, slot in enumerate(slots):
        part = local_tensor(slot.parameter)
        kind = (part.dtype, part.device, is_dtensor(slot.parameter))
        size = part.numel() * part.element_size()
        last, filled, members = filling.get(kind, (0, 0, []))
        if members and filled + size > cap:
            done.append((last, members))
            filled, members = 0, []
        filling[kind] = (position, filled + size, [*members, slot])
    done += [(last, members) for last, _, members in filling.values()]
    return [members for _, members in sorted(done, key=lambda entry: entry[0])]


def dense(tensor: Tensor) -> Tensor:
    """A sparse tensor as a dense one."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
