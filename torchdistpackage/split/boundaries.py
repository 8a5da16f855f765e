"""Where to cut a row of layers: the only code of the library that distributes layers over stages.

Plain Python, no torch: numbers in, cut points out. `cost.py` makes the numbers, `sequential.py` and every other
splitter cut at the points. Boundaries of p stages are p + 1 increasing numbers; stage s has the layers from number s up
to, not including, number s + 1::

    layers      0   1   2 | 3   4 | 5   6   7
    boundaries  0           3       5           8        -> (0, 3, 5, 8)

No stage is ever empty: an empty stage would be a rank that only passes tensors on.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from numbers import Integral

from torchdistpackage.errors import SplitError

__all__ = ["balanced_boundaries", "uniform_boundaries", "uniform_sizes"]


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


def balanced_boundaries(
    costs: Iterable[float], num_stages: int, *, first_extra: float = 0, last_extra: float = 0
) -> tuple[int, ...]:
    """Cut so that the most loaded stage has as little as possible; exact, not a heuristic.

    Of all the ways to cut into non-empty stages the result is the one that has

    1. the smallest worst load (the sum of the costs of a stage);
    2. among those, the fewest layers in the stages with that load;
    3. among those, evenness: no single cut can be moved to lower the higher of the two loads beside it.

    The worst load is found by binary search with a greedy test (put into each stage as many layers as fit), which for p
    stages and n layers takes O(p log n) a step: 10,000 layers over 64 stages take a few hundredths of a second. Sums
    are exact, also of floats, so that every rank finds the same cuts on every machine.

    Args:
        costs: Cost of each layer in any unit (parameters, FLOPs, seconds), 0 or more.
        num_stages: Stages to fill.
        first_extra: Cost of the first stage that belongs to no layer, such as the embedding; same unit.
        last_extra: Cost of the last stage that belongs to no layer, such as the head and the loss; same unit.

    Returns:
        The cut points, from 0 to the number of layers.

    Raises:
        SplitError: There are fewer layers than stages, no stage, or a cost is negative, infinite or not a number.

    Example:
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1, 10], 3)
        (0, 3, 6, 7)
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], 3, last_extra=2)
        (0, 3, 5, 6)
    """
    row = list(costs)
    _check_counts(len(row), num_stages)
    exact = _as_integers([*row, first_extra, last_extra])
    loads = exact[:-2]
    loads[0] += exact[-2]  # the first layer is always on the first stage, so what that stage has anyway is the layer's
    loads[-1] += exact[-1]
    # One unit more a layer, below the resolution of the costs: rule 2, and evenness where layers cost nothing.
    prefix = list(accumulate((load * (len(loads) + 1) + 1 for load in loads), initial=0))
    return tuple(_even_out(prefix, _spread(prefix, num_stages, _smallest_limit(prefix, num_stages))))


def _check_counts(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise SplitError(f"num_stages must be 1 or more, got {num_stages}")
    if num_layers < num_stages:
        raise SplitError(
            f"{num_layers} layers cannot fill {num_stages} stages with at least one layer each; use at most "
            f"{num_layers} stages, or cut the model into smaller layers (list its blocks one by one)"
        )


def _as_integers(costs: Sequence[float]) -> list[int]:
    """The costs times one power of two that makes all of them whole; every finite float is a multiple of 2 ** -1074."""
    fractions: list[tuple[int, int]] = []
    for index, cost in enumerate(costs):
        value = int(cost) if isinstance(cost, Integral) else float(cost)
        if not (0 <= value < math.inf):  # also false for what is not a number
            where = {len(costs) - 2: "first_extra", len(costs) - 1: "last_extra"}.get(
                index, f"the cost of layer {index}"
            )
            raise SplitError(f"{where} is {cost}; costs must be finite and 0 or more")
        fractions.append(value.as_integer_ratio())
    scale = max(denominator for _, denominator in fractions)
    return [numerator * (scale // denominator) for numerator, denominator in fractions]


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


def _even_out(prefix: list[int], cuts: list[int]) -> list[int]:
    """Move single cuts for as long as one lowers the higher load beside it.

    A move keeps the sum of the two loads and lowers the higher one, so the sum of the squares falls and the loop ends;
    no load rises above the worst one.
    """

    def higher_load(left: int, cut: int, right: int) -> int:
        return max(prefix[cut] - prefix[left], prefix[right] - prefix[cut])

    moved = True
    while moved:
        moved = False
        for index in range(1, len(cuts) - 1):
            left, cut, right = cuts[index - 1 : index + 2]
            middle = bisect_left(prefix, (prefix[left] + prefix[right]) // 2, left + 1, right - 1)
            best = min((max(middle - 1, left + 1), middle), key=lambda point: higher_load(left, point, right))
            if higher_load(left, best, right) < higher_load(left, cut, right):
                cuts[index] = best
                moved = True
    return cuts
