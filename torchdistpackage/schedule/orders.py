"""Orders of F and I that fit into any memory: what the planner tries beside the catalogue.

The catalogue's schedules hold as many micro-batches as their formula says. These hold as many as there is room for::

    windowed, p = 3, room for 2 micro-batches (c = 2): bursts of c, each released when the one before it is through

    rank 0 | F0 F1 .  .  I0 W0 I1 W1 F2 F3 .  .  I2 ...
    rank 1 | .  F0 F1 .  I0 ...
    rank 2 | .  .  F0 I0 F1 I1 ...

W are left out: `refill.py` places them. Neighbours: `planner.py` tries all of them with all W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchdistpackage.schedule.simulate import Clock, Rows

__all__ = ["rooms", "warm_up", "windowed"]

_ROUNDING = 1 + 1e-9


def rooms(clock: Clock, limits: Sequence[float]) -> list[int]:
    """How many micro-batches each rank can hold on all of its stages; at least 1, at most all."""
    found = []
    for rank, (limit, static) in enumerate(zip(limits, clock.static, strict=True)):
        size = sum(clock.held[stage] for stage in clock.placement.local_stages(rank))
        room = clock.count if size <= 0 or math.isinf(limit) else int((limit - static) * _ROUNDING / size)
        found.append(max(1, min(clock.count, room)))
    return found


def warm_up(clock: Clock, limits: Sequence[float], *, lean: bool) -> Rows:
    """1F1B with one chunk and as many forwards ahead as memory allows.

    Args:
        clock: The costs, of one stage a rank.
        limits: Bytes that each rank may hold.
        lean: Be at most as far ahead as 1F1B is, otherwise as eager 1F1B.
    """
    p, count = clock.placement.num_ranks, clock.count
    ahead: list[int] = []
    for rank, room in enumerate(rooms(clock, limits)):
        most = p - rank if lean else 2 * (p - rank) - 1
        # A rank that is further ahead than the one before it would wait for what cannot come.
        ahead.append(min(room, most, *ahead[-1:]))
    rows = []
    for rank, warm in enumerate(ahead):
        row = [rank * count + i for i in range(warm)]
        for i in range(count):
            row.append((p + rank) * count + i)
            if warm + i < count:
                row.append(rank * count + warm + i)
        rows.append(row)
    return rows


def windowed(clock: Clock, limits: Sequence[float]) -> Rows:
    """Bursts of as many micro-batches as fit; each rank runs what is expected first.

    Within a burst micro-batches follow each other at the pace of the slowest rank; the next burst begins when the first
    micro-batch of this one is through. Far better than a constant warm-up where memory is short of p micro-batches:
    neighbours would then wait a round trip for each micro-batch.
    """
    stages, count = clock.placement.num_stages, clock.count
    forward, grad, weight = (clock.cost[kind * stages : (kind + 1) * stages] for kind in (0, 1, 3))
    up, down = clock.hop[:stages], clock.hop[stages : 2 * stages]
    head, trip = [0.0] * stages, [0.0] * stages  # until a stage's F begins; from there until its I can
    for s in range(1, stages):
        head[s] = head[s - 1] + forward[s - 1] + up[s - 1]
    trip[-1] = forward[-1]
    for s in range(stages - 2, -1, -1):
        trip[s] = forward[s] + up[s] + trip[s + 1] + grad[s + 1] + down[s + 1]
    mine = [clock.placement.local_stages(rank) for rank in range(clock.placement.num_ranks)]
    pace = max(sum(forward[s] + grad[s] + weight[s] for s in held) for held in mine)
    burst = min(rooms(clock, limits))
    turn = max(trip[0] + grad[0] + weight[0], burst * pace)
    release = [(i // burst) * turn + (i % burst) * pace for i in range(count)]
    rows = []
    for held in mine:
        expected = [(release[i] + head[s], s * count + i) for s in held for i in range(count)]
        expected += [(release[i] + head[s] + trip[s], (stages + s) * count + i) for s in held for i in range(count)]
        rows.append([code for _, code in sorted(expected)])
    return rows
