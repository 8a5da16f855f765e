"""What text and figure agree on: the colour of an action, its name in the legend, and how times and sizes are written.

The colours are those of Okabe and Ito, which people with any kind of colour vision tell apart; later chunks of a rank
are lighter. Neighbours: `text.py` and `figure.py` paint with them, `trace.py` uses the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Op, Timeline

__all__ = ["OP_NAMES", "Ink", "Scale", "check_units", "chunks_of", "ink", "ops_of", "quantity"]

OP_NAMES: Mapping[Op, str] = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.INPUT_GRAD: "input gradient",
    Op.WEIGHT_GRAD: "weight gradient",
}
"""The compute actions, in the order of a legend."""

_COLOURS = {
    Op.FORWARD: (0, 114, 178),  # blue
    Op.BACKWARD: (230, 159, 0),  # orange
    Op.INPUT_GRAD: (204, 121, 167),  # purple
    Op.WEIGHT_GRAD: (0, 158, 115),  # green
}
_LIGHTEST = 0.5  # share of white in the last chunk's shade; with more, terminals of 256 colours show two as one


@dataclass(frozen=True)
class Ink:
    """Two colours as `#rrggbb`.

    Attributes:
        fill: Of the box.
        text: Of what is written in it: black or white, whichever is read better.
    """

    fill: str
    text: str


def ink(op: Op, chunk: int = 0, num_chunks: int = 1) -> Ink:
    """The colours of a compute action.

    Args:
        op: A compute action.
        chunk: Of the rank, from 0.
        num_chunks: How many chunks the rank has: the first has the full colour, the last the lightest.

    Example:
        >>> ink(Op.FORWARD), ink(Op.FORWARD, 1, 2).fill
        (Ink(fill='#0072b2', text='#ffffff'), '#80b8d8')
    """
    white = _LIGHTEST * chunk / (num_chunks - 1) if num_chunks > 1 else 0.0
    red, green, blue = (round(part + (255 - part) * white) for part in _COLOURS[op])
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 130
    return Ink(f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#000000")


def chunks_of(timeline: Timeline) -> dict[int, int]:
    r"""Stage -> chunk: its place among the stages of its rank, from 0.

    Example:
        >>> from torchdistpackage.schedule import Plan, CostModel, simulate
        >>> plan = Plan.from_text("0F0 2F0 2B0 0B0 \n 1F0 1B0")
        >>> chunks_of(simulate(plan, CostModel.uniform(3)))
        {0: 0, 2: 1, 1: 0}
    """
    return {
        stage: chunk
        for row in timeline.spans
        for chunk, stage in enumerate(sorted({span.action.stage for span in row if span.action.op.is_compute}))
    }


def ops_of(*timelines: Timeline) -> list[Op]:
    """The compute actions that occur, in the order of a legend."""
    found = {span.action.op for timeline in timelines for row in timeline.spans for span in row}
    return [op for op in OP_NAMES if op in found]


@dataclass(frozen=True)
class Scale:
    """How times are written: `value * factor` followed by `unit`.

    Example:
        >>> Scale.of("s", 0.02).write(0.0015), Scale.of("", 30.0).write(1.25)
        ('1.5 ms', '1.25')
    """

    factor: float
    unit: str

    @classmethod
    def of(cls, unit: str, makespan: float) -> Scale:
        """The handiest unit for a picture that is `makespan` long."""
        if unit != "s" or makespan >= 10:
            return cls(1.0, unit)
        return cls(1e3, "ms") if makespan >= 1e-2 else cls(1e6, "µs")

    def write(self, time: float) -> str:
        """A time with its unit, four digits."""
        return f"{time * self.factor:.4g} {self.unit}".rstrip()


def quantity(value: float) -> str:
    """What a rank holds: a number of activations if it is small, bytes if it is large.

    Example:
        >>> quantity(4.5), quantity(3 * 2**30)
        ('4.5', '3 GiB')
    """
    if value < 10_000:
        return f"{value:.4g}"
    size, unit = value, "B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007  # the unit that is left is used
        size /= 1024
        if size < 1024:
            break
    return f"{size:.4g} {unit}"


def check_units(timeline: Timeline, measured: Timeline | None) -> None:
    """Makes sure that two timelines can share an axis.

    Raises:
        ScheduleError: They have different units or numbers of ranks.
    """
    if measured is not None and (timeline.unit, timeline.num_ranks) != (measured.unit, measured.num_ranks):
        raise ScheduleError(
            f"{timeline.name!r} has {timeline.num_ranks} ranks and the unit {timeline.unit!r}, {measured.name!r} has "
            f"{measured.num_ranks} and {measured.unit!r}; simulate with measured costs (in seconds) to compare"
        )
