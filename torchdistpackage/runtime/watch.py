"""What this rank does right now, and what it has been told: written by the step, read by `watchdog.py`.

The step pays one store of an attribute for each action and two for each message, no call and no clock.
"""

from __future__ import annotations

import threading
from typing import final

from torchdistpackage.runtime.failure import FailureReport, RemoteFailure

__all__ = ["Watch"]


@final
class Watch:
    """One rank's present.

    Attributes:
        at: The instruction of the plan that is being run, a few words for anything else, None between steps.
        awaits: The global rank whose message is waited for; -1 if none is.
        thread: The thread that runs it.
        step: Counts steps and whatever else is watched: the same instruction in two steps is not one long wait.
        epoch: Counts failures.
        interrupted: Whether a wait in this epoch was ended by closing the groups that it was for.
    """

    __slots__ = ("_told", "at", "awaits", "epoch", "interrupted", "step", "thread")

    def __init__(self) -> None:
        self.at: object = None
        self.awaits = -1
        self.step = 0
        self.thread = 0
        self.epoch = 0
        self.interrupted = False
        self._told: tuple[int, FailureReport] | None = None

    def begin(self, what: str) -> None:
        """Something that may wait for other ranks begins."""
        self.step += 1
        self.thread = threading.get_ident()
        self.at = what

    def end(self) -> None:
        """It is over."""
        self.at = None

    def tell(self, epoch: int, report: FailureReport) -> None:
        """A failure of that epoch has become known."""
        self._told = (epoch, report)

    @property
    def report(self) -> FailureReport | None:
        """The failure of this epoch, if one has become known."""
        told = self._told
        return told[1] if told is not None and told[0] == self.epoch else None

    def check(self) -> None:
        """Asked wherever a wait can look up.

        Raises:
            RemoteFailure: A rank has failed.
        """
        if self.report is not None:
            raise RemoteFailure(self.report)

    def next_epoch(self) -> None:
        """The failure has been dealt with."""
        self.epoch += 1
        self.interrupted = False
        self.awaits = -1
        self.at = None
