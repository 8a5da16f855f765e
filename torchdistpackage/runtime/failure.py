"""When a step fails: what is said about it, and to whom.

::

    rank 1 raises in 1F2          rank 1's own exception goes on, with the marked grid as a note
        |  FAILURE frame on every edge, and a report on the board
        v
    ranks 0 and 2 wait for rank 1's next message, find the report instead, pass it on, raise PipelineError
        v
    ranks 3, 4, ... likewise: every wait of a step is a wait for a message, so a message ends it

A rank that dies without a word closes its connections; whoever notices looks for a report on the board, so that the
root cause is named even if the frames did not get through, and else reports the death itself. A rank that is stuck says
nothing at all: who waits for it reports that when the time is up.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from torchdistpackage.errors import PipelineError, ScheduleError, TransportError
from torchdistpackage.schedule import Action

__all__ = ["ConnectionLost", "FailureReport", "NotWhole", "RemoteFailure", "Stalled", "is_torn", "raise_lost"]

_TORN = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "Connection refused", "Socket")
_ERROR = 1000  # characters
_REPORT_BYTES = 3584  # fits into the smallest frame; the tail of a traceback is what matters


@dataclass(frozen=True)
class FailureReport:
    """Who failed, where and why.

    Attributes:
        rank: Rank in its pipeline, or in what `kind` says; -1 if it is in neither.
        global_rank: Rank in the world.
        action: The action as text (`"2F0"`), or what the rank did outside of the plan; "" if nobody knows.
        error: `repr` of the exception, or what the others saw.
        trace: The traceback's text, or its tail.
        whole: Whether all connections still work after it.
        kind: What the rank is one of.
    """

    rank: int
    global_rank: int
    action: str
    error: str
    trace: str
    whole: bool = True
    kind: str = "pipeline"

    @classmethod
    def of(cls, error: BaseException, *, rank: int, global_rank: int, action: str) -> FailureReport:
        """The report of an exception that has just been caught."""
        trace = "".join(traceback.format_exception(error))
        try:
            text = repr(error)
        except Exception:  # a class of the user's whose repr fails must not keep the report back
            text = type(error).__name__
        return cls(rank, global_rank, action, text if len(text) <= _ERROR else f"{text[:_ERROR]}...", trace)

    def to_bytes(self) -> bytes:
        """JSON that fits into one small frame: cut from the front of the traceback, then from the end of the error."""
        trace, error = self.trace, self.error
        while True:
            text = json.dumps({**asdict(self), "trace": trace, "error": error}).encode()
            over = len(text) - _REPORT_BYTES
            if over <= 0:
                return text
            if trace:
                trace = trace[max(1, over) :]
            else:
                error = error[: -max(1, over // 6)]  # JSON writes a character with up to six bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> FailureReport:
        """Reads `to_bytes` back."""
        return cls(**json.loads(data))

    def as_error(self) -> PipelineError:
        """What every other rank raises."""
        try:
            action = Action.parse(self.action)
            at = f" at {action} ({action.words})"
        except ScheduleError:
            action, at = None, f" at {self.action}" if self.action else ""
        trace = f"\nIts traceback:\n{self.trace}" if self.trace else ""
        who = f"rank {self.rank} of the {self.kind} (global rank {self.global_rank})"
        if self.rank < 0:
            who = f"global rank {self.global_rank}"
        raised = PipelineError(f"{who} failed{at}: {self.error}{trace}")
        raised.global_rank, raised.action = self.global_rank, self.action or None
        if action is not None:
            raised.stage, raised.microbatch = action.stage, action.microbatch
        return raised


class RemoteFailure(Exception):
    """Another rank's report has arrived in place of a message. Internal: users see `PipelineError`."""

    def __init__(self, report: FailureReport) -> None:
        super().__init__(report.error)
        self.report = report


class NotWhole(PipelineError):
    """An earlier failure has broken connections, so that no further step can run with them."""


class ConnectionLost(TransportError):
    """The connection to a rank broke: it was killed, or it failed and left.

    Attributes:
        place: Whose rank `peer` is: the transport.
        peer: The rank at the other end.
    """

    def __init__(self, place: Any, peer: int, doing: str) -> None:
        super().__init__(f"the connection broke while {doing} rank {peer}")
        self.place, self.peer = place, peer


class Stalled(TransportError):
    """A rank did not send what is waited for within the time-out, and its connection is open.

    Attributes:
        place: Whose rank `peer` is: the transport.
        peer: The rank at the other end.
        seconds: The time-out.
    """

    def __init__(self, place: Any, peer: int, seconds: float) -> None:
        super().__init__(f"nothing came from rank {peer} within {seconds:g} s, the process group's time-out")
        self.place, self.peer, self.seconds = place, peer, seconds


def raise_lost(error: Exception, place: Any, peer: int, doing: str) -> NoReturn:
    """Raises what an error of sockets or of torch.distributed means.

    Args:
        error: What was caught; errors of ours go on as they are.
        place: The transport that `peer` is a rank of.
        peer: The rank at the other end.
        doing: What was tried.
    """
    if isinstance(error, TransportError):
        raise error
    if "timed out" in str(error).lower():
        raise Stalled(place, peer, place.timeout) from error
    raise ConnectionLost(place, peer, doing) from error


def is_torn(error: BaseException) -> bool:
    """Whether an error is what a collective of torch.distributed raises when a rank of its group is gone or late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and any(mark in text for mark in _TORN)
