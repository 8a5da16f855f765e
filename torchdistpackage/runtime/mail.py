"""What goes from one stage to another: over the transport, or from hand to hand within this rank.

::

    result of 1F0   | sent at once                       the plan has the SEND right behind its action
                    | kept for a SEND that comes later   where the plan has something in between
                    | handed over                        the next stage is on this rank, too

The executor says when, this file says how. Neighbours: `skips.py` uses it for what goes past stages.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.edge import Key
from torchdistpackage.runtime.hand_over import HandOver
from torchdistpackage.runtime.message import Kind, Message
from torchdistpackage.runtime.program import Instruction
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.stage import Output
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Plan

__all__ = ["Mail", "gradient_list"]


@final
class Mail:
    """The messages of one plan on one rank; empty between steps.

    Args:
        plan: Says who owns which stage.
        transport: This rank's.

    Attributes:
        rows: Rows of the step's batch, which every message says on; 0 until they are known.
        recorder: Gets the times of this step; None for none.
    """

    def __init__(self, plan: Plan, transport: Transport) -> None:
        self.owners, self._rank, self._transport = plan.placement.owners, transport.rank, transport
        self._training = not plan.forward_only
        self._local: dict[Key, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Comes before and after each step: nothing is left of the one before, not even if it failed."""
        self.rows, self.recorder = 0, None
        self._local = {}

    recorder: Recorder | None

    def end(self) -> None:
        """Comes after the last action.

        Raises:
            TransportError: A result is left.
        """
        if self._local:
            raise TransportError(f"the step ended with results that nobody took: {sorted(self._local)}")

    def take(self, at: Instruction, kind: Kind, source: int) -> Message:
        """Waits for the input that comes from a neighbouring stage, and takes back frames that are proved delivered.

        Args:
            at: The action that needs it.
            kind: FORWARD or BACKWARD.
            source: The stage that sends it.
        """
        transport = self._transport
        if at.peer == self._rank:
            handed: HandOver = self._local.pop((kind, source, at.microbatch))
            message = handed.take(source, at.stage)
        else:
            message = transport.inlet(at.peer).take(kind, source, at.microbatch)
        for peer, key in at.proves:
            transport.release(peer, key)
        if self.recorder is not None and at.peer != self._rank:
            self.recorder.taken()
        return message

    def pass_on(self, at: Instruction, kind: Kind, result: Output | None, to_stage: int) -> None:
        """Sends a result, keeps it for a SEND that comes later, or hands it to another stage of this rank.

        Args:
            at: The action that made it.
            kind: FORWARD or BACKWARD.
            result: None for a micro-batch without rows.
            to_stage: The neighbouring stage.
        """
        if self.recorder is not None:
            self.recorder.computed()
            if kind == Kind.FORWARD and result is not None:
                self.recorder.note_message(at.stage, result.leaves)
        if at.send_to >= 0:
            self._send(at, at.send_to, kind, result)
        elif self.owners[to_stage] == self._rank:
            handed = HandOver.of(result, self.rows, training=self._training)
            self._local[kind, at.stage, at.microbatch] = handed
        else:
            self._local[kind, at.stage, at.microbatch] = result

    def send_kept(self, at: Instruction, kind: Kind) -> None:
        """The SEND of a result that was kept for it."""
        self._send(at, at.peer, kind, self._local.pop((kind, at.stage, at.microbatch)))

    def _send(self, at: Instruction, receiver: int, kind: Kind, result: Output | None) -> None:
        outlet = self._transport.outlet(receiver)
        if result is None:
            outlet.send_empty(kind, at.stage, at.microbatch, self.rows)
        else:
            outlet.send(kind, at.stage, at.microbatch, self.rows, result.leaves, result.spec, result.skips)

    def put_skip(self, source: int, to: int, microbatch: int, result: Output) -> None:
        """Sends a result past the neighbour, or hands it over.

        Args:
            source: The stage that made it.
            to: The stage that uses it.
            microbatch: Which micro-batch.
            result: Values, or gradients if `to` comes before `source`.
        """
        number = source * len(self.owners) + to
        if self.owners[to] == self._rank:
            self._local[Kind.SKIP, number, microbatch] = HandOver.of(result, self.rows, training=self._training)
        else:
            outlet = self._transport.outlet(self.owners[to])
            outlet.send(Kind.SKIP, number, microbatch, self.rows, result.leaves, result.spec)

    def take_skip(self, source: int, stage: int, microbatch: int) -> Message:
        """Waits for what `put_skip` has sent.

        Args:
            source: The stage that made it.
            stage: The stage that uses it.
            microbatch: Which micro-batch.
        """
        number, peer = source * len(self.owners) + stage, self.owners[source]
        if peer == self._rank:
            handed: HandOver = self._local.pop((Kind.SKIP, number, microbatch))
            return handed.take(source, stage)
        message = self._transport.inlet(peer).take(Kind.SKIP, number, microbatch)
        if self.recorder is not None:
            self.recorder.taken()
        return message


def gradient_list(message: Message) -> list[Tensor | None]:
    """The gradients that a message brings, in the order of the tensors that were sent."""
    layout = message.layout
    assert layout is not None
    tree = layout.tree(message.tensors)
    return tree if isinstance(tree, list) else [tree]
