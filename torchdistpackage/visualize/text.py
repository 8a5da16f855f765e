"""The grid of a schedule in a terminal: a row a rank, time to the right, empty where a rank is idle.

::

    time    0     5     10          1F1B, p = 2, m = 3, in plain text: operation and micro-batch. In a terminal the
    rank 0  F0 F1    ...            operation is a colour, the chunk a shade, and only the number is written.

Columns are true to time: where all times are multiples of one step, cells line up exactly; elsewhere they are rounded
to the nearest column. What does not fit goes on in a block below; a picture of very many blocks gives up its numbers.
Neighbours: `palette.py` has the colours, `figure.py` draws the same to a file.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import groupby

from torchdistpackage.schedule import Action, CostModel, Op, Plan, Span, Timeline, simulate
from torchdistpackage.visualize.palette import OP_NAMES, Ink, Scale, chunks_of, ink, ops_of

__all__ = ["text_grid", "unit_timeline"]

_MAX_LINES = 150  # more of a grid is not looked at; then boxes without numbers, then a coarser time
_STRETCH = 2  # a short step is drawn at most so many times wider than its labels need
_FINEST = 8  # times are looked at as multiples of 1/1 ... 1/8 of the shortest action


def unit_timeline(plan: Plan) -> Timeline:
    r"""Plays a plan with F = I = W = 1, B = 2 and messages that take no time: the picture that papers print.

    Raises:
        ScheduleError: The plan is wrong.

    Example:
        >>> unit_timeline(Plan.from_text("0F0 0B0 \n 1F0 1B0")).makespan
        6.0
    """
    return simulate(plan, CostModel.uniform(plan.placement.num_stages))


def text_grid(what: Plan | Timeline, *, width: int | None = None, colour: bool | None = None) -> str:
    r"""Draws a plan or a timeline with characters.

    Args:
        what: A plan is drawn with F = I = W = 1 and B = 2; of a timeline the compute actions are drawn.
        width: Columns to fill; those of the terminal by default, 120 where there is none.
        colour: Colour codes instead of letters; by default if stdout is a terminal and rich is installed.

    Returns:
        Blocks of lines with a legend at the end.

    Raises:
        ScheduleError: The plan is wrong.
        ModuleNotFoundError: `colour` is asked for and rich is not installed.

    Example:
        >>> print(text_grid(Plan.from_text("0F0 0F1 0B0 0B1 \n 1F0 1B0 1F1 1B1"), width=60, colour=False))
        custom: makespan 9 (F = I = W = 1, B = 2), bubble 33.3%
        time    0         2         4         6         8
        rank 0  F0-- F1--           B0-------      B1-------
        rank 1       F0-- B0------- F1-- B1-------
        <BLANKLINE>
        F forward   B backward   empty: idle
    """
    timeline = unit_timeline(what) if isinstance(what, Plan) else what
    note = " (F = I = W = 1, B = 2)" if isinstance(what, Plan) else ""
    colour = _rich_colours() if colour is None else colour
    columns = width or shutil.get_terminal_size((120, 24)).columns
    lines = list(_lines(timeline, columns, colour, note))
    return _render(lines) if colour else "\n".join(_plain(line) for line in lines)


Piece = tuple[str, "Ink | None"]
Line = list[Piece]


@dataclass(frozen=True)
class _Layout:
    """How time becomes columns: `per_time` columns a unit of time, `block` columns a block, a tick every `tick`."""

    per_time: float
    block: int
    tick: float
    labelled: bool

    def column(self, time: float) -> int:
        """The nearest column; the same for equal times that differ in their last digit."""
        return int(time * self.per_time + 0.5 + 1e-6)


def _lines(timeline: Timeline, width: int, colour: bool, note: str) -> Iterator[Line]:
    chunks, scale = chunks_of(timeline), Scale.of(timeline.unit, timeline.makespan)
    num_chunks = 1 + max(chunks.values(), default=0)
    labels = {
        span.action: _label(span, chunks, num_chunks, colour)
        for row in timeline.spans
        for span in row
        if span.action.op.is_compute
    }
    gutter = len(f"rank {timeline.num_ranks - 1}") + 2
    layout = _layout(timeline, max(map(len, labels.values()), default=1), max(20, width - gutter), scale)
    share = f"bubble {timeline.bubble_share:.1%}"
    yield [(f"{timeline.name}: makespan {scale.write(timeline.makespan)}{note}, {share}", None)]
    rows = [_paint(row, layout, labels, chunks, num_chunks, colour) for row in timeline.spans]
    total = max(map(len, rows), default=0)
    for left in range(0, total, layout.block):
        yield [((scale.unit or "time").ljust(gutter) + _ruler(layout, left, total, scale), None)]
        for rank, row in enumerate(rows):
            yield [(f"rank {rank}".ljust(gutter), None), *row[left : left + layout.block]]
        yield []
    yield _legend(timeline, num_chunks, colour, layout.labelled)


def _label(span: Span, chunks: dict[int, int], num_chunks: int, colour: bool) -> str:
    stage, op, i = span.action
    if colour:
        return str(i)
    return f"{op.value}{i}{_letter(chunks[stage]) if num_chunks > 1 else ''}"


def _letter(chunk: int) -> str:
    return chr(ord("a") + chunk % 26)


def _paint(
    row: tuple[Span, ...],
    layout: _Layout,
    labels: dict[Action, str],
    chunks: dict[int, int],
    num_chunks: int,
    colour: bool,
) -> Line:
    """One rank's line of time, a piece a column."""
    spans = [span for span in row if span.action.op.is_compute]
    cells: Line = [(" ", None)] * max((layout.column(span.end) for span in spans), default=0)
    for action, start, end in spans:
        left, right = layout.column(start), layout.column(end)
        size = right - left
        label = labels[action] if layout.labelled and len(labels[action]) <= size else ""
        if colour:
            paint = ink(action.op, chunks[action.stage], num_chunks)
            cells[left:right] = [(mark, paint) for mark in label.ljust(size)]
        else:
            label = (label or action.op.value).ljust(size - layout.labelled, "-")[:size].ljust(size)
            cells[left:right] = [(mark, None) for mark in label]
    return cells


