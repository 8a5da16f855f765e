"""What a cut must keep to, checked and in exact integers: pinned layers, forbidden places, memory, bytes sent.

`boundaries.balanced_boundaries` takes the wishes, this file turns them into `Rules`, `constrained.py` searches for the
best cut among those that keep them. Wishes that contradict each other are found here, before any search. A *place* is a
number c: a cut there is between layer c - 1 and layer c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from numbers import Integral
from typing import Any, cast, final

import numpy as np
from numpy.typing import NDArray

from torchdistpackage.errors import SplitError

__all__ = ["ExactMemory", "MemoryLimit", "Rules", "as_integers", "exact_array", "make_rules"]

Numbers = NDArray[Any]  # int64 where all sums fit, else Python's integers as objects: slower, and as exact


@dataclass(frozen=True)
class MemoryLimit:
    """What the layers hold and how much each stage may hold.

    Stage s holds the static bytes of its layers and live[s] times their activations, and no more than limit[s].

    Args:
        limit: Bytes that a stage may hold: one number for all, or one a stage. `math.inf` is no limit.
        static: Bytes that each layer holds all the time: parameters, gradients, the optimizer's state.
        activations: Bytes that each layer keeps of one micro-batch between its forward and its backward.
        live: How many micro-batches are between their forward and their backward at the same time at most: one number
            for all stages, or one a stage. Under 1F1B that is p - s on stage s.

    Example:
        >>> MemoryLimit(limit=100, static=[10, 10], activations=[5, 5], live=[2, 1]).live
        [2, 1]
    """

    limit: float | Sequence[float]
    static: Sequence[float]
    activations: Sequence[float]
    live: int | Sequence[int]


@dataclass(frozen=True)
class Rules:
    """Where n layers may be cut into p stages.

    Attributes:
        lowest: For each cut 0 .. p, the first place where it may be, 0 and n included.
        highest: For each cut 0 .. p, the last one.
        allowed: For each place 0 .. n, whether any cut may be there.
        sent: For each place 0 .. n, what a cut there sends.
        memory: How much the stages may hold, None if that is not limited.
        reach: For each stage and its first layer, the place up to which its memory lasts.
    """

    lowest: tuple[int, ...]
    highest: tuple[int, ...]
    allowed: NDArray[np.bool_]
    sent: Numbers
    memory: ExactMemory | None
    reach: tuple[NDArray[np.int64], ...]


def as_integers(numbers: Sequence[float], name: Callable[[int], str]) -> list[int]:
    """The numbers times one power of two that makes all of them whole; every finite float is a multiple of 2 ** -1074.

    Args:
        numbers: Finite numbers, 0 or more.
        name: What the number with this index is called in an error.

    Raises:
        SplitError: A number is negative, infinite or not a number.

    Example:
        >>> as_integers([1, 0.25, 2.5], "number {}".format)
        [4, 1, 10]
    """
    fractions: list[tuple[int, int]] = []
    for index, number in enumerate(numbers):
        value = int(number) if isinstance(number, Integral) else float(number)
        if not (0 <= value < math.inf):  # also false for what is not a number
            raise SplitError(f"{name(index)} is {number}; it must be finite and 0 or more")
        fractions.append(value.as_integer_ratio())
    scale = max((denominator for _, denominator in fractions), default=1)
    return [numerator * (scale // denominator) for numerator, denominator in fractions]


def exact_array(numbers: Sequence[int], largest: int) -> Numbers:
    """An array in which sums up to `largest` are exact."""
    return np.array(numbers, dtype=np.int64 if largest < 2**62 else object)


def make_rules(
    num_layers: int,
    num_stages: int,
    cut_bytes: Sequence[float] | None,
    forbidden: Iterable[int],
    stage_of: Mapping[int, int],
    memory: MemoryLimit | None,
) -> Rules:
    """The wishes of `balanced_boundaries` as rules.

    Raises:
        SplitError: A wish is malformed, or pins and forbidden places leave no cut at all.
    """
    sent = _sent(num_layers, cut_bytes)
    allowed = np.ones(num_layers + 1, dtype=np.bool_)
    for place in forbidden:
        if not 0 < place < num_layers:
            raise SplitError(
                f"forbidden has {place}, but {num_layers} layers can be cut at 1 to {num_layers - 1} only (a cut at c "
                f"is between layer c - 1 and layer c)"
            )
        allowed[place] = False
    _check_pins(stage_of, allowed, num_stages)
    lowest = [*range(num_stages), num_layers]
    highest = [0, *(num_layers - num_stages + cut for cut in range(1, num_stages + 1))]
    for layer, stage in stage_of.items():
        highest[stage] = min(highest[stage], layer)
        lowest[stage + 1] = max(lowest[stage + 1], layer + 1)
    exact = None if memory is None else _exact_memory(memory, num_layers, num_stages)
    reach = (np.full(num_layers, num_layers),) * num_stages if exact is None else exact.reach()
    return Rules(tuple(lowest), tuple(highest), allowed, sent, exact, reach)


def _sent(num_layers: int, cut_bytes: Sequence[float] | None) -> Numbers:
    if cut_bytes is None:
        return np.zeros(num_layers + 1, dtype=np.int64)
    if len(cut_bytes) != num_layers - 1:
        raise SplitError(
            f"{len(cut_bytes)} cut_bytes were given for {num_layers} layers; give one number for each of the "
            f"{num_layers - 1} places between two layers"
        )
    exact = as_integers(cut_bytes, "cut_bytes[{}]".format)
    return exact_array([0, *exact, 0], sum(exact) + 1)


def _check_pins(stage_of: Mapping[int, int], allowed: NDArray[np.bool_], num_stages: int) -> None:
    """Between two pinned layers that follow each other there must be a place for each cut that separates their stages.

    The first layer is pinned to the first stage and the last one to the last, whatever the wishes. If every two pins in
    a row can be met, all can.
    """
    num_layers = len(allowed) - 1
    for layer, stage in stage_of.items():
        if not (0 <= layer < num_layers and 0 <= stage < num_stages):
            raise SplitError(
                f"layer {layer} is pinned to stage {stage}, but there are layers 0 to {num_layers - 1} and stages 0 to "
                f"{num_stages - 1}"
            )
    pins = [(layer, stage, f"layer {layer} is pinned to stage {stage}") for layer, stage in sorted(stage_of.items())]
    pins.insert(0, (0, 0, "layer 0 is always on stage 0"))
    pins.append((num_layers - 1, num_stages - 1, f"layer {num_layers - 1} is always on the last stage"))
    for (layer, stage, fact), (next_layer, next_stage, next_fact) in pairwise(pins):
        if next_stage < stage:
            raise SplitError(f"{fact} and {next_fact}, but stages follow the order of the layers; pin one elsewhere")
        places, cuts = next_layer - layer, next_stage - stage
        open_places = int(allowed[layer + 1 : next_layer + 1].sum())
        if open_places < cuts:
            raise SplitError(
                f"{fact} and {next_fact}: that takes {cuts} cuts between them, but there are only {open_places} places "
                f"({places - open_places} more are forbidden); pin other stages, forbid less, or use fewer stages"
            )


@final
@dataclass(frozen=True)
class ExactMemory:
    """A `MemoryLimit` in whole numbers of a unit of which `scale` are a byte."""

    wish: MemoryLimit
    scale: int
    limits: list[int | None]  # None: no limit
    live: list[int]
    held: dict[int, Numbers]  # for each number of live micro-batches, what the first 0 .. n layers hold

    def reach(self, extra: int = 0) -> tuple[NDArray[np.int64], ...]:
        """For each stage and its first layer, the place up to which the memory lasts, with `extra` bytes a stage."""
        reach: dict[tuple[int, int | None], NDArray[np.int64]] = {}  # many stages have the same
        for live, limit in zip(self.live, self.limits, strict=True):
            if (live, limit) not in reach:
                held = self.held[live]
                room = held[-1] if limit is None else min(limit + extra * self.scale, int(held[-1]))
                reach[live, limit] = np.searchsorted(held, held[:-1] + room, side="right") - 1
        return tuple(reach[pair] for pair in zip(self.live, self.limits, strict=True))


def _exact_memory(memory: MemoryLimit, num_layers: int, num_stages: int) -> ExactMemory:
    if not len(memory.static) == len(memory.activations) == num_layers:
        raise SplitError(
            f"memory.static has {len(memory.static)} numbers and memory.activations {len(memory.activations)}; give "
            f"both one for each of the {num_layers} layers"
        )
    limits = _one_a_stage(memory.limit, num_stages, "memory.limit")
    live = [int(number) for number in _one_a_stage(memory.live, num_stages, "memory.live")]
    if live != _one_a_stage(memory.live, num_stages, "memory.live") or min(live) < 0:
        raise SplitError(f"memory.live is {memory.live}; micro-batches are counted in whole numbers, 0 or more")
    fields = {"limit": [0 if limit == math.inf else limit for limit in limits], "static": memory.static}
    fields["activations"] = memory.activations
    names = [f"memory.{field}[{index}]" for field, numbers in fields.items() for index in range(len(numbers))]
    exact = iter(as_integers([1, *chain(*fields.values())], ["one byte", *names].__getitem__))
    scale, finite = next(exact), list(islice(exact, num_stages))
    static = list(accumulate(islice(exact, num_layers), initial=0))
    activations = list(accumulate(exact, initial=0))
    held = {
        number: [fixed + number * moving for fixed, moving in zip(static, activations, strict=True)]
        for number in {*live}
    }
    return ExactMemory(
        wish=memory,
        scale=scale,
        limits=[None if limit == math.inf else number for limit, number in zip(limits, finite, strict=True)],
        live=live,
        held={number: exact_array(row, 2 * row[-1]) for number, row in held.items()},
    )


def _one_a_stage(value: float | Sequence[float], num_stages: int, name: str) -> list[float]:
    numbers = [cast("float", value)] * num_stages if np.ndim(value) == 0 else list(cast("Sequence[float]", value))
    if len(numbers) != num_stages:
        raise SplitError(f"{name} has {len(numbers)} numbers for {num_stages} stages; give one for all, or one a stage")
    return numbers
