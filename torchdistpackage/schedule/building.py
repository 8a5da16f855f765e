"""A schedule's name -> a proved plan, and whatever else becomes a plan that is ready to run.

::

    name, p, m, ... -> the recipe of every rank -> forward only? -> sends, receives, reductions -> verify -> Plan
                       outline                     lowering.py                                  verify.py

Neighbours: `registry.py` knows the schedules, `lowering.py` has the passes, `verify.py` judges what comes out.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.lowering import add_communication, add_reduce_grad, forward_only
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.registry import ScheduleFacts, describe, names_with
from torchdistpackage.schedule.routing import Skips, skips_of
from torchdistpackage.schedule.verify import verify

__all__ = ["build", "complete", "outline"]


def build(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    forward_only: bool = False,
    chunks: int | None = None,
    skips: Iterable[Iterable[int]] = (),
    **options: Any,
) -> Plan:
    """Builds, lowers and proves a plan; cached, so that a step pays a dictionary look-up.

    Args:
        name: A schedule of `names()`; see `canonical_name` for spellings.
        num_ranks: Ranks of the pipeline, p >= 1.
        num_microbatches: Micro-batches of a step, m >= 1; m < p is fine.
        forward_only: Leave out every backward (evaluation).
        chunks: Stages a rank, v; the schedule's own number when not given.
        skips: Pairs (from, to) of stages over which values go past the stages between; see `routing.py`.
        **options: What else the recipe takes, such as `group_size` of the interleaved ones, or `offsets` and `period`
            of `"pattern"`; values are hashable.

    Returns:
        A plan with communication, and in training with `REDUCE_GRAD`.

    Raises:
        ScheduleError: Unknown name or option, a size below 1, a number of chunks that the schedule does not have, or a
            skip that does not fit the stages.

    Example:
        >>> print(build("1f1b", 2, 2).to_text())
        rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD
        rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE_GRAD
        >>> build("interleaved-1f1b", 2, 4, chunks=3).placement.owners
        (0, 1, 0, 1, 0, 1)
    """
    spelled, count = _checked(name, num_ranks, num_microbatches, chunks, options)
    given = tuple(sorted(options.items()))
    # An empty tuple, the usual case, is its own spelling: a step pays no sorting.
    table = skips_of(skips) if skips != () else ()
    return _build(spelled, num_ranks, num_microbatches, bool(forward_only), count, given, table)


def outline(name: str, num_ranks: int, num_microbatches: int, *, chunks: int | None = None, **options: Any) -> Plan:
    """The compute actions of a schedule only, neither lowered nor proved: what a search starts from.

    Arguments and errors as of `build`.

    Example:
        >>> outline("zb-h1", 1, 2).to_text()
        'rank 0: 0F0 0I0 0W0 0F1 0I1 0W1'
    """
    spelled, count = _checked(name, num_ranks, num_microbatches, chunks, options)
    return _outline(spelled, num_ranks, num_microbatches, count, tuple(sorted(options.items())))


def _checked(name: str, num_ranks: Any, num_microbatches: Any, chunks: Any, options: dict[str, Any]) -> tuple[str, int]:
    """The catalogue's spelling of the name, and the number of chunks."""
    facts = describe(name)
    count = facts.chunks if chunks is None else chunks
    if "owners" in options or "offsets" in options:  # a pattern says by itself how many stages there are
        count = max(1, len(options.get("owners") or options["offsets"]) // max(1, num_ranks))
    for what, size in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches), ("chunks", count)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ScheduleError(f"{what} must be a whole number of at least 1, got {size!r}")
    if not facts.runs(count):
        raise ScheduleError(
            f"schedule {facts.name!r} runs {facts.chunks} stage(s) a rank, not {count}; schedules that can: "
            f"{', '.join(names_with(count))}"
        )
    _check_options(facts, options)
    return facts.name, count


def _check_options(facts: ScheduleFacts, options: dict[str, Any]) -> None:
    known = _options_of(facts.recipe)
    unknown, missing = sorted(options.keys() - known), sorted(set(facts.needs) - options.keys())
    if unknown or missing:
        raise ScheduleError(
            f"schedule {facts.name!r} has no option {', '.join(unknown)}; it takes {sorted(known) or 'none'}"
            if unknown
            else f"schedule {facts.name!r} needs the option(s) {', '.join(missing)}: {facts.told}"
        )


@lru_cache(maxsize=64)  # reading a signature takes 30 us, and every step asks
def _options_of(recipe: Callable[..., Any]) -> frozenset[str]:
    takes = [p for p in inspect.signature(recipe).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return frozenset(p.name for p in takes) - {"chunks", "waves"}


@lru_cache(maxsize=64)
def _build(
    name: str, p: int, m: int, evaluation: bool, chunks: int, options: tuple[tuple[str, Any], ...], skips: Skips
) -> Plan:
    with _collecting_later():
        plan = _lower(_outline(name, p, m, chunks, options), evaluation).with_skips(skips)
        verify(plan)
    return plan


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Half a million tuples that all live on: the collector would walk them again and again, a quarter of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _outline(name: str, p: int, m: int, chunks: int, options: tuple[tuple[str, Any], ...]) -> Plan:
    facts, given = describe(name), dict(options)
    owners = given.get("owners")
    placement = Placement(p, tuple(owners)) if owners else facts.place(p, chunks)
    takes = inspect.signature(facts.recipe).parameters
    derived = {"chunks": chunks, "waves": chunks // 2, "owners": placement.owners}
    given.update({option: value for option, value in derived.items() if option in takes})
    return Plan(name, placement, m, tuple(tuple(facts.recipe(rank, p, m, **given)) for rank in range(p)))


def complete(plan: Plan, *, evaluation: bool = False) -> Plan:
    """Makes a plan ready to run: adds communication and `REDUCE_GRAD` where it has none, and proves it.

    Args:
        plan: Compute actions only, or with communication.
        evaluation: Keep the forwards only.

    Raises:
        ScheduleError: The plan is wrong; the message shows where.
        DeadlockError: Ranks wait for each other for ever.

    Example:
        >>> complete(Plan.from_csv("0F0,0B0")).to_text()
        'rank 0: 0F0 0B0 0REDUCE_GRAD'
    """
    if not plan.has_communication:
        verify(plan)  # what is wrong with the order is seen best before messages are in between
    plan = _lower(plan, evaluation)
    verify(plan)
    return plan


def _lower(plan: Plan, evaluation: bool) -> Plan:
    if evaluation:
        plan = forward_only(plan)
    if not plan.forward_only:
        plan = add_reduce_grad(plan)
    return plan if plan.has_communication else add_communication(plan)
