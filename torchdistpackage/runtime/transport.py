"""Moves bytes between the ranks of one pipeline: the seam under which torch.distributed can be exchanged.

A transport knows ranks and buffers, nothing else: structure, layouts and failures are `edge.py`'s. All frames from one
rank to another form one stream, in the order in which they were sent; that is what a NCCL communicator and a TCP
connection are anyway, and it is why one failure frame is enough to end any wait.

Neighbours: `p2p.py` (torch.distributed) and `loopback.py` (all ranks as threads of one process) are its two children.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NoReturn, Protocol, cast

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.edge import Handle, Key, Mover
from torchdistpackage.runtime.failure import ConnectionLost, FailureReport, NotWhole, RemoteFailure, Stalled, is_torn
from torchdistpackage.runtime.inlet import Inlet
from torchdistpackage.runtime.message import Kind
from torchdistpackage.runtime.outlet import Outlet
from torchdistpackage.runtime.watch import Watch
from torchdistpackage.runtime.watchdog import Watchdog

__all__ = ["Handle", "Mover", "TensorShard", "Transport"]

# How long a rank with a broken connection looks for a report, in seconds. It was left before that broke, unless
_PATIENCE = 0.5
# it broke in a collective, which does not say whose it was: whoever had it in a step finds out first; or
_PATIENCE_OF_COLLECTIVES = 2.0
# its other end, too, had waited as long as it may: it has yet to find out for whom.
_LATE = 3.0


class TensorShard(Protocol):
    """The tensor-parallel group through which frames are scattered and gathered."""

    rank: int
    size: int

    def gather(self, full: Tensor, own: Tensor) -> None:
        """Fills `full` (size x len(own) bytes) with the slices of all ranks."""


class Transport(ABC):
    """One rank's view of a pipeline group.

    Attributes:
        rank: This rank in the pipeline group.
        num_ranks: Ranks of the pipeline, p.
        global_ranks: All of them in the world, for messages to people.
        global_rank: This one.
        device: Where received CUDA tensors are put.
        receives_ahead: How many compute actions ahead of its use a receive is posted. Each one posted holds the memory
            of a message. gloo's sends move only once the receive is there: with 4 ahead a step of small messages took
            0.6 of the time that it took with none. Where messages lie ready by themselves (links, loopback): 0.
        watchdog: Watches this rank from beside; None if nobody does. Several transports of one rank share it.
        watch: What it sees.
        companions: The rank's transports to others than its pipeline; its failures go there, too.
        partners: Ranks beside its neighbours that may wait for this one: they are told of a failure, too.
        timeout: Seconds after which a wait is given up.
        kind: What the ranks are together, for messages to people.

    Example:
        >>> from torchdistpackage.runtime import loopback
        >>> transport = loopback(4)[2]
        >>> transport.begin_step("a signature that all ranks share", training=False)
        >>> transport.outlet(3).send_empty(Kind.FORWARD, stage=2, microbatch=0, rows=8)  # does not wait
        >>> transport.allocate(3, 4096).shape, transport.epoch
        (torch.Size([4096]), 0)
    """

    receives_ahead = 0
    kind = "pipeline"

    def __init__(
        self,
        rank: int,
        global_ranks: Sequence[int],
        *,
        device: torch.device,
        watchdog: Watchdog | None = None,
        timeout: float,
    ) -> None:
        self.rank, self.global_ranks, self.device = rank, tuple(global_ranks), device
        self.num_ranks, self.global_rank = len(self.global_ranks), self.global_ranks[rank]
        self.watchdog = watchdog
        self.watch = Watch() if watchdog is None else watchdog.watch
        self.companions: list[Transport] = []
        self.partners: set[int] = set()
        self.timeout = timeout
        self._broken: PipelineError | None = None
        self._others_know = False
        self.signature = ""
        self.training = True
        self.wire_dtype: torch.dtype | None = None
        self.shard: TensorShard | None = None
        self._outlets: dict[int, Outlet] = {}
        self._inlets: dict[int, Inlet] = {}
        self._abandoned: list[object] = []  # sends that nobody may ever take; freed memory must not be read by them

    @abstractmethod
    def sender(self, receiver: int, *, bulk: bool = False) -> Mover:
        """A function that starts sending a 1-D uint8 buffer.

        Args:
            receiver: The rank at the other end.
            bulk: The second stream of the edge, for what does not fit into a slot.
        """

    @abstractmethod
    def receiver(self, sender: int, *, bulk: bool = False) -> Mover:
        """A function that starts receiving into a 1-D uint8 buffer, which may be longer than the message."""

    @abstractmethod
    def carries_cuda(self) -> bool:
        """Whether bulk buffers may live on a CUDA device (NCCL); otherwise CUDA tensors are staged through the host."""

    def is_connected(self, peer: int) -> bool:
        """Whether CUDA memory may go to and from that rank at once, without both hosts coming together for it first."""
        return True

    def carries(self, kind: int, peer: int) -> bool:
        """Whether CUDA tensors of a message stay on the device on their way.

        Skips may join any two ranks. Two ranks that NCCL has not connected yet wait for each other's host, which no
        plan is proved for: their tensors are staged through the hosts' memory.
        """
        return self.carries_cuda() and (kind != Kind.SKIP or self.is_connected(peer))

    def allocate(self, receiver: int, length: int) -> Tensor:
        """Host memory for a frame to that rank: a place from which its stream can take it with the fewest copies."""
        return torch.empty(length, dtype=torch.uint8)

    def recycle(self, receiver: int, buffer: Tensor) -> None:
        """Takes a frame's memory back: no message of its layout has been sent for a while."""
        return

    def receiving(self, device: torch.device | str) -> AbstractContextManager[object]:
        """Surrounds the start of a bulk receive into memory of that device."""
        return nullcontext()

    def publish(self, report: FailureReport) -> None:
        """Leaves a report where ranks that lost their connection can find it."""
        if self.watchdog is not None:
            self.watchdog.publish(report)

    def look(self) -> FailureReport | None:
        """A report of this epoch that has come already."""
        if self.watchdog is not None and self.watch.report is None:
            self.watchdog.look()
        return self.watch.report

    def find_report(self, patience: float) -> FailureReport | None:
        """Looks for a report of this epoch for a while: a rank that fails tells the others before it leaves.

        Args:
            patience: Seconds.
        """
        deadline = time.monotonic() + patience
        while True:
            for transport in (self, *self.companions):
                report = transport.look()
                if report is not None:
                    return report
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)

    def is_late(self) -> bool:
        """Whether this rank has waited about as long as the time-out allows, so that others may give up now, too."""
        return self.watchdog is not None and self.watchdog.waited > self.timeout / 2

    def outlet(self, receiver: int) -> Outlet:
        """The sending end of the edge to another rank."""
        outlet = self._outlets.get(receiver)
        if outlet is None:
            outlet = self._outlets[receiver] = Outlet(self, receiver)
            outlet.begin_step()
        return outlet

    def release(self, receiver: int, key: Key) -> None:
        """Takes back the memory of a message that a rank has provably taken, if there was one."""
        outlet = self._outlets.get(receiver)
        if outlet is not None:
            outlet.release(key)

    def shrink(self) -> None:
        """Comes between steps: lets go of the memory of frames that are not under way."""
        for outlet in self._outlets.values():
            outlet.shrink()

    def inlet(self, sender: int) -> Inlet:
        """The receiving end of the edge from another rank."""
        inlet = self._inlets.get(sender)
        if inlet is None:
            inlet = self._inlets[sender] = Inlet(self, sender)
            inlet.begin_step()
        return inlet

    def begin_step(
        self,
        signature: str,
        *,
        training: bool,
        wire_dtype: torch.dtype | None = None,
        shard: TensorShard | None = None,
    ) -> None:
        """Says what this rank is about to do; every frame carries the signature's checksum.

        Raises:
            NotWhole: An earlier failure has broken connections.
            RemoteFailure: A rank has failed since the last step.
        """
        if self.watchdog is not None:
            self.watchdog.start()
        self.watch.check()
        self.require_whole()
        self.signature, self.training, self.wire_dtype, self.shard = signature, training, wire_dtype, shard
        for outlet in self._outlets.values():
            outlet.begin_step()
        for inlet in self._inlets.values():
            inlet.begin_step()

    def announce(self, signature: str) -> None:
        """Says what comes before a step, in which the ranks find out what step it is to be."""
        self.signature = signature
        for outlet in self._outlets.values():
            outlet.sign()
        for inlet in self._inlets.values():
            inlet.sign()

    def require_whole(self) -> None:
        """Raises if no step can run any more.

        Raises:
            NotWhole: An earlier failure has broken connections.
        """
        if self._broken is not None:
            raise NotWhole(
                "an earlier failure has broken connections, so that no further step can run with them: start all ranks "
                "again from a checkpoint (torchrun --max-restarts does), or, if all processes still run, call "
                "tpc.setup_process_groups and wrap modules in DDP again on every rank. The failure was: "
                f"{self._broken}"
            )

    @property
    def epoch(self) -> int:
        """Counts failures; frames of different epochs never meet."""
        return self.watch.epoch

    def finish_step(self, token_from: int | None, token_to: int | None) -> None:
        """Ends the step on all ranks together.

        A token starts at the rank that works longest and passes every rank once it has finished, too. When it comes,
        all messages of this step have been taken everywhere, so that their memory is free again; and a rank that fails
        in its last action sends its report in the token's place, so that no rank takes a failed step for a good one.

        Args:
            token_from: The rank before this one on the token's way; None where it starts.
            token_to: The rank after this one; None where it ends.
        """
        if token_from is not None:
            self.inlet(token_from).take(Kind.DONE, 0, 0)
        for outlet in self._outlets.values():
            outlet.release_all()
        for inlet in self._inlets.values():
            inlet.end_step()
        if token_to is not None:
            self.outlet(token_to).send_empty(Kind.DONE, 0, 0, 0)

    def fail(self, error: BaseException, action: str, note: str = "", *, whole: bool = True) -> NoReturn:
        """Ends a step that cannot go on: every rank is told, and this one raises.

        Args:
            error: What was caught.
            action: What this rank was doing.
            note: Added to the exception that is raised.
            whole: Whether this rank could run another step.

        Raises:
            PipelineError: Another rank's failure.
            BaseException: `error` itself, if it is this rank's own.
        """
        if isinstance(error, NotWhole) and self._others_know:
            self.watch.end()
            raise error
        report = self._cause(error, action)
        own = report is None
        whole = whole and self.is_whole() and not self.watch.interrupted and not isinstance(error, NotWhole)
        if report is None:
            report = FailureReport.of(error, rank=self.rank, global_rank=self.global_rank, action=action)
            report = replace(report, whole=whole)
        if not whole or not report.whole:
            self._broken, self._others_know = report.as_error(), not report.whole
        for transport in (self, *self.companions):
            transport.abort(report)
        if not isinstance(error, RemoteFailure):  # before this rank leaves, and after what does not need the store
            self.publish(report)
        self.watch.next_epoch()
        raised: BaseException = error if own else report.as_error()
        if note and hasattr(raised, "add_note"):
            raised.add_note(note)
        if own:
            raise raised
        raise raised from (None if isinstance(error, RemoteFailure) else error)

    def _cause(self, error: BaseException, action: str) -> FailureReport | None:
        """The failure that led to an error here; None if it is this rank's own."""
        if isinstance(error, RemoteFailure):
            return error.report
        if isinstance(error, ConnectionLost):
            patience = _LATE if self.is_late() else _PATIENCE
            return self.find_report(patience) or cast(FailureReport, error.place.lost(error.peer, action))
        if isinstance(error, Stalled):
            return self.find_report(0.0) or cast(FailureReport, error.place.stalled(error, action))
        if self.watch.interrupted:
            return self.watch.report
        return self.find_report(_PATIENCE_OF_COLLECTIVES) or self.torn(action) if is_torn(error) else None

    @contextmanager
    def guard(self, action: str) -> Iterator[None]:
        """Surrounds what may wait for other ranks outside of a plan: it fails on all ranks together, as a step does.

        Args:
            action: What it is, for messages to people.
        """
        self.watch.begin(action)
        try:
            self.watch.check()
            self.require_whole()
            yield
        except BaseException as error:
            self.fail(error, action)
        self.watch.end()

    def is_whole(self) -> bool:
        """Whether connections can be used again if the step fails now."""
        return True

    def lost(self, peer: int, action: str) -> FailureReport:
        """The report of a rank that has gone without one."""
        what = self.condition(peer) or "it closed its connections without a word: it was killed, or it ended early"
        seen = f"{what}; {self.name(self.rank)} waited for it at {action}"
        return FailureReport(peer, self.global_ranks[peer], "", seen, "", whole=False, kind=self.kind)

    def stalled(self, error: Stalled, action: str) -> FailureReport:
        """The report of a rank that does not go on."""
        text = f"{error}, at {action}"
        return FailureReport(error.peer, self.global_ranks[error.peer], "", text, "", whole=False, kind=self.kind)

    def torn(self, action: str) -> FailureReport | None:
        """The report of a collective whose group broke; None if nobody is known to have left."""
        for transport in (self, *self.companions):
            for peer in range(transport.num_ranks):
                if peer != transport.rank and transport.condition(peer):
                    return transport.lost(peer, action)
        return None

    def condition(self, peer: int) -> str:
        """What is known of a rank that says nothing; "" if nothing is."""
        return ""

    def name(self, rank: int) -> str:
        """A rank for messages to people."""
        return f"rank {rank} of the {self.kind}"

    def abort(self, report: FailureReport) -> None:
        """Tells every neighbour and forgets all edges; in the next epoch the next step is clean."""
        neighbours = {(self.rank - 1) % self.num_ranks, (self.rank + 1) % self.num_ranks} - {self.rank}
        for peer in neighbours | self.partners | self._outlets.keys() | self._inlets.keys():
            try:
                outlet = self.outlet(peer)
                outlet.send_failure(report)
            except RuntimeError:
                continue  # that rank is gone: whoever still waits for it has been told by its closed connection
            self._abandoned.append(outlet)
        self._abandoned.extend(self._inlets.values())
        self._outlets, self._inlets = {}, {}
