"""Values that are made on one stage and used on stages further on, and the table that says which ones.

::

    stage   0 ---h---> 1 ---h---> 2 ---h---> 3          a hand-over: every stage to the next one
            |                     ^          ^
            +--------mask---------+          |          skips: (0, 2) and (0, 3), straight from the maker to the user
            +--------residual----------------+

A hand-over belongs to every plan. A skip belongs to the model's cut, so that a plan carries the table of skips beside
its actions (`Plan.skips`) and stages say it with what they return (`Routed`). Neighbours: `verify.py` and `simulate.py`
know what a skip needs and how long it takes, `runtime/skips.py` moves the values; the planner plans for the hand-overs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torchdistpackage.errors import ScheduleError

__all__ = ["Routed", "Skips", "check_skips", "destinations", "skips_of", "sources"]

Skips = tuple[tuple[int, int], ...]
"""Every (from, to) with to > from + 1 over which values go, sorted."""


@final
@dataclass(frozen=True, eq=False)
class Routed:
    """What a stage returns when its values go to several stages: each gets its own, straight from here.

    Attributes:
        values: Destination stage -> the values that it gets from this stage, in order. The same tensor may go to
            several stages; its gradients are summed. Every destination that `skips` has for this stage must be here;
            the next stage may be missing if it gets nothing.
        skips: Every (from, to) of the whole pipeline with to > from + 1, sorted: the same on all stages.

    Example:
        >>> Routed({1: ("h", "mask"), 3: ("mask",)}, skips=((0, 3),)).values[3]
        ('mask',)
    """

    values: Mapping[int, tuple[Any, ...]]
    skips: Skips = ()


def skips_of(pairs: Iterable[Iterable[int]]) -> Skips:
    """A table in its one spelling: pairs, sorted.

    Args:
        pairs: (from, to), in any order.

    Raises:
        ScheduleError: An entry is not a pair of stages.

    Example:
        >>> skips_of([[1, 3], (0, 2)])
        ((0, 2), (1, 3))
    """
    try:
        table = [tuple(pair) for pair in pairs]
    except TypeError:
        raise ScheduleError(f"skips must be pairs (from, to) of stages, got {pairs!r}") from None
    for pair in table:
        if len(pair) != 2 or not all(type(stage) is int for stage in pair):
            raise ScheduleError(f"a skip is a pair (from, to) of stages, got {pair!r}")
    return tuple(sorted((a, b) for a, b in table))


def check_skips(skips: Skips, num_stages: int) -> None:
    """Refuses a table that cannot be one of this many stages.

    Args:
        skips: As `skips_of` gives it.
        num_stages: How many stages the model is cut into.

    Raises:
        ScheduleError: A stage does not exist, a skip does not skip anything, or one is there twice.

    Example:
        >>> check_skips(((0, 2), (0, 3)), 4)
        >>> check_skips(((0, 1),), 4)
        Traceback (most recent call last):
        torchdistpackage.errors.ScheduleError: the skip from stage 0 to stage 1 does not skip a stage: \
what goes to the next stage is handed over with its input
    """
    if skips != skips_of(skips):
        raise ScheduleError(f"a table of skips is sorted; got {skips}, sorted it is {skips_of(skips)}")
    for index, (maker, user) in enumerate(skips):
        if not 0 <= maker < num_stages or not 0 <= user < num_stages:
            raise ScheduleError(
                f"the skip from stage {maker} to stage {user} is outside of the {num_stages} stages, which are "
                f"numbered 0 to {num_stages - 1}"
            )
        if user <= maker:
            raise ScheduleError(f"the skip from stage {maker} to stage {user} goes back: values go to later stages")
        if user == maker + 1:
            raise ScheduleError(
                f"the skip from stage {maker} to stage {user} does not skip a stage: what goes to the next stage is "
                "handed over with its input"
            )
        if index and skips[index - 1] == (maker, user):
            raise ScheduleError(f"the skip from stage {maker} to stage {user} is in the table twice")


def sources(skips: Skips, stage: int) -> tuple[int, ...]:
    """The stages that a stage gets values from past its neighbour, first one first.

    Example:
        >>> sources(((0, 2), (0, 3), (1, 3)), 3)
        (0, 1)
    """
    return tuple(maker for maker, user in skips if user == stage)


def destinations(skips: Skips, stage: int) -> tuple[int, ...]:
    """The stages past its neighbour that a stage sends values to, first one first.

    Example:
        >>> destinations(((0, 2), (0, 3), (1, 3)), 0)
        (2, 3)
    """
    return tuple(user for maker, user in skips if maker == stage)
