"""A picture of a timeline in a file: a row a rank, a box an action, the micro-batch's number where there is room.

::

    simulated: 1f1b, makespan 33, bubble 27.3%                            peak
    rank 0 | 0 1 2 3             0   4 1   5 2   6 3   7 4     5  ...     4
    rank 1 |   0 1 2         0   3 1   4 2   5 3   6 4   7 5  ...         3        grey is idle time
           +-------------------------------------------------- time

A measured timeline goes below, on the same axis. The size of the picture follows from what is in it. matplotlib's
objects are used directly: no window, no global state. Neighbours: `palette.py` has the colours, `text.py` is the same
in a terminal.
"""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Op, Span, Timeline
from torchdistpackage.visualize.palette import OP_NAMES, Ink, Scale, check_units, chunks_of, ink, ops_of, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure"]

_SUFFIXES = (".png", ".svg", ".pdf")
_IDLE = "#ededed"
_SENDING = "#555555"
_BAR = 0.86  # height of a box; the rest of the row is the gap to the next
_ROW = 0.34  # inches
_FONT = 8.0  # points, of numbers in boxes, where there is room
_SMALLEST = 6.0  # before numbers get smaller than that, time goes on in a strip below
_DIGIT = 0.72  # width of a digit with its share of the margins, in font sizes
_EDGE = 0.6  # points of the white lines between boxes; less where they would eat the boxes
_NARROW, _WIDE = 8.0, 18.0  # inches of the time axis
_ROWS = 48  # a picture of more rows is not looked at: then there is one strip without numbers
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 0.75, 1.1, 0.45, 0.85, 0.6  # inches around and between the strips


@dataclass(frozen=True)
class _Layout:
    """How time becomes inches: `strips` strips, each `length` of time and `width` inches long."""

    strips: int
    length: float
    width: float
    font: float  # points; 0 for no numbers
    edge: float  # points of the white lines between boxes


def figure(
    timeline: Timeline,
    *,
    path: str | os.PathLike[str] | None = None,
    measured: Timeline | None = None,
    title: str | None = None,
) -> Figure:
    """Draws a timeline; needs matplotlib.

    Args:
        timeline: Usually simulated.
        path: Where to write it: `.png`, `.svg` or `.pdf`.
        measured: Drawn below on the same time axis.
        title: Above the picture; the name of the timeline by default.

    Returns:
        matplotlib's figure, for changes and for notebooks.

    Raises:
        ScheduleError: The suffix is none of the three, or the timelines cannot share an axis.
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.

    Example:
        >>> from torchdistpackage.schedule import CostModel, build, simulate
        >>> timeline = simulate(build("1f1b", 4, 8), CostModel.uniform(4, hop=0.1))
        >>> figure(timeline, path="1f1b.svg")  # doctest: +SKIP
    """
    if path is not None and Path(path).suffix.lower() not in _SUFFIXES:
        raise ScheduleError(f"cannot draw to {os.fspath(path)!r}; end the path in {', '.join(_SUFFIXES)}")
    check_units(timeline, measured)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'torchdistpackage[viz]'", name=error.name
        ) from None
    shown = [timeline] if measured is None else [timeline, measured]
    layout, scale = _layout(shown), Scale.of(timeline.unit, max(each.makespan for each in shown))
    frame = Figure()
    rows = _strips(frame, layout, len(shown), timeline.num_ranks)
    for number, axes in enumerate(rows):
        strip, which = divmod(number, len(shown))
        _draw(axes, shown[which], strip * layout.length, layout, scale)
        if strip == 0:
            axes.set_title(_heading(shown[which], scale, None if which else title), fontsize=10, loc="left", pad=5)
    rows[-1].set_xlabel(f"time in {scale.unit}" if scale.unit else "time", fontsize=9)
    _legend(frame, shown)
    if path is not None:
        with mpl.rc_context({"svg.hashsalt": "torchdistpackage"}):  # the same picture is the same file
            frame.savefig(path, dpi=160, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)
    return frame


def _heading(timeline: Timeline, scale: Scale, title: str | None) -> str:
    facts = f"makespan {scale.write(timeline.makespan)}, bubble {timeline.bubble_share:.1%}"
    return f"{title or timeline.name}:  {facts}"


