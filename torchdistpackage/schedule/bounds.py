"""How fast a step could be at all: lower bounds on its time that hold for every order of the actions.

::

    F = B = 1, p = 3, m = 4           before a rank's first F something must come down to it (head),
                                      after its last B something must go up again (tail)
    rank 2 | hh hh F  B  F  B  F  B  F  B  tt tt        T >= head + m (F + B) + tail

Schedule quality is makespan over bound: 1.0 is a proof that nothing is left to gain. Neighbours: `simulate.py` says how
long one plan takes, `planner.py` reports both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.costs import CostModel
from torchdistpackage.schedule.placement import Placement

__all__ = ["lower_bound", "memory_limits"]

MemoryLimit = float | Sequence[float] | None


def lower_bound(
    costs: CostModel,
    placement: Placement,
    num_microbatches: int,
    *,
    memory_limit: MemoryLimit = None,
    split: bool = True,
) -> float:
    r"""The time below which no schedule of these stages on these ranks can come.

    The largest of four bounds: *work* (a rank's head and everything it computes), *turn* (its head, its forwards and
    input gradients, and the way back up), *path* (one micro-batch down and up), and, with a memory limit, *area* (each
    micro-batch occupies its bytes for at least its own round trip). Where the schedule may choose, the cheaper of B and
    I + W counts.

    Args:
        costs: Of all stages.
        placement: Which rank owns which stage.
        num_microbatches: m of a step.
        memory_limit: Bytes that a rank may hold, static bytes included: one number or one a rank; None for no limit.
        split: Whether I and W may run apart. Without it every backward is a B.

    Returns:
        A time in the unit of the costs; infinite if the static bytes alone reach the memory limit.

    Raises:
        ScheduleError: Costs and placement have different numbers of stages, or m or the memory limit is no number that
            makes sense.

    Example:
        >>> costs = CostModel.uniform(4)
        >>> lower_bound(costs, Placement.loop(4), 8, split=False), lower_bound(costs, Placement.loop(4), 8)
        (33.0, 27.0)
        >>> lower_bound(costs, Placement.loop(4), 8, memory_limit=2)
        36.0

    Source: the turn bound is the one that 1F1B attains with equal stages. The area bound is the argument by which Qi et
    al., "Pipeline Parallelism with Controllable Memory", 2024, show that a third of 1F1B's memory is the least at full
    speed.
    """
    if costs.num_stages != placement.num_stages:
        raise ScheduleError(
            f"the costs are those of {costs.num_stages} stages, the placement has {placement.num_stages}; "
            "measure the costs of the same cut"
        )
    if num_microbatches < 1:
        raise ScheduleError(f"num_microbatches must be at least 1, got {num_microbatches}")
    way = _Way.of(costs, placement, split)
    found = [way.path]
    for rank, limit in enumerate(memory_limits(memory_limit, placement.num_ranks)):
        stages = placement.local_stages(rank)
        head, tail = min(way.head[s] for s in stages), min(way.tail[s] for s in stages)
        found.append(head + num_microbatches * sum(way.forward[s] + way.whole[s] for s in stages))
        found.append(head + num_microbatches * sum(way.forward[s] + way.grad[s] for s in stages) + tail)
        room = limit - costs.static_on(placement)[rank]
        area = num_microbatches * sum(costs.activations[s] * way.life[s] for s in stages)
        if area > 0:
            found.append(head + area / room if room > 0 else math.inf)
    return max(found)


def memory_limits(limit: MemoryLimit, num_ranks: int) -> tuple[float, ...]:
    """A limit for each rank, infinite where there is none.

    Raises:
        ScheduleError: There is not one number a rank, or one is not above 0.

    Example:
        >>> memory_limits(8, 2), memory_limits(None, 2)
        ((8.0, 8.0), (inf, inf))
    """
    if limit is None:
        return (math.inf,) * num_ranks
    limits = tuple(map(float, limit)) if isinstance(limit, Sequence) else (float(limit),) * num_ranks
    if len(limits) != num_ranks:
        raise ScheduleError(
            f"memory_limit has {len(limits)} entries for {num_ranks} ranks; pass one number or one a rank"
        )
    if not all(room > 0 for room in limits):
        raise ScheduleError(f"memory_limit must be above 0 bytes on every rank, got {limits}")
    return limits


@dataclass(frozen=True)
class _Way:
    """The way of one micro-batch, by stage."""

    forward: tuple[float, ...]
    grad: list[float]  # least time until the stage's input gradient is there
    whole: list[float]  # least time of the whole backward
    head: list[float]  # before its F can start
    tail: list[float]  # after its input gradient is there, to the end of the step
    life: list[float]  # from its F to its last backward
    path: float  # of the whole round trip

    @classmethod
    def of(cls, costs: CostModel, placement: Placement, split: bool) -> _Way:
        forward, whole = costs.forward, list(costs.backwards)
        grad = whole
        if split:
            halves = zip(costs.input_grad, costs.weight_grad, costs.backwards, strict=True)
            grad = [min(i, b) for i, b in zip(costs.input_grad, whole, strict=True)]
            whole = [min(i + w, b) for i, w, b in halves]
        late = [full - part for full, part in zip(whole, grad, strict=True)]
        hops = costs.hops_on(placement)
        head = list(accumulate((f + hop for f, hop in zip(forward, hops, strict=False)), initial=0.0))
        up = list(accumulate((b + hop for b, hop in zip(grad, hops, strict=False)), initial=0.0))
        # The way down from a stage's F and back up to its input gradient.
        trips = [f + b for f, b in zip(forward, grad, strict=True)]
        below = accumulate(reversed([2 * hop for hop in hops] + [0.0]))
        rounds = accumulate(reversed(trips))
        trip = [a + b for a, b in zip(rounds, below, strict=True)][::-1]
        return cls(
            forward,
            grad,
            whole,
            head,
            [x + late[0] for x in up],
            [a + b for a, b in zip(trip, late, strict=True)],
            trip[0] + late[0],
        )
