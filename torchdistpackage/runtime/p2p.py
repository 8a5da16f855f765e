"""Frames over torch.distributed, and between ranks of one machine over `link.py`.

::

                            | same machine                       | another machine
    CPU tensors             | link: header and tensors together  | gloo: header and tensors in one message
    CUDA tensors, gloo      | the same, staged through host memory
    CUDA tensors, NCCL      | header over the link or gloo (the host must read it), tensors over the edge's communicator

One NCCL communicator is one FIFO, on which opposite directions block each other, so every directed edge between two
ranks has its own. torch makes one communicator for each pair of ranks in a group, so two groups of the same ranks are
enough: one for all edges to a higher rank, one for all edges to a lower rank. The edges between neighbours are
connected when the transport is made. On gloo a tag keeps streams apart: slots and bulk, and the epochs before and after
a failure.

A wait ends with its message, with a failure frame in its place, with the end of the connection, or with the group's
time-out. A wait on a link also looks up now and then; gloo cannot be asked whether a message has arrived, and a wait
with a time-out breaks its connection, so there `watchdog.py` looks from beside.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.board import StoreBoard
from torchdistpackage.runtime.edge import Handle, Mover
from torchdistpackage.runtime.failure import ConnectionLost, FailureReport, Stalled
from torchdistpackage.runtime.inlet import report_in
from torchdistpackage.runtime.link import ReceivingLink, SendingLink
from torchdistpackage.runtime.transport import TensorShard, Transport
from torchdistpackage.runtime.watch import Watch
from torchdistpackage.runtime.watchdog import Watchdog

__all__ = ["DistributedTransport", "TensorGroupShard"]

_TAG_BASE = 1 << 30  # far from the tags that a user's own send and recv on this group would take
_EPOCHS = 1 << 20
_AHEAD = 4  # compute actions; 2 gained as much on two ranks, 8 a little more on four ranks that shared two cores
_LEAVING = 3.0  # seconds that a process waits at its end for slower ranks to take its last messages

_instances: dict[tuple[int, ...], int] = {}


class Switchboard(Protocol):
    """Connects the ranks of one machine; see `topology/same_host.py`."""

    def reaches(self, rank: int) -> bool:
        """Whether that rank is on this machine."""

    def call(self, rank: int, epoch: int) -> socket.socket:
        """The sending end of a new connection to it."""

    def answer(self, rank: int, epoch: int, check: Callable[[], None]) -> socket.socket:
        """The receiving end of the connection that it makes."""

    def condition(self, rank: int) -> str:
        """What has become of its process; "" if it runs."""


@final
class DistributedTransport(Transport):
    """One rank's view of a pipeline group.

    Args:
        control: The pipeline's ranks in a group that carries CPU tensors (gloo).
        edges: Two more groups of the same ranks that carry CUDA tensors (NCCL): for edges to a higher rank, and to a
            lower rank. None: CUDA tensors are staged through the host.
        device: Where received CUDA tensors are put.
        switchboard: Connects ranks of this machine; None: all messages between hosts' memories are gloo's.
        watchdog: Watches this rank; None for one that knows this group only.
    """

    def __init__(
        self,
        control: dist.ProcessGroup,
        edges: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        *,
        device: torch.device,
        switchboard: Switchboard | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        ranks = dist.get_process_group_ranks(control)
        timeout = _timeout_of(control).total_seconds()
        if watchdog is None:
            watchdog = _watchdog_of(ranks, control.rank())
            weakref.finalize(self, watchdog.stop)
        super().__init__(control.rank(), ranks, device=device, watchdog=watchdog, timeout=timeout)
        self._control, self._edges = control, edges
        self._switchboard = switchboard
        linked = switchboard is not None and all(switchboard.reaches(rank) for rank in range(self.num_ranks))
        self.receives_ahead = 0 if linked else _AHEAD
        self._sending: dict[int, SendingLink] = {}
        self._receiving: dict[int, ReceivingLink] = {}
        self._ended: list[ReceivingLink] = []
        self._arrivals: torch.cuda.Stream | None = None
        self._edges_used = False
        if edges is not None:
            self._connect()
        atexit.register(_let_sends_finish, weakref.ref(self))

    def begin_step(
        self,
        signature: str,
        *,
        training: bool,
        wire_dtype: torch.dtype | None = None,
        shard: TensorShard | None = None,
    ) -> None:
        """Says what this rank is about to do."""
        super().begin_step(signature, training=training, wire_dtype=wire_dtype, shard=shard)
        for link in self._sending.values():
            link.begin_step()

    def sender(self, receiver: int, *, bulk: bool = False) -> Mover:
        """Starts sends to a rank; CUDA buffers go over NCCL."""
        host = self._host_sender(receiver, bulk)
        if not bulk or self._edges is None:
            return host
        edge = self._edge(self.rank, receiver)
        return self._by_place(host, lambda buffer: edge.send([buffer], receiver, 0))

    def receiver(self, sender: int, *, bulk: bool = False) -> Mover:
        """Starts receives from a rank; CUDA buffers come over NCCL."""
        host = self._host_receiver(sender, bulk)
        if not bulk or self._edges is None:
            return host
        edge = self._edge(sender, self.rank)
        return self._by_place(host, lambda buffer: edge.recv([buffer], sender, 0))

    def allocate(self, receiver: int, length: int) -> Tensor:
        """Shared memory, for a rank of this machine."""
        link = self._sending.get(receiver)
        return super().allocate(receiver, length) if link is None else link.allocate(length)

    def recycle(self, receiver: int, buffer: Tensor) -> None:
        """Shared memory is used again."""
        link = self._sending.get(receiver)
        if link is not None:
            link.recycle(buffer)

    def finish_step(self, token_from: int | None, token_to: int | None) -> None:
        """Ends the step on all ranks together."""
        super().finish_step(token_from, token_to)
        self._edges_used = False

    def is_whole(self) -> bool:
        """Not once something was put on a NCCL communicator in this step: its other end may never come."""
        return not self._edges_used

    def abort(self, report: FailureReport) -> None:
        """Tells every neighbour and forgets all links; the next epoch makes new ones.

        What waits on the device for a message that will not come would keep the device waiting for ever.
        """
        super().abort(report)
        if self._edges_used:
            for edge in self._edges or ():
                stop = getattr(edge._get_backend(self.device), "abort", None)
                if stop is not None:
                    stop()
            self._edges_used = False
        for sending in self._sending.values():
            sending.close()  # what was sent, the report last, can still be read
        for receiving in self._ended:
            receiving.close()
        self._ended = list(self._receiving.values())  # senders that do not know yet may go on for a moment
        self._sending, self._receiving = {}, {}

    def receiving(self, device: torch.device | str) -> AbstractContextManager[object]:
        """A stream of its own for what comes over NCCL.

        NCCL receives behind what its caller's stream has queued. On the stream that computes, that is the forward or
        backward before: the message would arrive only after it. What computes with the message waits for its arrival,
        on the device; the host waits for nothing but the header.
        """
        if self._edges is None or torch.device(device).type != "cuda":
            return nullcontext()
        if self._arrivals is None:
            self._arrivals = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._arrivals)

    def carries_cuda(self) -> bool:
        """True on NCCL."""
        return self._edges is not None

    def is_connected(self, peer: int) -> bool:
        """Neighbours are, from the start."""
        return (self.rank - peer) % self.num_ranks in (1, self.num_ranks - 1)

    def look(self) -> FailureReport | None:
        """A report that is at the end of a link, in the place of a message that nobody has taken, or on the board."""
        for link in self._receiving.values():
            for data in link.waiting():
                report = report_in(data)
                if report is not None:
                    return report
        return super().look()

    def lost(self, peer: int, action: str) -> FailureReport:
        """The report of a rank that has gone; but one that has waited in vain closes its connections of gloo, too."""
        if self.is_late() and not self.condition(peer):
            return self.stalled(Stalled(self, peer, self.timeout), action)
        return super().lost(peer, action)

    def condition(self, peer: int) -> str:
        """What the system says of a rank of this machine."""
        board = self._switchboard
        return board.condition(peer) if board is not None and board.reaches(peer) else ""

    def stalled(self, error: Stalled, action: str) -> FailureReport:
        """Names the rank that all others wait for, directly or by way of each other, and what every rank is doing."""
        watchdog, others = self.watchdog, [rank for rank in range(self.num_ranks) if rank != self.rank]
        said = {} if watchdog is None else watchdog.said(self.global_ranks)
        conditions = {self.global_ranks[rank]: self.condition(rank) for rank in others}
        culprit, passed = self.global_ranks[error.peer], {self.global_rank}
        while watchdog is not None and culprit not in passed:
            if culprit not in said:
                said |= watchdog.said([culprit])  # of another pipeline
            if culprit not in said or said[culprit].awaits < 0:
                break
            passed.add(culprit)
            culprit = said[culprit].awaits
        if not said and any(conditions.values()):
            culprit = next(rank for rank, condition in conditions.items() if condition)
        elif watchdog is not None and not watchdog.answers and watchdog.board_host in conditions:
            culprit = watchdog.board_host  # not even the store in its process answers
        lines = [f"it has not gone on for {error.seconds:g} s, the process group's time-out. What ranks were doing:"]
        for rank, global_rank in enumerate(self.global_ranks):
            doing = said[global_rank].text if global_rank in said else f"{self.name(rank)} says nothing"
            if rank == self.rank:
                doing = f"{self.name(rank)} waits for rank {error.peer} at {action}"
            condition = conditions.get(global_rank)
            lines.append(f"  {doing}" + (f": {condition}" if condition else ""))
        known = said[culprit].action if culprit in said else ""
        place = self.global_ranks.index(culprit) if culprit in self.global_ranks else -1
        # A wait of gloo's that has ended in this way has broken its connection.
        whole = self._switchboard is not None and all(map(self._switchboard.reaches, others))
        return FailureReport(place, culprit, known, "\n".join(lines), "", whole=whole, kind=self.kind)

    def _host_sender(self, receiver: int, bulk: bool) -> Mover:
        board = self._switchboard
        if board is None or not board.reaches(receiver):
            send, tag = self._control.send, self._tag(bulk)
            return lambda buffer: send([buffer], receiver, tag)
        if receiver not in self._sending:
            try:
                self._sending[receiver] = SendingLink(board.call(receiver, self.epoch))
            except OSError as error:
                raise ConnectionLost(self, receiver, "calling") from error
        return self._sending[receiver]

    def _host_receiver(self, sender: int, bulk: bool) -> Mover:
        board = self._switchboard
        if board is None or not board.reaches(sender):
            receive, tag = self._control.recv, self._tag(bulk)
            return lambda buffer: receive([buffer], sender, tag)
        if sender not in self._receiving:
            answer = partial(self._await_call, board, sender, self.epoch)
            self._receiving[sender] = ReceivingLink(answer, partial(self._look_up, sender))
        return self._receiving[sender]

    def _await_call(self, board: Switchboard, sender: int, epoch: int) -> socket.socket:
        began = time.monotonic()
        return board.answer(sender, epoch, lambda: self._look_up(sender, time.monotonic() - began))

    def _look_up(self, peer: int, waited: float) -> None:
        """Asked every now and then while a message does not come.

        Raises:
            RemoteFailure: A rank has failed.
            Stalled: It did not come within the group's time-out.
        """
        self.watch.check()
        if waited > self.timeout:
            raise Stalled(self, peer, self.timeout)

    def _tag(self, bulk: bool) -> int:
        return _TAG_BASE + 2 * (self.epoch % _EPOCHS) + bulk

    def _edge(self, sender: int, receiver: int) -> dist.ProcessGroup:
        assert self._edges is not None
        return self._edges[0 if sender < receiver else 1]

    def _by_place(self, host: Mover, device: Mover) -> Mover:
        """One way for CUDA memory, another for the host's."""

        def move(buffer: Tensor) -> Handle:
            if not buffer.is_cuda:
                return host(buffer)
            self._edges_used = True
            return device(buffer)

        return move

    def _connect(self) -> None:
        """Connects the edges to both neighbours, all ranks in one order of edges, so that none waits in a circle."""
        p = self.num_ranks
        ring = sorted({tuple(sorted((rank, (rank + 1) % p))) for rank in range(p) if p > 1})
        for low, high in ring:
            for sender, receiver in ((low, high), (high, low)):
                if self.rank in (sender, receiver):
                    hello = torch.zeros(1, dtype=torch.uint8, device=self.device)
                    end = self.sender(receiver, bulk=True) if self.rank == sender else self.receiver(sender, bulk=True)
                    end(hello).wait()


