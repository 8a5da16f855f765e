"""How long a plan takes: every rank goes down its list, an action starts when its rank is free and its input is there.

::

    F = 1, I + W = 2, hop = 0.5, p = 2, m = 2 (1F1B)

    rank 0 | 0F0  0F1  . . . .  0B0-----  . .  0B1-----        0F0 ends at 1, its message arrives at 1.5
    rank 1 | . .  1F0  1B0-----  1F1  1B1-----                 1F0 starts at 1.5

Messages take time on the way and none of the ranks' time; the memory of a rank is what the order of its own list says.
With skips (`routing.py`) an input has come when the last of its messages has; a slower core of its own plays those
plans, so that the others do not pay for it.
The core works on numbers: an action is one index, (kind, stage, micro-batch) -> `(kind * stages + stage) * m + i`, so
that a plan of 200,000 actions is timed in about 0.2 s. `planner.py` and `refill.py` search with the core; `Timeline` is
built for people only. Neighbours: `plan.py` says in which order, `costs.py` what each action takes, `bounds.py` how
fast it could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.costs import CostModel
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.timeline import Span, Timeline
from torchdistpackage.schedule.verify import verify

__all__ = ["Clock", "Rows", "encode", "play_with_skips", "simulate"]

Rows = list[list[int]]
KINDS = (Op.FORWARD, Op.INPUT_GRAD, Op.BACKWARD, Op.WEIGHT_GRAD)  # kind 0, 1, 2, 3 of the core
_new = tuple.__new__


def simulate(plan: Plan, costs: CostModel) -> Timeline:
    r"""Plays a plan in time.

    Args:
        plan: With or without communication, training or forward only.
        costs: One entry for each of the plan's stages.

    Returns:
        The spans of all compute actions, and for every rank its peak of activations and static bytes together.

    Raises:
        ScheduleError: The costs have another number of stages than the plan, or an input never comes.
        DeadlockError: Ranks wait for each other for ever.

    Example:
        >>> plan = Plan.from_text("0F0 0F1 0B0 0B1 \n 1F0 1B0 1F1 1B1")
        >>> timeline = simulate(plan, CostModel.uniform(2, hop=0.5))
        >>> timeline.makespan, timeline.peak_bytes, [tuple(span[1:]) for span in timeline.spans[0]]
        (10.0, (2.0, 1.0), [(0.0, 1.0), (1.0, 2.0), (5.0, 7.0), (8.0, 10.0)])
    """
    _check_stages(plan.placement, costs)
    clock = Clock.of(costs, plan.placement, plan.num_microbatches)
    rows = encode(plan)
    hops = costs.skip_hops_on(plan.placement, plan.skips)
    arrivals = play_with_skips(clock, rows, hops) if hops else clock.play(rows)
    if arrivals is None:
        verify(plan)
        raise AssertionError("a plan that the judge accepts has been stuck")
    spans = tuple(clock.spans(row, arrivals) for row in rows)
    if plan.forward_only:  # nothing waits for a backward: a stage's activations go when it is done
        held = [
            max((costs.activations[s] for s in plan.placement.local_stages(r)), default=0.0) for r in range(len(rows))
        ]
        peaks = [a + b for a, b in zip(held, costs.static_on(plan.placement), strict=True)]
    else:
        peaks = clock.peaks(rows)
    return Timeline(plan.name, spans, tuple(peaks), costs.unit)


def _check_stages(placement: Placement, costs: CostModel) -> None:
    if costs.num_stages != placement.num_stages:
        raise ScheduleError(
            f"the costs are those of {costs.num_stages} stages, the plan has {placement.num_stages} on "
            f"{placement.num_ranks} ranks; cut the model into {placement.num_stages} stages and measure those"
        )


def encode(plan: Plan) -> Rows:
    """The compute actions of a plan as numbers of the core."""
    count, stages = plan.num_microbatches, plan.placement.num_stages
    base = {op: kind * stages for kind, op in enumerate(KINDS)}
    return [[(base[op] + stage) * count + (i or 0) for stage, op, i in row if op in base] for row in plan.actions]


@dataclass(frozen=True)
class Clock:
    """A cost model on a placement, as tables by `kind * stages + stage`: what the core looks up for each action.

    The arrival of an action's input is noted under the action's own number (those of B and W under that of their I).
    `need` leads from an action to where its input is noted, `step` to where it notes the arrival of its result; a
    result that nobody waits for goes to the place of the W, which nobody reads.
    """

    placement: Placement
    count: int
    cost: list[float]
    hop: list[float]
    need: list[int]
    step: list[int]
    held: list[float]  # what the action adds to the rank's activations
    static: tuple[float, ...]

    @classmethod
    def of(cls, costs: CostModel, placement: Placement, count: int) -> Clock:
        """Makes the tables."""
        stages, cells = placement.num_stages, placement.num_stages * count
        _check_stages(placement, costs)
        hops = costs.hops_on(placement)
        up, down = [*hops, 0.0], [0.0, *hops]
        above = [count] * (stages - 1) + [cells]  # the last F hands its result to its own I
        below = [2 * cells] + [-count] * (stages - 1)
        none, keep = [0] * stages, [0.0] * stages
        free = [-size for size in costs.activations]
        return cls(
            placement,
            count,
            [*costs.forward, *costs.input_grad, *costs.backwards, *costs.weight_grad],
            [*up, *down, *down, *keep],
            [*none, *none, *[-cells] * stages, *[-2 * cells] * stages],
            [*above, *below, *(step - cells for step in below), *none],
            [*costs.activations, *keep, *free, *free],
            costs.static_on(placement),
        )

    def blank(self) -> list[float]:
        """Arrivals before the step: only what waits for nobody is there, the rest is -1."""
        cells = self.placement.num_stages * self.count
        return [0.0] * self.count + [-1.0] * (2 * cells - self.count) + [0.0] * (2 * cells)

    def play(self, rows: Rows) -> list[float] | None:
        """Arrival of every action's input, or None if ranks wait for each other. About 1 us an action."""
        count, cost, hop, need, step = self.count, self.cost, self.hop, self.need, self.step
        arrivals, waiting = self.blank(), {}
        iters = [iter(row) for row in rows]
        times, held_up = [0.0] * len(rows), [-1] * len(rows)
        runnable = list(range(len(rows) - 1, -1, -1))
        while runnable:
            rank = runnable.pop()
            t, row = times[rank], iters[rank]
            code = held_up[rank] if held_up[rank] >= 0 else next(row, -1)
            while code >= 0:
                k = code // count
                at = code + need[k]
                ready = arrivals[at]
                if ready > t:
                    t = ready
                elif ready < 0.0:
                    waiting[at] = rank
                    break
                t += cost[k]
                at = code + step[k]
                arrivals[at] = t + hop[k]
                if at in waiting:
                    runnable.append(waiting.pop(at))
                code = next(row, -1)
            times[rank], held_up[rank] = t, code
        return None if waiting else arrivals

    def finish(self, row: Sequence[int], arrivals: list[float]) -> float:
        """When the last action of a rank is over."""
        count, cost, need = self.count, self.cost, self.need
        t = 0.0
        for code in row:
            k = code // count
            ready = arrivals[code + need[k]]
            t = (ready if ready > t else t) + cost[k]
        return t

    def spans(self, row: Sequence[int], arrivals: list[float]) -> tuple[Span, ...]:
        """What a rank does when."""
        count, t, found = self.count, 0.0, []
        for code, action in zip(row, self.decode(row), strict=True):
            k = code // count
            start = max(t, arrivals[code + self.need[k]])
            t = start + self.cost[k]
            found.append(Span(action, start, t))
        return tuple(found)

    def peaks(self, rows: Rows) -> list[float]:
        """The most bytes that each rank holds at one moment, by the order of its list."""
        count, held = self.count, self.held
        return [
            static + max(accumulate((held[code // count] for code in row), initial=0.0))
            for row, static in zip(rows, self.static, strict=True)
        ]

    def decode(self, row: Sequence[int]) -> list[Action]:
        """Numbers as actions."""
        count, stages = self.count, self.placement.num_stages
        table = [(k % stages, KINDS[k // stages]) for k in range(len(self.cost))]
        return [_new(Action, (*table[code // count], code % count)) for code in row]


def play_with_skips(clock: Clock, rows: Rows, hops: dict[tuple[int, int], float]) -> list[float] | None:
    """`Clock.play` for inputs that come in several messages: counts those that are missing. About 2 us an action."""
    count, stages = clock.count, clock.placement.num_stages
    cells = stages * count
    missing = [0] * count + [1] * (2 * cells - count) + [0] * (2 * cells)
    after: list[list[tuple[int, float]]] = [[(clock.step[k], clock.hop[k])] for k in range(4 * stages)]
    for (a, b), hop in hops.items():
        after[a].append(((b - a) * count, hop))
        after[stages + b].append(((a - b) * count, hop))  # I, and B as I
        after[2 * stages + b].append(((a - b) * count - cells, hop))
        for i in range(count):
            missing[b * count + i] += 1
            missing[cells + a * count + i] += 1
    arrivals, waiting = [0.0] * (4 * cells), {}
    times, places, runnable = [0.0] * len(rows), [0] * len(rows), list(reversed(range(len(rows))))
    while runnable:
        rank = runnable.pop()
        t, row = times[rank], rows[rank]
        while places[rank] < len(row):
            code = row[places[rank]]
            k = code // count
            at = code + clock.need[k]
            if missing[at]:
                waiting[at] = rank
                break
            t = max(t, arrivals[at]) + clock.cost[k]
            for step, hop in after[k]:
                to = code + step
                arrivals[to], missing[to] = max(arrivals[to], t + hop), missing[to] - 1
                if not missing[to] and to in waiting:
                    runnable.append(waiting.pop(to))
            places[rank] += 1
        times[rank] = t
    return None if waiting else arrivals
