"""A timeline in Chrome's trace event format: https://ui.perfetto.dev and chrome://tracing open it.

A timeline is a process, a rank a thread. An action is a slice, a message between ranks an arrow, and what a rank holds
between forward and backward is a counter::

    1f1b            rank 0   | 0F0 | 0F1 |              | 0B0 |
                    rank 1         `-> | 1F0 | 1B0 | ---^
                    live activations, rank 0     __--------__

Times of a timeline in seconds are exact; of one without a unit, 1 becomes a millisecond. Format: "Trace Event Format",
Google 2016. Neighbours: `figure.py` draws what can be printed; this is for zooming and for steps of many actions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchdistpackage.schedule import Action, Op, Span, Timeline
from torchdistpackage.visualize.palette import OP_NAMES, check_units, chunks_of

__all__ = ["chrome_trace", "write_trace"]

Event = dict[str, Any]

_NAMES = {
    **OP_NAMES,
    Op.SEND_F: "sending an output",
    Op.SEND_B: "sending a gradient",
    Op.RECV_F: "waiting for an input",
    Op.RECV_B: "waiting for a gradient",
    Op.REDUCE_GRAD: "reducing gradients",
}


def chrome_trace(timeline: Timeline, *, measured: Timeline | None = None) -> dict[str, Any]:
    """Turns a timeline into a trace.

    Args:
        timeline: Usually simulated.
        measured: A second process in the same trace.

    Returns:
        What `json.dump` writes: `traceEvents` and how to show them.

    Raises:
        ScheduleError: The timelines have different units or ranks.

    Example:
        >>> from torchdistpackage.schedule import CostModel, Plan, simulate
        >>> trace = chrome_trace(simulate(Plan.from_text("0F0 0B0"), CostModel.uniform(1)))
        >>> [(event["name"], event["ts"], event["dur"]) for event in trace["traceEvents"] if event["ph"] == "X"]
        [('0F0', 0.0, 1000.0), ('0B0', 1000.0, 2000.0)]
    """
    check_units(timeline, measured)
    shown = [timeline] if measured is None else [timeline, measured]
    events = [event for pid, each in enumerate(shown, start=1) for event in _events(each, pid)]
    facts = {each.name: {"makespan": each.makespan, "bubble_share": each.bubble_share} for each in shown}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}


def write_trace(path: str | os.PathLike[str], timeline: Timeline, *, measured: Timeline | None = None) -> None:
    """Writes `chrome_trace` to a file.

    Args:
        path: Usually ends in `.json`.
        timeline: Usually simulated.
        measured: A second process in the same trace.

    Raises:
        ScheduleError: The timelines have different units or ranks.
        OSError: The file cannot be written.

    Example:
        >>> from torchdistpackage.schedule import CostModel, build, simulate
        >>> write_trace("zb-h1.json", simulate(build("zb-h1", 4, 8), CostModel.uniform(4)))  # doctest: +SKIP
    """
    trace = chrome_trace(timeline, measured=measured)
    Path(path).write_text(json.dumps(trace, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def _events(timeline: Timeline, pid: int) -> Iterator[Event]:
    micros = 1e6 if timeline.unit == "s" else 1e3
    yield _metadata(pid, "process_name", name=timeline.name)
    yield _metadata(pid, "process_sort_index", sort_index=pid)
    chunks = chunks_of(timeline)
    for rank, row in enumerate(timeline.spans):
        # Thread 0 means "idle" to Perfetto, so that the thread of rank 0 is 1.
        yield _metadata(pid, "thread_name", rank + 1, name=f"rank {rank}")
        yield _metadata(pid, "thread_sort_index", rank + 1, sort_index=rank)
        for span in row:
            yield _slice(span, pid, rank + 1, chunks, micros)
    yield from _arrows(timeline, pid, micros)
    for rank, row in enumerate(timeline.spans):
        yield from _counter(row, rank, pid, micros)


def _metadata(pid: int, kind: str, tid: int = 0, **arguments: str | int) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": arguments}


def _slice(span: Span, pid: int, tid: int, chunks: dict[int, int], micros: float) -> Event:
    stage, op, i = span.action
    arguments = {"operation": _NAMES[op], "stage": stage, "chunk": chunks.get(stage, 0)}
    return {
        "ph": "X",
        "name": str(span.action),
        "cat": "compute" if op.is_compute else "communication",
        "pid": pid,
        "tid": tid,
        "ts": span.start * micros,
        "dur": (span.end - span.start) * micros,
        "args": arguments if i is None else {**arguments, "microbatch": i},
    }


def _arrows(timeline: Timeline, pid: int, micros: float) -> Iterator[Event]:
    """From the action that makes a message to the action on another rank that uses it."""
    at = {span.action: (rank, span) for rank, row in enumerate(timeline.spans) for span in row}
    number = 0
    for action, (rank, span) in at.items():
        found = _source(action, at)
        if found is None or found[0] == rank:
            continue
        source_rank, source = found
        number += 1
        shared = {
            "cat": "message",
            "name": "output" if action.op is Op.FORWARD else "gradient",
            "id": pid << 32 | number,
            "pid": pid,
        }
        # An arrow belongs to the slice that is open at its end's time, so it must leave before that slice is over.
        leaves = source.end - (source.end - source.start) / 100
        yield {"ph": "s", **shared, "tid": source_rank + 1, "ts": leaves * micros}
        yield {"ph": "f", "bp": "e", **shared, "tid": rank + 1, "ts": max(span.start, leaves) * micros}


def _source(action: Action, at: dict[Action, tuple[int, Span]]) -> tuple[int, Span] | None:
    """Who makes the input of an action that comes from another stage."""
    stage, op, i = action
    if op is Op.FORWARD:
        return at.get(Action(stage - 1, Op.FORWARD, i))
    if op in (Op.BACKWARD, Op.INPUT_GRAD):
        return at.get(Action(stage + 1, Op.BACKWARD, i)) or at.get(Action(stage + 1, Op.INPUT_GRAD, i))
    return None


def _counter(row: tuple[Span, ...], rank: int, pid: int, micros: float) -> Iterator[Event]:
    """How many micro-batches of how many chunks wait for their last backward; nothing in evaluation."""
    if not any(span.action.op in (Op.BACKWARD, Op.WEIGHT_GRAD) for span in row):
        return
    changes = [(span.start, 1) for span in row if span.action.op is Op.FORWARD]
    changes += [(span.end, -1) for span in row if span.action.op in (Op.BACKWARD, Op.WEIGHT_GRAD)]
    live = 0
    for time, change in sorted(changes):
        live += change
        yield {
            "ph": "C",
            "name": f"live activations, rank {rank}",
            "pid": pid,
            "tid": rank + 1,
            "ts": time * micros,
            "args": {"activations": live},
        }