def _watchdog_of(ranks: Sequence[int], rank: int) -> Watchdog:
    """For a transport that is made without one: with pages of its own on the board, and no group to interrupt."""
    made = tuple(ranks)
    number = _instances[made] = _instances.get(made, 0) + 1
    store = dist.distributed_c10d._get_default_store()
    board = StoreBoard(store, f"torchdistpackage/{'-'.join(map(str, made))}/{number}")
    world_size = dist.get_world_size()
    return Watchdog(Watch(), board, ranks=made, rank=rank, patience=60.0, world_size=world_size, interrupt=lambda: None)


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    found: timedelta = getattr(options, "_timeout", default_pg_timeout)
    return found


def _let_sends_finish(reference: weakref.ref[DistributedTransport]) -> None:
    """At the end of the process: why it ends, and time for slower ranks to take the last messages of the last step."""
    transport = reference()
    error = getattr(sys, "last_value", None)
    if transport is not None and transport.watchdog is not None:
        if isinstance(error, Exception) and not isinstance(error, PipelineError):
            transport.publish(
                FailureReport.of(
                    error,
                    rank=transport.rank,
                    global_rank=transport.global_rank,
                    action="something outside of the pipeline's steps, and ended",
                )
            )
        transport.watchdog.stop()
    for link in [] if transport is None else transport._sending.values():
        link.finish(_LEAVING)
    handles = [] if transport is None else [h for o in transport._outlets.values() for h in o.outstanding()]

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # that rank is gone and needs nothing any more
            for handle in handles:
                handle.wait()

    if handles:
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        waiter.join(_LEAVING)


class TensorGroupShard:
    """Scatter and gather over a tensor-parallel group: each rank moves 1/t of every frame, then all gather the rest.

    Exact where all ranks of the tensor group hold the same activations.

    Args:
        group: The tensor group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def gather(self, full: Tensor, own: Tensor) -> None:
        """Fills `full` with the slices of all ranks, in rank order."""
        dist.all_gather(list(full.chunk(self.size)), own.contiguous(), group=self._group)
