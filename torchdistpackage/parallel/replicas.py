"""The replicas of a stage, before they reduce their gradients together.

A reduction waits for every replica, and nothing but its time-out ends that wait. So the replicas agree first, by
messages that a failure can take the place of: whoever has failed until then keeps all others out of the reduction, and
all groups are whole for the next step::

    replica 0    F0 F1 B0 [agree] B1 reduce         replica 0    F0 F1 B0 [agree]  PipelineError: replica 1 ...
    replica 1    F0 F1 B0 [agree] B1 reduce         replica 1    F0 F1 ! ValueError

It is a barrier by dissemination (Hensgen, Finkel and Manber, 1988): in round k a rank tells the one 2^k after it and
hears from the one 2^k before it, log2(d) rounds for d replicas.
"""

from __future__ import annotations

from typing import final

from torchdistpackage.runtime.message import Kind
from torchdistpackage.runtime.transport import Transport

__all__ = ["Replicas"]


@final
class Replicas:
    """The ranks that hold the same stages as this one, or shards of them, in other pipelines.

    Args:
        transport: To them.
        mode: What they are: "data", "tensor".
    """

    def __init__(self, transport: Transport, mode: str) -> None:
        self.transport = transport
        transport.kind = f"{mode} group"

    def agree(self) -> None:
        """Returns when all of them have come to this place of the step.

        Raises:
            RemoteFailure: One of them has failed.
        """
        transport = self.transport
        transport.begin_step("a training step", training=True)
        rank, size = transport.rank, transport.num_ranks
        for distance in (1 << k for k in range((size - 1).bit_length())):
            transport.outlet((rank + distance) % size).send_empty(Kind.VALUE, distance, 0, 0)
            transport.inlet((rank - distance) % size).take(Kind.VALUE, distance, 0)
        transport.finish_step(None, None)
