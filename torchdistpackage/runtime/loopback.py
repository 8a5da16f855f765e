"""All ranks of a pipeline as threads of one process: the runtime without processes, for tests and for one machine.

A send copies its bytes into the stream of its edge; a wait on a receive copies them out. Like gloo, a message may be
shorter than its buffer and must not be longer.
"""

from __future__ import annotations

import queue
from typing import final

import torch
from torch import Tensor

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.edge import COPIED, Handle, Mover
from torchdistpackage.runtime.failure import FailureReport
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.runtime.watchdog import Watchdog

__all__ = ["LoopbackTransport", "loopback"]

_Stream = tuple[int, int, int, bool]  # sender, receiver, epoch, bulk


class _Hub:
    """What the ranks share."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.reports: dict[int, FailureReport] = {}
        self._streams: dict[_Stream, queue.SimpleQueue[Tensor]] = {}

    def stream(self, key: _Stream) -> queue.SimpleQueue[Tensor]:
        # dict.setdefault is atomic under the interpreter lock: two ranks always meet on one queue.
        return self._streams.setdefault(key, queue.SimpleQueue())


class _Pending:
    """A posted receive."""

    def __init__(self, stream: queue.SimpleQueue[Tensor], buffer: Tensor, timeout: float) -> None:
        self._stream, self._buffer, self._timeout = stream, buffer, timeout

    def wait(self) -> None:
        try:
            data = self._stream.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError(f"timed out after {self._timeout} s") from None
        if data.numel() > self._buffer.numel():
            raise TransportError(f"a message of {data.numel()} bytes came for a buffer of {self._buffer.numel()}")
        self._buffer[: data.numel()].copy_(data)


@final
class LoopbackTransport(Transport):
    """One rank's view of a loopback pipeline; made by `loopback`.

    Example:
        >>> first, last = loopback(2)
        >>> isinstance(last, LoopbackTransport), last.rank, last.num_ranks, last.name(first.rank)
        (True, 1, 2, 'rank 0 of the pipeline')
    """

    def __init__(
        self, rank: int, num_ranks: int, hub: _Hub, device: torch.device, watchdog: Watchdog | None = None
    ) -> None:
        super().__init__(rank, range(num_ranks), device=device, watchdog=watchdog, timeout=hub.timeout)
        self._hub = hub

    def sender(self, receiver: int, *, bulk: bool = False) -> Mover:
        """Copies buffers into the stream."""
        stream = self._hub.stream((self.rank, receiver, self.epoch, bulk))

        def send(buffer: Tensor) -> Handle:
            stream.put(buffer.clone())
            return COPIED

        return send

    def receiver(self, sender: int, *, bulk: bool = False) -> Mover:
        """Takes the next message of the stream when waited for."""
        stream = self._hub.stream((sender, self.rank, self.epoch, bulk))
        return lambda buffer: _Pending(stream, buffer, self._hub.timeout)

    def carries_cuda(self) -> bool:
        """One process has one address space: CUDA frames stay where they are."""
        return True

    def publish(self, report: FailureReport) -> None:
        """Leaves the report with the hub, and with the watchdog."""
        super().publish(report)
        self._hub.reports.setdefault(self.epoch, report)

    def look(self) -> FailureReport | None:
        """The hub's report of this epoch, or the watchdog's."""
        return self._hub.reports.get(self.epoch) or super().look()


def loopback(
    num_ranks: int, *, timeout: float = 30.0, device: str | torch.device = "cpu", watchdog: Watchdog | None = None
) -> list[LoopbackTransport]:
    """Makes the transports of all ranks; each is to be used by a thread of its own.

    Args:
        num_ranks: Ranks of the pipeline.
        timeout: Seconds after which a wait gives up.
        device: Where received CUDA tensors are put.
        watchdog: Of a pipeline of one rank that has replicas.

    Example:
        >>> from torchdistpackage.runtime.message import Kind, flatten
        >>> a, b = loopback(2)
        >>> a.begin_step("test", training=False), b.begin_step("test", training=False)
        (None, None)
        >>> a.outlet(1).send(Kind.FORWARD, 0, 0, 4, *flatten({"x": torch.ones(2), "note": "any pytree"}))
        >>> message = b.inlet(0).take(Kind.FORWARD, 0, 0)
        >>> message.layout.tree(message.tensors)
        {'x': tensor([1., 1.]), 'note': 'any pytree'}
    """
    hub = _Hub(timeout)
    return [LoopbackTransport(rank, num_ranks, hub, torch.device(device), watchdog) for rank in range(num_ranks)]
