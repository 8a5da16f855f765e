"""When a step fails: what is said about it, and to whom.

::

    rank 1 raises in 1F2          rank 1's own exception goes on, with the marked grid as a note
        |  FAILURE frame on every edge, and a report in the store of the process group
        v
    ranks 0 and 2 wait for rank 1's next message, find the report instead, pass it on, raise PipelineError
        v
    ranks 3, 4, ... likewise: every wait of a step is a wait for a message, so a message ends it

A rank that dies without a word closes its connections; whoever notices looks for a report in the store, so that the
root cause is named even if the frames did not get through.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass

from torchdistpackage.errors import PipelineError, TransportError

__all__ = ["ConnectionLost", "FailureReport", "RemoteFailure"]

_REPORT_BYTES = 3584  # fits into the smallest frame; the tail of a traceback is what matters


@dataclass(frozen=True)
class FailureReport:
    """Who failed, where and why.

    Attributes:
        rank: Rank in the pipeline group.
        global_rank: Rank in the world.
        action: The action as text (`"2F0"`), or what the rank did outside of the plan.
        error: `repr` of the exception.
        trace: The traceback's text, or its tail.
    """

    rank: int
    global_rank: int
    action: str
    error: str
    trace: str

    @classmethod
    def of(cls, error: BaseException, *, rank: int, global_rank: int, action: str) -> FailureReport:
        """The report of an exception that has just been caught."""
        trace = "".join(traceback.format_exception(error))
        return cls(rank, global_rank, action, _short(repr(error), 1000), trace)

    def to_bytes(self) -> bytes:
        """JSON, cut from the front of the traceback until it fits into one small frame."""
        trace = self.trace
        while True:
            text = json.dumps({**asdict(self), "trace": trace}).encode()
            if len(text) <= _REPORT_BYTES or not trace:
                return text[:_REPORT_BYTES]
            trace = trace[max(1, len(text) - _REPORT_BYTES) :]

    @classmethod
    def from_bytes(cls, data: bytes) -> FailureReport:
        """Reads `to_bytes` back."""
        return cls(**json.loads(data))

    def as_error(self) -> PipelineError:
        """What every other rank raises."""
        return PipelineError(
            f"rank {self.rank} of the pipeline (global rank {self.global_rank}) failed at {self.action}: {self.error}\n"
            f"Its traceback:\n{self.trace}"
        )


class RemoteFailure(Exception):
    """Another rank's report has arrived in place of a message. Internal: users see `PipelineError`."""

    def __init__(self, report: FailureReport) -> None:
        super().__init__(report.error)
        self.report = report


class ConnectionLost(TransportError):
    """The connection to a rank broke: it was killed, or it failed and left. The executor looks for its report."""

    def __init__(self, peer: int, doing: str) -> None:
        super().__init__(f"the connection broke while {doing} rank {peer}")
        self.peer = peer


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
