"""Where to cut a row of layers: the only code of the library that distributes layers over stages.

No torch: numbers in, cut points out. `cost.py` makes the numbers, `sequential.py` and every other splitter cut at the
points; `constraints.py` and `constrained.py` are for cuts that must keep to more than a number of stages. Boundaries of
p stages are p + 1 increasing numbers; stage s has the layers from number s up to, not including, number s + 1::

    layers      0   1   2 | 3   4 | 5   6   7
    boundaries  0           3       5           8        -> (0, 3, 5, 8)

No stage is ever empty, unless sizes are given and the caller asks for it: an empty stage is a rank that only passes
tensors on.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from torchdistpackage.errors import SplitError
from torchdistpackage.split.constrained import constrained_cuts, even_out
from torchdistpackage.split.constraints import MemoryLimit, as_integers, make_rules

__all__ = [
    "LoadBalance",
    "MemoryLimit",
    "balanced_boundaries",
    "boundaries_of_sizes",
    "load_balance",
    "uniform_boundaries",
    "uniform_sizes",
]


def uniform_sizes(num_layers: int, num_stages: int, *, extra_len: int = 0) -> tuple[int, ...]:
    """Spread layers evenly by count: two sizes differ by at most one.

    What is left over goes, one layer each, to the stages just *before* the last. The last stage gets none because it
    also computes the head and the loss; the first gets one only when all but the last do, because under 1F1B it keeps
    the activations of the most micro-batches.

    Args:
        num_layers: Layers in the row, n.
        num_stages: Stages to fill, p.
        extra_len: Work of the last stage that is not in the row, in layers. The sizes are those of n + extra_len
            layers of which the last extra_len are not really there, but the last stage never has fewer than one layer.
            A negative number says that the last stage's layers are cheap: it then has that many layers more.

    Returns:
        Layers of each stage, in the order of the model; their sum is n.

    Raises:
        SplitError: There are fewer layers than stages, or no stage.

    Example:
        >>> uniform_sizes(7, 4), uniform_sizes(9, 4)
        ((2, 2, 2, 1), (2, 2, 3, 2))
        >>> uniform_sizes(8, 4, extra_len=1), uniform_sizes(8, 4, extra_len=100)
        ((2, 2, 3, 1), (2, 2, 3, 1))
    """
    _check_counts(num_layers, num_stages)
    room = num_layers - (num_stages - 1)  # one layer is left to every earlier stage
    last = min(max((num_layers + extra_len) // num_stages - extra_len, 1), room)
    if num_stages == 1:
        return (num_layers,)
    share, left_over = divmod(num_layers - last, num_stages - 1)
    return (*[share] * (num_stages - 1 - left_over), *[share + 1] * left_over, last)


def uniform_boundaries(num_layers: int, num_stages: int, *, extra_len: int = 0) -> tuple[int, ...]:
    """`uniform_sizes` as cut points.

    Raises:
        SplitError: There are fewer layers than stages, or no stage.

    Example:
        >>> uniform_boundaries(9, 4)
        (0, 2, 4, 7, 9)
    """
    return tuple(accumulate(uniform_sizes(num_layers, num_stages, extra_len=extra_len), initial=0))


def boundaries_of_sizes(sizes: Iterable[int], num_layers: int, *, allow_empty: bool = False) -> tuple[int, ...]:
    """Layers of each stage, as somebody wrote them down, as cut points.

    Args:
        sizes: Layers of each stage.
        num_layers: Layers in the row.
        allow_empty: Whether a stage may have no layer.

    Raises:
        SplitError: The sizes do not add up, or one is not a whole number, negative, or 0 without `allow_empty`.

    Example:
        >>> boundaries_of_sizes([3, 2, 3], 8)
        (0, 3, 5, 8)
    """
    row = list(sizes)
    for stage, size in enumerate(row):
        if size != int(size) or size < 0:
            raise SplitError(f"stage {stage} has size {size}; sizes are numbers of layers")
        if size == 0 and not allow_empty:
            raise SplitError(f"stage {stage} of sizes {row} has no layer; use {len(row) - row.count(0)} stages instead")
    if sum(row) != num_layers:
        raise SplitError(f"the sizes {row} add up to {sum(row)}, but there are {num_layers} layers")
    return tuple(accumulate(map(int, row), initial=0))


def balanced_boundaries(
    costs: Iterable[float],
    num_stages: int,
    *,
    first_extra: float = 0,
    last_extra: float = 0,
    cut_bytes: Iterable[float] | None = None,
    slack: float = 0.0,
    forbidden: Iterable[int] = (),
    stage_of: Mapping[int, int] | None = None,
    memory: MemoryLimit | None = None,
) -> tuple[int, ...]:
    """Cut so that the most loaded stage has as little as possible; exact, not a heuristic.

    Of all the ways to cut into non-empty stages that keep to `forbidden`, `stage_of` and `memory`, the result is one of
    those whose worst load (the largest sum of the costs of a stage) is at most 1 + `slack` times the smallest; and
    among these the one that has

    1. the smallest sum of `cut_bytes`, if they are given;
    2. among those, the smallest worst load;
    3. among those, the fewest layers in the stages with that load;
    4. among those, evenness: no single cut can be moved, to where it sends as much, to lower the higher of the two
       loads beside it.

    The worst load is found by binary search with a greedy test (put into each stage as many layers as fit), which for p
    stages and n layers takes O(p log n) a step: 10,000 layers over 64 stages take a few hundredths of a second, and
    some tenths where there is anything to keep to (`constrained.py`). Sums are exact, also of floats, so that every
    rank finds the same cuts on every machine.

    Args:
        costs: Cost of each layer in any unit (parameters, FLOPs, seconds), 0 or more.
        num_stages: Stages to fill.
        first_extra: Cost of the first stage that belongs to no layer, such as the embedding; same unit.
        last_extra: Cost of the last stage that belongs to no layer, such as the head and the loss; same unit.
        cut_bytes: What a cut behind each layer but the last would send. If all are equal they change nothing.
        slack: How much load to give for fewer bytes: 0.1 lets the worst load be a tenth above the smallest.
        forbidden: Cut points where no cut may be; c is between layer c - 1 and layer c.
        stage_of: The stage on which a layer must be, for any of the layers.
        memory: How much the stages may hold.

    Returns:
        The cut points, from 0 to the number of layers.

    Raises:
        SplitError: There are fewer layers than stages, no stage, a number is negative, infinite or not a number, or no
            cut keeps to everything; the message says to what not.

    Example:
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1, 10], 3)
        (0, 3, 6, 7)
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], 3, last_extra=2)
        (0, 3, 5, 6)
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], 2, cut_bytes=[8, 2, 8, 4, 8], slack=0.4)
        (0, 2, 6)
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], 2, forbidden=[3], stage_of={2: 0})
        (0, 4, 6)
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], 2, memory=MemoryLimit(12, [1] * 6, [2] * 6, live=[2, 1]))
        (0, 2, 6)
    """
    row = list(costs)
    num_layers = len(row)
    _check_counts(num_layers, num_stages)
    if not 0 <= slack < math.inf:
        raise SplitError(f"slack is {slack}; it is a share of the smallest worst load, such as 0.1, and 0 or more")
    names = {num_layers: "first_extra", num_layers + 1: "last_extra"}
    exact = as_integers([*row, first_extra, last_extra], lambda i: names.get(i, f"the cost of layer {i}"))
    loads = exact[:-2]
    loads[0] += exact[-2]  # the first layer is always on the first stage, so what that stage has anyway is the layer's
    loads[-1] += exact[-1]
    # One unit more a layer, below the resolution of the costs: rule 3, and evenness where layers cost nothing.
    prefix = list(accumulate((load * (num_layers + 1) + 1 for load in loads), initial=0))
    sent, places = None if cut_bytes is None else list(cut_bytes), list(forbidden)
    if sent is not None or places or stage_of or memory is not None:
        rules = make_rules(num_layers, num_stages, sent, places, stage_of or {}, memory)
        return tuple(constrained_cuts(prefix, num_stages, rules, Fraction(slack)))
    return tuple(even_out(prefix, _spread(prefix, num_stages, _smallest_limit(prefix, num_stages))))


@dataclass(frozen=True)
class LoadBalance:
    """How even a cut is.

    Attributes:
        loads: Load of each stage, in the unit of the costs.

    Example:
        >>> balance = LoadBalance((3, 5))
        >>> balance.worst, balance.mean, balance.imbalance
        (5, 4.0, 0.25)
    """

    loads: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest load, which sets the pace of the pipeline."""
        return max(self.loads, default=0)

    @property
    def mean(self) -> float:
        """What every stage would have if layers could be cut anywhere."""
        return _total(self.loads) / max(len(self.loads), 1)

    @property
    def imbalance(self) -> float:
        """The worst load divided by the mean, less 1: 0 is even, 1 is twice the mean."""
        return self.worst / self.mean - 1 if self.mean else 0.0


