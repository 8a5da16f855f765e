"""Where ranks leave word for each other outside of messages: reports of failures, and what a rank that waits is doing.

Messages bring bad news first; the board is for who does not wait for a message of the rank that failed: replicas of the
pipeline, ranks in a collective, ranks that find a connection closed. It is asked when something takes long, never in a
step that goes well. Every failure has its own page (an epoch), so that an old one is not taken for a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

from torchdistpackage.runtime.failure import FailureReport

__all__ = ["Board", "StoreBoard"]


class Board(Protocol):
    """What the ranks share."""

    def publish(self, epoch: int, report: FailureReport) -> None:
        """Leaves a report; the first one of an epoch stays."""

    def find(self, epoch: int) -> FailureReport | None:
        """The report of an epoch."""

    def say(self, epoch: int, rank: int, text: str) -> None:
        """Leaves word what a rank is doing; "" if it goes on."""

    def said(self, epoch: int, ranks: Sequence[int]) -> dict[int, str]:
        """What these ranks have said."""


@final
class StoreBoard:
    """A board in torch's key-value store.

    Args:
        store: Of the world's process group.
        prefix: One for all ranks that are to hear of each other's failures.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def publish(self, epoch: int, report: FailureReport) -> None:
        """Leaves a report: who comes second only adds what followed from the first."""
        self._store.compare_set(f"{self._prefix}/{epoch}/report", "", report.to_bytes().decode())

    def find(self, epoch: int) -> FailureReport | None:
        """The report of an epoch."""
        text = self._read(f"{self._prefix}/{epoch}/report")
        return FailureReport.from_bytes(text) if text else None

    def say(self, epoch: int, rank: int, text: str) -> None:
        """Leaves word what a global rank is doing."""
        self._store.set(f"{self._prefix}/{epoch}/{rank}", text)

    def said(self, epoch: int, ranks: Sequence[int]) -> dict[int, str]:
        """What these global ranks have said."""
        found = {rank: self._read(f"{self._prefix}/{epoch}/{rank}").decode() for rank in ranks}
        return {rank: text for rank, text in found.items() if text}

    def _read(self, key: str) -> bytes:
        # `get` alone would wait for the key.
        return bytes(self._store.get(key)) if self._store.check([key]) else b""
