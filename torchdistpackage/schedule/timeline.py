"""When everything in a step happened, or would happen: what a simulation and a measured step have in common.

::

    plan + costs ---- simulate.py ----\
                                        Timeline ---- visualize/ (grid, figure, trace), planner.py
    a recorded step -- runtime/ ------/

A timeline is data: spans of time, each with the action that fills it. Neighbours: `plan.py` says what is done in which
order, this says when.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torchdistpackage.schedule.action import Action

__all__ = ["Span", "Timeline"]


class Span(NamedTuple):
    """One action and the time that it took.

    Attributes:
        action: What was done.
        start: When it began, from the start of the step.
        end: When it was over, in the same unit.

    Example:
        >>> span = Span(Action.parse("0B1"), start=2.0, end=4.0)
        >>> span.action.microbatch, span.end - span.start
        (1, 2.0)
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of all ranks.

    Attributes:
        name: What is shown: a schedule's name, perhaps with "measured".
        spans: For every rank its spans in the order of time; actions that took no time may be left out.
        peak_bytes: For every rank the most bytes of activations that were alive at one moment; empty if not known.
        unit: Of all times: `"s"` if measured, `""` if a cost model had no unit.

    Example:
        >>> timeline = Timeline("demo", ((Span(Action.parse("0F0"), 0.0, 1.0), Span(Action.parse("0B0"), 3.0, 5.0)),))
        >>> timeline.makespan, timeline.busy, timeline.bubble, timeline.bubble_share
        (5.0, (3.0,), (2.0,), 0.4)
    """

    name: str
    spans: tuple[tuple[Span, ...], ...]
    peak_bytes: tuple[float, ...] = ()
    unit: str = ""

    @property
    def num_ranks(self) -> int:
        """How many rows the picture has."""
        return len(self.spans)

    @cached_property
    def makespan(self) -> float:
        """From the start of the step to the end of the last action."""
        return max((span.end for row in self.spans for span in row), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For every rank the time that it computes."""
        return tuple(sum(span.end - span.start for span in row if span.action.op.is_compute) for row in self.spans)

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """For every rank the time of the step in which it does not compute."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_share(self) -> float:
        """The bubble of the average rank, as a share of the step."""
        return sum(self.bubble) / (self.num_ranks * self.makespan) if self.makespan else 0.0