def load_balance(
    costs: Iterable[float], boundaries: Sequence[int], *, first_extra: float = 0, last_extra: float = 0
) -> LoadBalance:
    """The loads of a cut; with those of `balanced_boundaries`, `worst` is the optimum.

    Args:
        costs: Cost of each layer.
        boundaries: Cut points.
        first_extra: Cost of the first stage that belongs to no layer.
        last_extra: Cost of the last stage that belongs to no layer.

    Raises:
        SplitError: The boundaries are not those of so many layers.

    Example:
        >>> load_balance([1, 1, 1, 3], (0, 3, 4), last_extra=2)
        LoadBalance(loads=(3, 5))
    """
    row = list(costs)
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != len(row) or sorted(boundaries) != [*boundaries]:
        raise SplitError(
            f"boundaries {tuple(boundaries)} do not cut {len(row)} layers; they go up from 0 to {len(row)}"
        )
    loads: list[Any] = [_total(row[left:right]) for left, right in pairwise(boundaries)]
    loads[0] += first_extra
    loads[-1] += last_extra
    return LoadBalance(tuple(loads))


def _total(numbers: Sequence[float]) -> float:
    """Whole numbers stay whole; floats are rounded once."""
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _check_counts(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise SplitError(f"num_stages must be 1 or more, got {num_stages}")
    if num_layers < num_stages:
        raise SplitError(
            f"{num_layers} layers cannot fill {num_stages} stages with at least one layer each; use at most "
            f"{num_layers} stages, or cut the model into smaller layers (list its blocks one by one)"
        )


def _smallest_limit(prefix: list[int], num_stages: int) -> int:
    """The smallest load that is enough for every stage."""
    low = max(max(right - left for left, right in pairwise(prefix)), -(-prefix[-1] // num_stages))
    high = prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _fits(prefix, num_stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(prefix: list[int], num_stages: int, limit: int) -> bool:
    """Whether greedy stages of at most `limit` reach the end; fewer stages will do, as a stage can always be cut."""
    end = 0
    for _ in range(num_stages):
        end = bisect_right(prefix, prefix[end] + limit) - 1
    return end == len(prefix) - 1


def _spread(prefix: list[int], num_stages: int, limit: int) -> list[int]:
    """Cuts within the limit, each as near to an even share of what is left as the limit lets it be.

    A cut is feasible from `earliest` on (behind it, the rest fits into the stages that are left) and up to where its
    own stage is full; both ends are found greedily, one from the right, the other from the left.
    """
    num_layers = len(prefix) - 1
    earliest = [num_layers]
    for _ in range(num_stages):
        earliest.append(bisect_left(prefix, prefix[earliest[-1]] - limit))
    earliest.reverse()
    cuts = [0]
    for stage in range(num_stages - 1):
        start, stages_left = cuts[-1], num_stages - stage
        latest = min(bisect_right(prefix, prefix[start] + limit) - 1, num_layers - (stages_left - 1))
        share = prefix[start] + (prefix[-1] - prefix[start]) // stages_left
        cuts.append(min(max(bisect_left(prefix, share), earliest[stage + 1], start + 1), latest))
    return [*cuts, num_layers]
