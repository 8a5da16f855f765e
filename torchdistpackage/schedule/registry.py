"""The catalogue: every schedule by name, and `build`, which turns a name into a proved plan.

A new schedule is one recipe file and one line here. Nothing outside of this file asks for a schedule's name: what the
rest of the library needs to know of a schedule (how many chunks, which placement) it reads off the plan.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action
from torchdistpackage.schedule.lowering import add_communication, add_reduce_grad, forward_only
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.recipes.dualpipe_v import dualpipe_v
from torchdistpackage.schedule.recipes.eager_one_f_one_b import eager_one_f_one_b
from torchdistpackage.schedule.recipes.gpipe import gpipe
from torchdistpackage.schedule.recipes.interleaved import interleaved_one_f_one_b, interleaved_zero_bubble
from torchdistpackage.schedule.recipes.looped_bfs import looped_breadth_first
from torchdistpackage.schedule.recipes.one_f_one_b import one_f_one_b
from torchdistpackage.schedule.recipes.pattern import hanayo, pattern, v_half, v_min
from torchdistpackage.schedule.recipes.zero_bubble import zero_bubble_h1, zero_bubble_h2
from torchdistpackage.schedule.recipes.zero_bubble_v import zero_bubble_v
from torchdistpackage.schedule.routing import Skips, skips_of
from torchdistpackage.schedule.verify import verify

__all__ = ["ScheduleFacts", "build", "canonical_name", "complete", "describe", "names", "outline"]

Recipe = Callable[..., Iterator[Action]]


@dataclass(frozen=True)
class ScheduleFacts:
    """What is known of a schedule; times are those of a full stage, one rank's share of the model.

    Attributes:
        name: As `build` takes it.
        recipe: Yields one rank's compute actions.
        chunks: Stages a rank; the default where any number works.
        chunks_step: Other numbers of chunks are multiples of this; 0 if there is no other.
        placement: `"loop"` or `"v"`.
        split: Whether it splits the backward into I and W.
        bubble: Idle time of a rank in one step.
        memory: The most activations that a rank holds; 1 is one micro-batch on one rank's share of the model.
        source: Where it was published.
        aliases: Other names; case, `-`, `_` and spaces do not matter anywhere.
        needs: Options without which it cannot be built.
    """

    name: str
    recipe: Recipe
    chunks: int
    chunks_step: int
    placement: str
    split: bool
    bubble: str
    memory: str
    source: str
    aliases: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def runs(self, chunks: int) -> bool:
        """Whether it can be built with this many stages a rank."""
        return chunks == self.chunks or (self.chunks_step > 0 and chunks % self.chunks_step == 0)

    def place(self, num_ranks: int, chunks: int) -> Placement:
        """Puts the stages on the ranks."""
        return Placement.v(num_ranks, chunks) if self.placement == "v" else Placement.loop(num_ranks, chunks)


def _loop(name: str, recipe: Recipe, bubble: str, memory: str, source: str, **more: Any) -> ScheduleFacts:
    facts = {"chunks": 1, "chunks_step": 0, "split": False, **more}
    return ScheduleFacts(name, recipe, placement="loop", bubble=bubble, memory=memory, source=source, **facts)


def _v(name: str, recipe: Recipe, bubble: str, memory: str, source: str, **more: Any) -> ScheduleFacts:
    facts = {"chunks": 2, "chunks_step": 0, "split": True, **more}
    return ScheduleFacts(name, recipe, placement="v", bubble=bubble, memory=memory, source=source, **facts)


_CATALOGUE: dict[str, ScheduleFacts] = {
    facts.name: facts
    for facts in (
        _loop("gpipe", gpipe, "(p-1)(F+B)", "m", "Huang et al. 2019, GPipe"),
        _loop(
            "1f1b",
            one_f_one_b,
            "(p-1)(F+B)",
            "p-r",
            "Narayanan et al. 2019, PipeDream; Fan et al. 2020, DAPPLE",
            aliases=("dapple", "pipedream-flush"),
        ),
        _loop(
            "eager-1f1b",
            eager_one_f_one_b,
            "(p-1)(F+B), hides hops",
            "2(p-r)-1",
            "Zhuang et al. 2022, On Optimizing the Communication of Model Parallelism",
        ),
        _loop(
            "interleaved-1f1b",
            interleaved_one_f_one_b,
            "(p-1)(F+B)/v",
            "p+(p-1)/v",
            "Narayanan et al. 2021, Megatron-LM",
            chunks=2,
            chunks_step=1,
            aliases=("interleaved",),
        ),
        _loop(
            "looped-bfs",
            looped_breadth_first,
            "(p-1)(F+B)/v",
            "m",
            "Lamy-Poirier 2022, Breadth-First Pipeline Parallelism",
            chunks=2,
            chunks_step=1,
            aliases=("breadth-first",),
        ),
        _loop(
            "zb-h1",
            zero_bubble_h1,
            "(p-1)(F+I-W)",
            "p",
            "Qi et al. 2023, Zero Bubble Pipeline Parallelism",
            split=True,
            aliases=("zb1p",),
        ),
        _loop(
            "zb-h2",
            zero_bubble_h2,
            "(p-1)(F+I-2W)",
            "2p-1",
            "Qi et al. 2023, Zero Bubble Pipeline Parallelism",
            split=True,
            aliases=("zb2p",),
        ),
        _loop(
            "interleaved-zb",
            interleaved_zero_bubble,
            "(p-1)(F+I-W)/v",
            "p+(p-1)/v",
            "Narayanan et al. 2021 with the split of Qi et al. 2023",
            chunks=2,
            chunks_step=1,
            split=True,
            aliases=("interleaved-zero-bubble",),
        ),
        _v(
            "zb-v",
            zero_bubble_v,
            "(p-1)F/2",
            "p",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
            aliases=("zbv-zero-bubble",),
        ),
        _v(
            "v-half",
            v_half,
            "about half of 1F1B's",
            "p/2+1",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
        ),
        _v(
            "v-min",
            v_min,
            "about 2/3 of 1F1B's; much more if F, I, W differ",
            "(p+4)/3",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
        ),
        _v("dualpipe-v", dualpipe_v, "(p-1)(F+B-3W)/2", "p+1/2", "DeepSeek-AI 2024, DeepSeek-V3; Qi et al. 2025"),
        _v(
            "hanayo",
            hanayo,
            "(p-1)(F+B)/(2w) if F = B, else grows with m",
            "p",
            "Liu et al. 2023, Hanayo",
            chunks_step=2,
            split=False,
            aliases=("wave",),
        ),
        _loop(
            "pattern",
            pattern,
            "as its offsets say",
            "as its offsets say",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
            chunks_step=1,
            needs=("offsets", "period"),
        ),
    )
}


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


_BY_KEY = {_key(spelling): facts.name for facts in _CATALOGUE.values() for spelling in (facts.name, *facts.aliases)}


def names() -> tuple[str, ...]:
    """The names of all schedules that need nothing but p and m, sorted.

    Example:
        >>> "1f1b" in names(), "zb-v" in names()
        (True, True)
    """
    return tuple(sorted(name for name, facts in _CATALOGUE.items() if not facts.needs))


def canonical_name(name: str) -> str:
    """The catalogue's spelling of a name; case, `-`, `_` and spaces do not matter.

    Raises:
        ScheduleError: There is no such schedule; the message lists those that there are.

    Example:
        >>> canonical_name("GPipe"), canonical_name("Interleaved1F1B"), canonical_name("ZBVZeroBubble")
        ('gpipe', 'interleaved-1f1b', 'zb-v')
    """
    key = _key(name) if isinstance(name, str) else name
    if not isinstance(name, str) or key not in _BY_KEY:
        raise ScheduleError(f"unknown schedule {name!r}; known schedules: {', '.join(names())}")
    return _BY_KEY[key]


def describe(name: str) -> ScheduleFacts:
    """What is known of a schedule.

    Raises:
        ScheduleError: There is no such schedule.

    Example:
        >>> describe("zbv").placement, describe("1F1B").memory
        ('v', 'p-r')
    """
    return _CATALOGUE[canonical_name(name)]


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
    facts = _CATALOGUE[canonical_name(name)]
    count = facts.chunks if chunks is None else chunks
    if "owners" in options or "offsets" in options:  # a pattern says by itself how many stages there are
        count = max(1, len(options.get("owners") or options["offsets"]) // max(1, num_ranks))
    for what, size in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches), ("chunks", count)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ScheduleError(f"{what} must be a whole number of at least 1, got {size!r}")
    if not facts.runs(count):
        fitting = ", ".join(other.name for other in _CATALOGUE.values() if other.runs(count))
        raise ScheduleError(
            f"schedule {facts.name!r} runs {facts.chunks} stage(s) a rank, not {count}; schedules that can: {fitting}"
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
            else f"schedule {facts.name!r} needs the option(s) {', '.join(missing)}"
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
    facts, given = _CATALOGUE[name], dict(options)
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
