"""Frames over torch.distributed.

::

    CPU tensors             | gloo: header and tensors in one message
    CUDA tensors, gloo      | the same, staged through host memory
    CUDA tensors, NCCL      | header over gloo (the host must read it), tensors over the NCCL communicator of the edge

One NCCL communicator is one FIFO, on which opposite directions block each other, so every directed edge between two
ranks has its own. torch makes one communicator for each pair of ranks in a group, so two groups of the same ranks are
enough: one for all edges to a higher rank, one for all edges to a lower rank. The edges between neighbours are
connected when the transport is made. On gloo a tag keeps streams apart: slots and bulk, and the epochs before and after
a failure.

gloo cannot be asked whether a message has arrived, and a wait with a time-out breaks its connection. So nothing here
polls: every wait is for a message that either comes, is replaced by a failure frame, or ends with the connection.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.runtime.failure import FailureReport
from torchdistpackage.runtime.transport import Mover, Transport

__all__ = ["DistributedTransport", "TensorGroupShard"]

_TAG_BASE = 1 << 30  # far from the tags that a user's own send and recv on this group would take
_EPOCHS = 1 << 20
_PATIENCE = 3.0  # seconds that a rank with a broken connection waits for the other's report

_instances: dict[tuple[int, ...], int] = {}


@final
class DistributedTransport(Transport):
    """One rank's view of a pipeline group.

    Args:
        control: The pipeline's ranks in a group that carries CPU tensors (gloo).
        edges: Two more groups of the same ranks that carry CUDA tensors (NCCL): for edges to a higher rank, and to a
            lower rank. None: CUDA tensors are staged through the host.
        device: Where received CUDA tensors are put.
    """

    def __init__(
        self,
        control: dist.ProcessGroup,
        edges: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        *,
        device: torch.device,
    ) -> None:
        super().__init__(control.rank(), control.size(), global_rank=dist.get_rank(), device=device)
        self._control, self._edges = control, edges
        ranks = tuple(dist.get_process_group_ranks(control))
        number = _instances[ranks] = _instances.get(ranks, 0) + 1
        self._store_prefix = f"torchdistpackage/{'-'.join(map(str, ranks))}/{number}"
        if edges is not None:
            self._connect()
        atexit.register(_let_sends_finish, weakref.ref(self))

    def sender(self, receiver: int, *, bulk: bool = False) -> Mover:
        """Starts sends to a rank; CUDA buffers go over NCCL."""
        send, tag = self._control.send, self._tag(bulk)
        if not bulk or self._edges is None:
            return lambda buffer: send([buffer], receiver, tag)
        edge = self._edge(self.rank, receiver)
        return lambda buffer: edge.send([buffer], receiver, 0) if buffer.is_cuda else send([buffer], receiver, tag)

    def receiver(self, sender: int, *, bulk: bool = False) -> Mover:
        """Starts receives from a rank; CUDA buffers come over NCCL."""
        receive, tag = self._control.recv, self._tag(bulk)
        if not bulk or self._edges is None:
            return lambda buffer: receive([buffer], sender, tag)
        edge = self._edge(sender, self.rank)
        return lambda buffer: edge.recv([buffer], sender, 0) if buffer.is_cuda else receive([buffer], sender, tag)

    def carries_cuda(self) -> bool:
        """True on NCCL."""
        return self._edges is not None

    def publish(self, report: FailureReport) -> None:
        """Writes the report into the process group's store, once an epoch."""
        try:
            self._store().set(self._report_key(), report.to_bytes().decode())
        except (RuntimeError, ValueError):
            return  # the store is gone with its host: the frames carry the report as well

    def find_report(self) -> FailureReport | None:
        """Looks into the store, for a few seconds: the rank that failed writes there before it leaves."""
        deadline = time.monotonic() + _PATIENCE
        try:
            store = self._store()
            while time.monotonic() < deadline:
                if store.check([self._report_key()]):
                    return FailureReport.from_bytes(store.get(self._report_key()))
                time.sleep(0.02)
        except (RuntimeError, ValueError):
            return None
        return None

    def _tag(self, bulk: bool) -> int:
        return _TAG_BASE + 2 * (self.epoch % _EPOCHS) + bulk

    def _report_key(self) -> str:
        return f"{self._store_prefix}/{self.epoch}"

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def _edge(self, sender: int, receiver: int) -> dist.ProcessGroup:
        assert self._edges is not None
        return self._edges[0 if sender < receiver else 1]

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


def _let_sends_finish(reference: weakref.ref[DistributedTransport]) -> None:
    """At the end of the process: the last messages of the last step may still wait for a slower rank to take them."""
    transport = reference()
    handles = [] if transport is None else [h for o in transport._outlets.values() for h in o.outstanding()]

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # that rank is gone and needs nothing any more
            for handle in handles:
                handle.wait()

    if handles:
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        waiter.join(_PATIENCE)


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
