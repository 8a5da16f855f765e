"""What a run measures of itself: loss, norm, speed, memory and bubble; the same numbers on every rank.

Nothing is read from a device in between: a step leaves tensors, and reading them is part of logging. Each rank knows
something else, and tells the others then::

    last stage of each replica    its share of the loss
    first stage of each replica   how many samples and tokens came in
    every rank                    its peak memory

Neighbours: `training_loop.py` calls it, `events.py` hands the rows on.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.parallel import last_timeline
from torchdistpackage.topology import tpc
from torchdistpackage.trainer.batches import Batch
from torchdistpackage.trainer.process_layout import from_every_rank

__all__ = ["Records", "peak_memory"]


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: on a GPU what torch allocated there, else all of the process.

    Example:
        >>> peak_memory(torch.device("cpu")) > 1e6
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@final
class Records:
    """Sums since the last row of the log, and since the beginning.

    Args:
        device: Where losses are.
        counts_tokens: Whether the first input of a batch is tokens.
        has_loss: Whether this rank has the last stage.
        first_timed: The first step of this process, from 1, that counts for speeds: earlier ones warm up.

    Attributes:
        tokens_seen: Of all replicas, until the last row of the log; what a checkpoint has of them is for `load`.

    Example:
        >>> records = Records(torch.device("cpu"), counts_tokens=True, has_loss=True)
        >>> records.resume()
        >>> records.step([Batch((torch.ones(2, 3),), rows=2)], loss=torch.tensor(0.5), norm=None)
        >>> row = records.row(learning_rate=0.1, epoch=1.0, recorded=False)
        >>> row["loss"], records.tokens_seen
        (0.5, 6)
    """

    def __init__(self, device: torch.device, *, counts_tokens: bool, has_loss: bool, first_timed: int = 1) -> None:
        self._has_loss = has_loss
        self._device, self._counts_tokens, self._first_timed = device, counts_tokens, first_timed
        self._window, self._whole = _Sums(device), _Sums(device)
        self._norm: Tensor | None = None
        self.tokens_seen = 0
        self._ran = 0

    def pause(self) -> None:
        """What comes now is not training: an evaluation, a checkpoint."""
        for sums in (self._window, self._whole):
            sums.stop()

    def resume(self) -> None:
        """Training begins, or goes on."""
        for sums in (self._window, self._whole):
            sums.start()

    def step(self, batches: Sequence[Batch], loss: Tensor | None, norm: Tensor | None) -> None:
        """Takes one step down.

        Args:
            batches: This replica's.
            loss: This replica's share of the loss, on the rank of the last stage.
            norm: Of the gradients before clipping; None if it was not computed.
        """
        self._ran += 1
        self._norm = norm
        rows = sum(batch.rows for batch in batches if batch.real)
        tokens = sum(_tokens(batch) for batch in batches if batch.real) if self._counts_tokens else 0
        for sums in (self._window, self._whole):
            sums.add(loss, rows, tokens, timed=self._ran >= self._first_timed)
        if self._ran == self._first_timed - 1:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            for sums in (self._window, self._whole):
                sums.start_again()

    def row(self, *, learning_rate: float, epoch: float, recorded: bool) -> dict[str, float]:
        """The next row of the log, the same on every rank: speed and bubble are the first rank's. Collective.

        Args:
            learning_rate: Of the step.
            epoch: How far training is.
            recorded: Whether the step's timeline was measured.

        Raises:
            PipelineError: Another rank has failed.
        """
        window = self._window
        timeline = last_timeline() if recorded else None
        told = self._told(
            window,
            norm=None if self._norm is None else float(self._norm),
            bubble=None if timeline is None else timeline.bubble_share,
        )
        self.tokens_seen += told.seen
        row = {"loss": told.loss, "learning_rate": learning_rate}
        if told.norm is not None:
            row["grad_norm"] = told.norm
        if told.samples and told.seconds:
            name = "tokens_per_second" if self._counts_tokens else "samples_per_second"
            row[name] = (told.tokens if self._counts_tokens else told.samples) / told.seconds
            row["step_seconds"] = told.seconds / window.timed
        if told.bubble is not None:
            row["bubble_share"] = told.bubble
        row |= {"peak_memory_bytes": told.memory, "epoch": epoch}
        self._window = _Sums(self._device)
        self._window.start()
        return row

    def summary(self) -> dict[str, float]:
        """The whole run in numbers, the same on every rank; times are since this process began. Collective.

        Raises:
            PipelineError: Another rank has failed.
        """
        told = self._told(self._whole)
        per_second = 1 / told.seconds if told.seconds else 0.0
        found = {
            "train_runtime": told.seconds,
            "train_samples_per_second": told.samples * per_second,
            "train_steps_per_second": self._whole.timed * per_second,
            "train_loss": told.loss,
            "peak_memory_bytes": told.memory,
        }
        return found | ({"train_tokens_per_second": told.tokens * per_second} if self._counts_tokens else {})

    def state(self) -> dict[str, Any]:
        """The sums of losses, so that a resumed run logs what an undisturbed one would. Collective."""
        own = tpc.get_dp_rank() if self._has_loss else None
        told = from_every_rank([own, [[sums.loss.item(), sums.seen] for sums in (self._window, self._whole)]])
        shares = {str(replica): sums for replica, sums in told if replica is not None}
        return {"steps": [self._window.steps, self._whole.steps], "shares": shares, "tokens_seen": self.tokens_seen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave, on any number of replicas.

        Args:
            state: From `state`; an empty one changes nothing.
        """
        if not state:
            return
        shares: Mapping[str, Any] = state["shares"]
        same = len(shares) == tpc.get_dp_size()
        mine = [tpc.get_dp_rank()] if same else range(len(shares)) if tpc.get_dp_rank() == 0 else ()
        for which, sums in enumerate((self._window, self._whole)):
            sums.steps = state["steps"][which]
            found = [shares[str(replica)][which] for replica in mine]
            sums.seen = sum(seen for _, seen in found)
            if self._has_loss:
                sums.loss.fill_(sum(loss for loss, _ in found))
        self.tokens_seen = state["tokens_seen"]

    def _told(self, sums: _Sums, *, norm: float | None = None, bubble: float | None = None) -> _Told:
        own_loss = sums.loss.item()  # waits for the device, so that the clock is right
        seconds, first = sums.seconds, tpc.is_first_in_pipeline_group()
        counts = [own_loss, sums.rows, sums.tokens, sums.seen] if first else [own_loss, 0, 0, 0]
        everyone = from_every_rank([counts, peak_memory(self._device), [seconds, norm, bubble]])
        loss, samples, tokens, seen = (sum(column) for column in zip(*(each[0] for each in everyone), strict=True))
        memory = max(each[1] for each in everyone)
        return _Told(loss / max(1, sums.steps), samples, tokens, seen, memory, *everyone[0][2])


@dataclass(frozen=True)
class _Told:
    """What all ranks have told each other."""

    loss: float
    samples: int
    tokens: int
    seen: int
    memory: int
    seconds: float
    norm: float | None
    bubble: float | None


class _Sums:
    """Sums over steps; seconds are without the pauses."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = self.timed = self.rows = self.tokens = 0
        self.seen = 0  # tokens, those of steps that are not timed included
        self._before, self._since = 0.0, 0.0

    def add(self, loss: Tensor | None, rows: int, tokens: int, *, timed: bool) -> None:
        if loss is not None:
            self.loss += loss
        self.steps, self.seen = self.steps + 1, self.seen + tokens
        if timed:
            self.timed, self.rows, self.tokens = self.timed + 1, self.rows + rows, self.tokens + tokens

    def start(self) -> None:
        self._since = self._since or time.perf_counter()

    def stop(self) -> None:
        self._before, self._since = self.seconds, 0.0

    def start_again(self) -> None:
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)


def _tokens(batch: Batch) -> int:
    first = batch.args[0] if batch.args else None
    return first.numel() if isinstance(first, Tensor) else 0