def _layout(shown: list[Timeline]) -> _Layout:
    """One strip if the numbers have room in it, more if they need more, one without numbers if they need too many."""
    makespan = max(each.makespan for each in shown) or 1.0
    boxes = [((end - start) / len(str(action.microbatch)), end - start) for action, start, end in _computing(shown)]
    if not boxes:
        return _Layout(1, makespan, _NARROW, 0.0, 0.0)
    middle = statistics.median(box[1] for box in boxes)
    boxes = sorted(box for box in boxes if box[1] >= middle / 5)  # a first stage's I is next to nothing
    length = boxes[len(boxes) // 20][0]  # a few more boxes may be too small for their numbers
    inches = makespan / max(length, 1e-6 * makespan) * _DIGIT / 72  # for a font of one point
    strips = math.ceil(inches * _SMALLEST / _WIDE)
    if strips > 1 and strips * len(shown) * shown[0].num_ranks > _ROWS:
        return _Layout(1, makespan, _WIDE, 0.0, min(_EDGE, 6 * _WIDE * length / makespan))
    width = min(max(inches * _FONT / strips, _NARROW), _WIDE)
    return _Layout(strips, makespan / strips, width, min(_FONT, width * strips / inches), _EDGE)


def _strips(frame: Figure, layout: _Layout, timelines: int, num_ranks: int) -> list[Axes]:
    """The axes from top to bottom: of each strip of time those of all timelines."""
    count, height = layout.strips * timelines, _ROW * num_ranks
    wide = _LEFT + layout.width + _RIGHT
    high = _TOP + (height + _BETWEEN) * count - _BETWEEN + _BOTTOM
    frame.set_size_inches(wide, high)
    axes = frame.subplots(count, 1, squeeze=False)
    frame.subplots_adjust(
        left=_LEFT / wide, right=1 - _RIGHT / wide, top=1 - _TOP / high, bottom=_BOTTOM / high, hspace=_BETWEEN / height
    )
    return list(axes[:, 0])


def _computing(shown: list[Timeline]) -> list[Span]:
    return [span for each in shown for row in each.spans for span in row if span.action.op.is_compute]


def _draw(axes: Axes, timeline: Timeline, left: float, layout: _Layout, scale: Scale) -> None:
    """The part of a timeline from `left` on that fills one strip."""
    chunks, right = chunks_of(timeline), left + layout.length
    num_chunks = 1 + max(chunks.values(), default=0)
    for rank, row in enumerate(timeline.spans):
        boxes: dict[tuple[Op, int], list[tuple[float, float]]] = {}
        for action, start, end in row:
            if end > left and start < right:
                bar = (start * scale.factor, (end - start) * scale.factor)
                boxes.setdefault((action.op, chunks.get(action.stage, 0)), []).append(bar)
                if layout.font and action.op.is_compute:
                    seen = Span(action, max(start, left), min(end, right))
                    _write(axes, rank, seen, ink(action.op, chunks[action.stage], num_chunks), layout, scale)
        place = (rank - _BAR / 2, _BAR)
        axes.broken_barh([(0, timeline.makespan * scale.factor)], place, facecolor=_IDLE, lw=0)
        for (op, chunk), bars in boxes.items():
            if op.is_compute:
                fill = ink(op, chunk, num_chunks).fill
                axes.broken_barh(bars, place, facecolor=fill, edgecolor="white", lw=layout.edge)
            elif op not in (Op.RECV_F, Op.RECV_B):  # waiting for a message is idle time
                axes.broken_barh(bars, place, facecolor=_SENDING, lw=0)
    _dress(axes, timeline, (left * scale.factor, right * scale.factor), layout)


def _write(axes: Axes, rank: int, span: Span, paint: Ink, layout: _Layout, scale: Scale) -> None:
    """The micro-batch in its box, if it fits."""
    number = str(span.action.microbatch)
    room = (span.end - span.start) / layout.length * layout.width * 72
    if room >= 0.95 * len(number) * _DIGIT * layout.font:
        middle = (span.start + span.end) / 2 * scale.factor
        style: dict[str, Any] = {"color": paint.text, "fontsize": layout.font, "ha": "center", "va": "center_baseline"}
        axes.text(middle, rank, number, **style)


def _dress(axes: Axes, timeline: Timeline, window: tuple[float, float], layout: _Layout) -> None:
    """Axes, ranks on the left, and what each rank holds on the right."""
    axes.set_xlim(*window)
    axes.locator_params(axis="x", nbins=max(6, int(layout.width)))
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, length=3)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    if any(timeline.peak_bytes) and window[0] == 0:
        beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "annotation_clip": False}
        axes.annotate("peak held", (1, 1), xycoords="axes fraction", xytext=(8, 5), color="#555555", **beside)
        for rank, peak in enumerate(timeline.peak_bytes):
            place = (window[1], rank)
            axes.annotate(quantity(peak), place, xytext=(8, 0), va="center", **beside)


def _legend(frame: Figure, shown: list[Timeline]) -> None:
    """One entry an operation, with the shades of all chunks side by side."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    num_chunks = max(1 + max(chunks_of(each).values(), default=0) for each in shown)
    shades = range(num_chunks)
    handles: list[Any] = [
        tuple(Patch(facecolor=ink(op, chunk, num_chunks).fill) for chunk in shades) for op in ops_of(*shown)
    ]
    labels = [f"{op.value}  {OP_NAMES[op]}" for op in ops_of(*shown)]
    if any(not span.action.op.is_compute for each in shown for row in each.spans for span in row):
        handles.append((Patch(facecolor=_SENDING),))
        labels.append("sending, reducing")
    handles.append((Patch(facecolor=_IDLE),))
    labels.append("idle")
    frame.legend(
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(_LEFT / frame.get_figwidth(), 0.0),
        borderaxespad=0.2,
        ncols=len(labels),
        fontsize=8,
        frameon=False,
        handlelength=1.2 * max(1.0, num_chunks**0.5),
        title=None if num_chunks == 1 else f"{num_chunks} chunks a rank, from dark to light",
        title_fontsize=8,
        alignment="left",
    )
