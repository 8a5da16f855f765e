"""Weight gradients where time would be lost: keeps the order of F and I, and places every W anew.

::

    F = I = W = 1, p = 2, m = 3, rank 0 of 1F1B, memory for 2

    before | F0 F1 .  I0 W0 F2 I1 W1 .  I2 W2              after | F0 F1 .  I0 W0 F2 I1 W1 I2 W2

A W needs only its own I and nobody waits for it: it is what a rank can do while an input is on its way. Before each F
or I the rank runs what is due of W as long as the input is not there, and before an F also as long as memory is full;
what is left comes at the end. Each rank decides from its own past and the arrival of its next input only, so that ranks
can be played in any order, like in `simulate.py`, whose numbers are used here; about 1.5 us an action.

`merge` is the way back: an I that is followed at once by its W becomes the cheaper B where nobody waits longer for it.
Neighbours: `planner.py` decides which orders are worth it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torchdistpackage.schedule.simulate import Clock, Rows

__all__ = ["Refilled", "merge", "merge_all", "order_of", "refill"]

_ROUNDING = 1e-9


def order_of(clock: Clock, rows: Rows, split_from: int = 0) -> Rows:
    """The order of F and I without any W; backwards of micro-batches before `split_from` become whole B."""
    cells = clock.placement.num_stages * clock.count
    order = []
    for row in rows:
        halves = [code - cells if code >= 2 * cells else code for code in row if code < 3 * cells]
        if split_from:
            halves = [code + cells if code >= cells and code % clock.count < split_from else code for code in halves]
        order.append(halves)
    return order


class Refilled(NamedTuple):
    """An order with every W in its place.

    Attributes:
        rows: For every rank its actions.
        makespan: When the last one is over.
    """

    rows: Rows
    makespan: float


class _Rank:
    """One rank on its way: its time, its memory and the W that it has not run yet."""

    __slots__ = ("at", "clock", "done", "due", "free", "newest", "order", "time")

    def __init__(self, clock: Clock, order: Sequence[int], free: float, newest: bool) -> None:
        self.clock, self.order, self.free, self.newest = clock, order, free, newest
        self.at, self.time = 0, 0.0
        self.due: deque[int] = deque()
        self.done: list[int] = []

    def run_due(self) -> None:
        """Runs one W."""
        code = self.due.pop() if self.newest else self.due.popleft()
        k = code // self.clock.count
        self.time += self.clock.cost[k]
        self.free -= self.clock.held[k]
        self.done.append(code)

    def fill(self, ready: float, share: float) -> None:
        """Runs W while the next input is on its way; `share` of a W must fit into the time."""
        cost, count, due = self.clock.cost, self.clock.count, self.due
        while due and ready > self.time:
            code = due[-1] if self.newest else due[0]
            if self.time + share * cost[code // count] > ready:
                return
            self.run_due()

    def make_room(self, size: float) -> bool:
        """Runs W until an F fits into memory; False if it never does."""
        while self.free < size:
            if not self.due:
                return False
            self.run_due()
        return True


def refill(
    clock: Clock, order: Rows, limits: Sequence[float], *, share: float = 1.0, newest: bool = False
) -> Refilled | None:
    """Places every W.

    Args:
        clock: The costs.
        order: F and I of every rank, and B where the backward stays whole.
        limits: Bytes that each rank may hold, static bytes included.
        share: How much of a W must fit into the time until the next input comes: 1 never delays an action for more
            than rounding, 0 starts a W whenever the rank would idle.
        newest: Run the newest W first instead of the oldest, which leaves more for `merge`.

    Returns:
        Rows with every W, and their time; None if the order does not fit into the limits, or deadlocks.

    Source: the idea of zero-bubble schedules (Qi et al. 2023), applied to a given order with measured times.
    """
    count, cost, hop, need, step, held = clock.count, clock.cost, clock.hop, clock.need, clock.step, clock.held
    stages, arrivals, slack = clock.placement.num_stages, clock.blank(), _ROUNDING * max(clock.cost, default=0.0)
    waiting: dict[int, int] = {}
    rooms = [limit * (1 + _ROUNDING) - static for limit, static in zip(limits, clock.static, strict=True)]
    ranks = [_Rank(clock, row, room, newest) for row, room in zip(order, rooms, strict=True)]
    runnable = list(range(len(order) - 1, -1, -1))
    while runnable:
        number = runnable.pop()
        rank = ranks[number]
        order_, done, due = rank.order, rank.done, rank.due
        for at in range(rank.at, len(order_)):
            code = order_[at]
            k = code // count
            ready = arrivals[code + need[k]]
            if ready < 0.0:
                waiting[code + need[k]] = number
                rank.at = at
                break
            if due and ready > rank.time:
                rank.fill(ready + slack, share)
            if k < stages:
                if rank.free < held[k] and not rank.make_room(held[k]):
                    return None
            elif k < 2 * stages:
                due.append(code + 2 * stages * count)
            rank.free -= held[k]
            rank.time = (ready if ready > rank.time else rank.time) + cost[k]
            done.append(code)
            target = code + step[k]
            arrivals[target] = rank.time + hop[k]
            if target in waiting:
                runnable.append(waiting.pop(target))
    if waiting:
        return None
    ends = [rank.time + sum(cost[code // count] for code in rank.due) for rank in ranks]
    return Refilled([[*rank.done, *rank.due] for rank in ranks], max(ends))


def merge_all(clock: Clock, rows: Rows) -> Rows:
    """Every I that is followed at once by its own W as a B, whoever waits for it."""
    cells = clock.placement.num_stages * clock.count
    return [_merged(row, cells, set(_pairs(row, cells))) for row in rows]


def merge(clock: Clock, rows: Rows, arrivals: list[float]) -> Rows:
    """Every I that is followed at once by its own W as a B, where that is cheaper and delays nobody.

    The result of a B comes later than that of an I. Where the rank above it starts to use the result later still, no
    action of the plan starts later than before.

    Args:
        clock: The costs.
        rows: A plan with every W.
        arrivals: Of the same rows, from `Clock.play`.
    """
    stages, count, cost, hop = clock.placement.num_stages, clock.count, clock.cost, clock.hop
    cells = stages * count
    starts = _starts(clock, rows, arrivals)
    merged = []
    for row in rows:
        chosen = set()
        for at in _pairs(row, cells):
            stage = row[at] // count - stages
            whole, half = cost[2 * stages + stage], cost[stages + stage]
            late = starts[row[at]] + whole + hop[stages + stage]
            # The stage above runs an I or, if it is merged itself, a B.
            above = row[at] - count
            used = min(starts[above], starts[above + cells]) if stage else float("inf")
            if whole < half + cost[3 * stages + stage] and late <= used:
                chosen.add(at)
        merged.append(_merged(row, cells, chosen))
    return merged


def _pairs(row: list[int], cells: int) -> list[int]:
    """Where an I stands right before its own W."""
    return [at for at in range(len(row) - 1) if cells <= row[at] < 2 * cells and row[at + 1] == row[at] + 2 * cells]


def _merged(row: list[int], cells: int, chosen: set[int]) -> list[int]:
    return [code + cells if at in chosen else code for at, code in enumerate(row) if at - 1 not in chosen]


def _starts(clock: Clock, rows: Rows, arrivals: list[float]) -> list[float]:
    """When each action starts, by its number; infinite for those that the plan does not have."""
    count, cost, need = clock.count, clock.cost, clock.need
    starts = [float("inf")] * (4 * clock.placement.num_stages * count)
    for row in rows:
        t = 0.0
        for code in row:
            k = code // count
            ready = arrivals[code + need[k]]
            starts[code] = t = ready if ready > t else t
            t += cost[k]
    return starts