def _layout(timeline: Timeline, label: int, room: int, scale: Scale) -> _Layout:
    """The widest picture of few enough lines: with labels, else without, else with time as coarse as must be."""
    makespan, blocks = timeline.makespan, max(1, _MAX_LINES // (timeline.num_ranks + 2))
    if makespan <= 0:
        return _Layout(1.0, room, 1.0, False)
    shortest = _shortest(timeline)
    step = _step(timeline, shortest)
    for wanted in (label + 1, 1):
        least = wanted / shortest
        most = least * _STRETCH
        if step is None:  # columns are free: all blocks are full
            cell, per_time = 1, min(most, math.ceil(least * makespan / room - 1e-6) * room / makespan)
        else:  # a step has whole columns; a short plan fills its only block
            cell = max(math.ceil(least * step - 1e-6), int(min(most, room / makespan) * step + 1e-6))
            per_time = cell / step
        if makespan * per_time <= room * blocks:
            return _with_ticks(per_time, makespan, cell, room, wanted > 1, scale)
    return _with_ticks(room * blocks / makespan, makespan, 1, room, False, scale)


def _with_ticks(per_time: float, makespan: float, cell: int, room: int, labelled: bool, scale: Scale) -> _Layout:
    """Ticks at round times, at least eight columns apart; blocks of one size that begin at a tick if that is cheap."""
    least = 8 / per_time * scale.factor
    power = 10.0 ** math.floor(math.log10(least))
    tick = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= least * (1 - 1e-9)) / scale.factor
    whole = tick * per_time
    unit = round(whole) if abs(whole - round(whole)) < 1e-6 and room % round(whole) < 0.2 * room else cell
    total = math.ceil(makespan * per_time - 1e-6)
    blocks = math.ceil(total / max(unit, room // unit * unit))
    return _Layout(per_time, max(1, math.ceil(total / blocks / unit)) * unit, tick, labelled)


def _shortest(timeline: Timeline) -> float:
    """How long the shortest kind of action takes, or a quarter of the longest kind, if that is more."""
    times: dict[Op, list[float]] = {}
    for row in timeline.spans:
        for action, start, end in row:
            if action.op.is_compute:
                times.setdefault(action.op, []).append(end - start)
    middles = [statistics.median(found) for found in times.values()]
    return max(min(middles), max(middles) / 4) or timeline.makespan


def _step(timeline: Timeline, shortest: float) -> float | None:
    """The largest part of the shortest action that all times are multiples of, if there is one."""
    times = {time for row in timeline.spans for span in row if span.action.op.is_compute for time in span[1:]}
    for parts in range(1, _FINEST + 1):
        if all(abs(time * parts / shortest - round(time * parts / shortest)) < 1e-6 for time in times):
            return shortest / parts
    return None


def _ruler(layout: _Layout, left: int, total: int, scale: Scale) -> str:
    marks = [" "] * min(layout.block, total - left)
    for number in range(math.ceil((left + len(marks)) / layout.per_time / layout.tick)):
        column = layout.column(number * layout.tick) - left
        text = f"{number * layout.tick * scale.factor:.6g}"
        if 0 <= column and column + len(text) <= len(marks):
            marks[column : column + len(text)] = text
    return "".join(marks).rstrip()


def _legend(timeline: Timeline, num_chunks: int, colour: bool, labelled: bool) -> Line:
    line: Line = []
    for op in ops_of(timeline):
        if colour:
            line += [(" ", ink(op, chunk, num_chunks)) for chunk in range(num_chunks)]
            line.append((f" {OP_NAMES[op]}   ", None))
        else:
            line.append((f"{op.value} {OP_NAMES[op]}   ", None))
    if num_chunks > 1:
        letters = " ".join(map(_letter, range(num_chunks)))
        line.append(("lighter: later chunks of the rank   " if colour else f"{letters}: chunks of the rank   ", None))
    line.append(("empty: idle" if labelled else "empty: idle   (too long for the numbers of micro-batches)", None))
    return line


def _plain(line: Line) -> str:
    return "".join(text for text, _ in line).rstrip()


def _rich_colours() -> bool:
    """Whether stdout shows colours and rich is there to make them."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return False
    console = Console()
    return console.color_system in ("256", "truecolor") and not console.no_color  # 16 colours have no shades


def _render(lines: list[Line]) -> str:
    """The lines with the terminal's colour codes."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        raise ModuleNotFoundError("colours need rich: pip install 'torchdistpackage[viz]'", name="rich") from None
    system = Console().color_system or "truecolor"
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system=system, no_color=False, highlight=False)  # type: ignore[arg-type]
    for line in lines:
        text = Text()
        for paint, run in groupby(line, key=lambda piece: piece[1]):
            style = None if paint is None else f"{paint.text} on {paint.fill}"
            text.append("".join(piece for piece, _ in run), style)
        console.print(text, soft_wrap=True)
    return out.getvalue().rstrip("\n")
