"""A stopwatch for one step on one rank: when each action waited, computed and sent, and how much memory it left.

::

    0B3 with its input and its output     | wait for the input | compute | pack and send |
    marks                               begin                taken    computed         end
    spans                                   0RECV_B3             0B3       0SEND_B3

An executor without a recorder does none of this. With one, CPU time is taken from `time.perf_counter`, CUDA time from
events on the current stream, so that recording does not make the host wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from torchdistpackage.runtime.program import Instruction
from torchdistpackage.schedule import Action, Op, Span

__all__ = ["Recorder"]

_RECEIVE = {Op.FORWARD: Op.RECV_F, Op.BACKWARD: Op.RECV_B, Op.INPUT_GRAD: Op.RECV_B}
_SEND = {Op.FORWARD: Op.SEND_F, Op.BACKWARD: Op.SEND_B, Op.INPUT_GRAD: Op.SEND_B}


@final
class Recorder:
    """Records one step.

    Args:
        device: Where the stages compute.
        memory: Also measure what the first forward of each stage saves for its backward. Backwards must then run
            whole: the hooks that measure would keep them from being split.

    Attributes:
        activation_bytes: For each stage of this rank, what a micro-batch holds between forward and backward.
        message_bytes: For each stage, what one forward sends on.
    """

    def __init__(self, device: torch.device, *, memory: bool = False) -> None:
        self._cuda, self._memory = device.type == "cuda", memory
        self.activation_bytes: dict[int, int] = {}
        self.message_bytes: dict[int, int] = {}
        self._marks: list[tuple[Instruction, Any, Any, Any, Any]] = []
        self._taken: Any = None
        self._computed: Any = None
        if self._cuda:
            torch.cuda.synchronize(device)
        self._origin_time = time.perf_counter()
        self._origin = self.mark()

    def mark(self) -> Any:
        """Now, as a time or as an event on the current stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def taken(self) -> None:
        """Comes when the input of an action has arrived."""
        self._taken = self.mark()

    def computed(self) -> None:
        """Comes when the result of an action is there, before it is packed and sent."""
        self._computed = self.mark()

    def add(self, at: Instruction, begin: Any) -> None:
        """Comes at the end of an action."""
        self._marks.append((at, begin, self._taken, self._computed, self.mark()))
        self._taken = self._computed = None

    def note_message(self, stage: int, leaves: list[Any]) -> None:
        """Notes the size of what a forward sends on."""
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        self.message_bytes[stage] = max(size, self.message_bytes.get(stage, 0))

    @contextmanager
    def forward(self, stage: int, own: list[Any]) -> Iterator[None]:
        """Surrounds a forward; measures what it saves, once for each stage.

        Args:
            stage: Which one.
            own: Its slices of its own inputs. They are windows on the user's whole batch, and count with their rows.
        """
        if not self._memory or stage in self.activation_bytes:
            yield
            return
        slices = [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor)]
        sizes: dict[int, int] = {leaf.data_ptr(): leaf.nbytes for leaf in slices}
        batch = {leaf.untyped_storage().data_ptr() for leaf in slices}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in batch:
                    sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.activation_bytes[stage] = sum(sizes.values())

    def spans(self) -> list[Span]:
        """What was recorded, in seconds of this process's `time.perf_counter`."""
        if self._cuda:
            torch.cuda.synchronize()
        found: list[Span] = []
        for at, *marks in self._marks:
            begin, taken, computed, end = (None if mark is None else self._seconds(mark) for mark in marks)
            assert begin is not None
            assert end is not None
            microbatch = None if at.op is Op.REDUCE_GRAD else at.microbatch
            if taken is not None and at.op in _RECEIVE:
                found.append(Span(Action(at.stage, _RECEIVE[at.op], microbatch), begin, taken))
            middle = (taken or begin, computed or end)
            found.append(Span(Action(at.stage, at.op, microbatch), *middle))
            if computed is not None and at.send_to >= 0:
                found.append(Span(Action(at.stage, _SEND[at.op], microbatch), computed, end))
        return found

    def _seconds(self, mark: Any) -> float:
        if not self._cuda:
            return float(mark)
        return self._origin_time + float(self._origin.elapsed_time(mark)) / 1e3
