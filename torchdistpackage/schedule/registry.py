"""The catalogue: every schedule by name, and what is known of it.

A new schedule is one recipe file and one line here. Nothing outside of this file asks for a schedule's name: what the
rest of the library needs to know of a schedule (how many chunks, which placement) it reads off the plan. Neighbours:
`building.py` makes plans of what is here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.recipes.dualpipe_v import dualpipe_v
from torchdistpackage.schedule.recipes.eager_one_f_one_b import eager_one_f_one_b
from torchdistpackage.schedule.recipes.gpipe import gpipe
from torchdistpackage.schedule.recipes.interleaved import interleaved_one_f_one_b, interleaved_zero_bubble
from torchdistpackage.schedule.recipes.looped_bfs import looped_breadth_first
from torchdistpackage.schedule.recipes.one_f_one_b import one_f_one_b
from torchdistpackage.schedule.recipes.pattern import hanayo, pattern, v_half, v_min
from torchdistpackage.schedule.recipes.zero_bubble import zero_bubble_h1, zero_bubble_h2
from torchdistpackage.schedule.recipes.zero_bubble_v import zero_bubble_v

__all__ = ["ScheduleFacts", "canonical_name", "describe", "names", "names_with"]

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
        told: What these are, in words.

    Example:
        >>> facts = describe("interleaved-1f1b")
        >>> facts.bubble, facts.memory, facts.runs(chunks=3)
        ('(p-1)(F+B)/v', 'p+(p-1)/v', True)
        >>> facts.place(num_ranks=2, chunks=2).owners
        (0, 1, 0, 1)
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
    told: str = ""

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
            "(p-1)max(F, F+I-2W)",
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
            "(p-1)F/2 if F = I = W",
            "p",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
            aliases=("zbv-zero-bubble",),
        ),
        _v(
            "v-half",
            v_half,
            "about 0.6 of 1F1B's if F = I = W",
            "p/2+1",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
        ),
        _v(
            "v-min",
            v_min,
            "about 2/3 of 1F1B's if F = I = W, else grows with m",
            "(p+4)/3",
            "Qi et al. 2024, Pipeline Parallelism with Controllable Memory",
        ),
        _v("dualpipe-v", dualpipe_v, "(p-1)F/2 if F = I = W", "p+1/2", "DeepSeek-AI 2024, DeepSeek-V3; Qi et al. 2025"),
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
            told="offsets has an entry a stage, the slots of micro-batch 0's (F, B) or (F, I, W), and each next "
            "one comes period slots later, as in build('pattern', 2, m, offsets=((0, 3), (1, 2)), period=2), a plan",
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


def canonical_name(name: str, besides: Iterable[str] = ()) -> str:
    """The catalogue's spelling of a name; case, `-`, `_` and spaces do not matter.

    Args:
        name: The name.
        besides: What the caller takes besides, for the message.

    Raises:
        ScheduleError: There is no such schedule; the message lists those that there are.

    Example:
        >>> canonical_name("GPipe"), canonical_name("Interleaved1F1B"), canonical_name("ZBVZeroBubble")
        ('gpipe', 'interleaved-1f1b', 'zb-v')
    """
    key = _key(name) if isinstance(name, str) else name
    if not isinstance(name, str) or key not in _BY_KEY:
        raise ScheduleError(_unknown(name, tuple(besides)))
    return _BY_KEY[key]


def _unknown(name: Any, besides: tuple[str, ...]) -> str:
    spellings = {**_BY_KEY, **{_key(other): other for other in besides}}
    near = difflib.get_close_matches(_key(name), spellings, 1) if isinstance(name, str) else []
    hint = f"did you mean {spellings[near[0]]!r}? " if near else ""
    known = ", ".join((*names(), *besides))
    return f"unknown schedule {name!r}; {hint}known schedules: {known}; torch's names (Interleaved1F1B, ...) do, too"


def describe(name: str) -> ScheduleFacts:
    """What is known of a schedule.

    Raises:
        ScheduleError: There is no such schedule.

    Example:
        >>> describe("zbv").placement, describe("1F1B").memory
        ('v', 'p-r')
    """
    return _CATALOGUE[canonical_name(name)]


def names_with(chunks: int) -> tuple[str, ...]:
    """The names of all schedules that run this many stages a rank, in the order of the catalogue.

    Example:
        >>> names_with(4)
        ('interleaved-1f1b', 'looped-bfs', 'interleaved-zb', 'hanayo', 'pattern')
    """
    return tuple(name for name, facts in _CATALOGUE.items() if facts.runs(chunks))
