"""The catalogue: every schedule by name, and `build`, which turns a name into a proved plan.

A new schedule is one recipe file and one line here. Nothing outside of this file asks for a schedule's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action
from torchdistpackage.schedule.lowering import add_communication, add_reduce_grad, forward_only
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.recipes.gpipe import gpipe
from torchdistpackage.schedule.recipes.one_f_one_b import one_f_one_b
from torchdistpackage.schedule.verify import verify

__all__ = ["build", "canonical_name", "names"]

Recipe = Callable[[int, int, int], Iterator[Action]]


@dataclass(frozen=True)
class _Entry:
    """What the catalogue knows of a schedule."""

    recipe: Recipe
    place: Callable[[int], Placement]


_CATALOGUE: dict[str, _Entry] = {
    "1f1b": _Entry(one_f_one_b, Placement.loop),
    "gpipe": _Entry(gpipe, Placement.loop),
}


def names() -> tuple[str, ...]:
    """The names of all schedules, sorted.

    Example:
        >>> names()
        ('1f1b', 'gpipe')
    """
    return tuple(sorted(_CATALOGUE))


def canonical_name(name: str) -> str:
    """The catalogue's spelling of a name; case does not matter.

    Raises:
        ScheduleError: There is no such schedule; the message lists those that there are.

    Example:
        >>> canonical_name("GPipe")
        'gpipe'
    """
    key = name.lower() if isinstance(name, str) else name
    if key not in _CATALOGUE:
        raise ScheduleError(f"unknown schedule {name!r}; known schedules: {', '.join(names())}")
    return key


def build(name: str, num_ranks: int, num_microbatches: int, *, forward_only: bool = False) -> Plan:
    """Builds, lowers and proves a plan; cached, so that a step pays a dictionary look-up.

    Args:
        name: A schedule of `names()`, in any case.
        num_ranks: Ranks of the pipeline, p >= 1.
        num_microbatches: Micro-batches of a step, m >= 1; m < p is fine.
        forward_only: Leave out every backward (evaluation).

    Returns:
        A plan with communication, and in training with `REDUCE_GRAD`.

    Raises:
        ScheduleError: Unknown name, or a size below 1.

    Example:
        >>> print(build("1f1b", 2, 2).to_text())
        rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD
        rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE_GRAD
    """
    for what, size in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ScheduleError(f"{what} must be a whole number of at least 1, got {size!r}")
    return _build(canonical_name(name), num_ranks, num_microbatches, bool(forward_only))


@lru_cache(maxsize=64)
def _build(name: str, num_ranks: int, num_microbatches: int, evaluation: bool) -> Plan:
    entry = _CATALOGUE[name]
    rows = tuple(tuple(entry.recipe(rank, num_ranks, num_microbatches)) for rank in range(num_ranks))
    plan = Plan(name, entry.place(num_ranks), num_microbatches, rows)
    plan = add_communication(forward_only(plan) if evaluation else add_reduce_grad(plan))
    verify(plan)
    return plan
