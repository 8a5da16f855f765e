"""The search for the best cut among those that keep the rules: exact, and fast enough for thousands of layers.

`boundaries.py` has the same search for a row without rules, where greedy stages are enough. With rules they are not: a
stage may have to stop early because of a pin, and a cheaper cut may be anywhere. So for a limit on the load of a stage
we go through the stages from the last to the first and find, for each place where cut s may be, the fewest bytes that
the cuts from there on can send::

    place        0  1  2  3  4  5  6  7  8
    cut 3 = end                          0
    cut 2                    4  7  9  .     . : stage 2 would be too much from here on, or no cut may be here
    cut 1           .  6 11  .              each is what its own cut sends + the least of cut 2 in reach
    cut 0        6                          in reach: as far as the limits on load and memory allow

The windows of cut s + 1 that are in reach from the places of cut s begin and end further right the further right the
place is; numpy takes the smallest number of all of them at once, in O(n log n) a stage. Around that, a binary search
finds the smallest limit for which a cut exists.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import final

import numpy as np
from numpy.typing import NDArray

from torchdistpackage.errors import SplitError
from torchdistpackage.split.constraints import Numbers, Rules, exact_array

__all__ = ["constrained_cuts", "even_out"]


def constrained_cuts(prefix: list[int], num_stages: int, rules: Rules, slack: Fraction) -> list[int]:
    """The cuts that `boundaries.balanced_boundaries` describes.

    Args:
        prefix: Sums of the loads of the first 0 .. n layers, each load times n + 1, and 1 more.
        num_stages: p.
        rules: What to keep to.
        slack: How much more than the smallest worst load is allowed to save bytes, as a share of it.

    Raises:
        SplitError: No cut fits into the memory.
    """
    search = _Search(prefix, exact_array(prefix, 2 * prefix[-1]), num_stages, rules)
    if search.levels(prefix[-1]) is None:
        raise _too_little_memory(search)
    num_layers = len(prefix) - 1
    heaviest = max(right - left for left, right in pairwise(prefix))
    limit = search.smallest_limit(max(heaviest, -(-prefix[-1] // num_stages)), prefix[-1])
    if rules.sent.any():
        # Without the unit that every layer has more: rule 1 asks for the loads that the user knows.
        most = int((1 + slack) * (limit // (num_layers + 1))) * (num_layers + 1) + num_layers
        fewest_bytes = search.levels_at(min(most, prefix[-1])).least
        limit = search.smallest_limit(limit, min(most, prefix[-1]), fewest_bytes)
    cuts = search.cuts(search.levels_at(limit), limit)
    return even_out(prefix, cuts, search.may_move)


def even_out(
    prefix: list[int], cuts: list[int], may_move: Callable[[list[int], int, int], bool] | None = None
) -> list[int]:
    """Move single cuts for as long as one lowers the higher load beside it.

    A move keeps the sum of the two loads and lowers the higher one, so the sum of the squares falls and the loop ends;
    no load rises above the worst one. The further a place is from the middle, the higher is the higher load, so on each
    side of the middle the nearest place that is allowed is the best.

    Args:
        prefix: Sums of the loads.
        cuts: Where they are now; changed and returned.
        may_move: Whether, in these cuts, the one with this index may move to this place; by default always.
    """

    def higher_load(left: int, cut: int, right: int) -> int:
        return max(prefix[cut] - prefix[left], prefix[right] - prefix[cut])

    moved = True
    while moved:
        moved = False
        for index in range(1, len(cuts) - 1):
            left, cut, right = cuts[index - 1 : index + 2]
            middle = bisect_left(prefix, (prefix[left] + prefix[right]) // 2, left + 1, right - 1)
            lowest = higher_load(left, cut, right)
            for places in (range(middle - 1, left, -1), range(middle, right)):
                for place in places:
                    if higher_load(left, place, right) >= lowest:
                        break
                    if may_move is None or may_move(cuts, index, place):
                        lowest, cut = higher_load(left, place, right), place
                        break
            if cut != cuts[index]:
                cuts[index] = cut
                moved = True
    return cuts


@dataclass(frozen=True)
class _Windows:
    """For each cut the first and the last place where, for all that greedy stages can tell, it may be."""

    first: list[int]
    last: list[int]


@dataclass(frozen=True)
class _Levels:
    """For each cut and each place of its window, the fewest bytes of it and the cuts behind it."""

    windows: _Windows
    bytes_left: list[Numbers]

    @property
    def least(self) -> int:
        return int(self.bytes_left[0][0])


@final
@dataclass(frozen=True)
class _Search:
    prefix: list[int]
    loads: Numbers  # the prefix as an array
    num_stages: int
    rules: Rules

    def smallest_limit(self, low: int, high: int, fewest_bytes: int | None = None) -> int:
        """The smallest worst load of all cuts, or of those that send no more than that.

        `high` is known to be enough, and nothing below `low` is.
        Both ends jump to loads that stages can have, so the steps depend on how many of those there are in between
        and not on how fine the unit is.
        """
        while low < high:
            middle = (low + high) // 2
            levels = self.levels(middle)
            if levels is not None and (fewest_bytes is None or levels.least <= fewest_bytes):
                cuts = self.cuts(levels, middle)
                high = max(self.prefix[right] - self.prefix[left] for left, right in pairwise(cuts))
            else:
                ends = self._ends(middle)
                starts = np.nonzero(ends < len(ends))[0]
                low = int((self.loads[ends[starts] + 1] - self.loads[starts]).min())
        return high

    def levels_at(self, limit: int) -> _Levels:
        levels = self.levels(limit)
        assert levels is not None, "a limit that was enough is not enough"
        return levels

    def levels(self, limit: int) -> _Levels | None:
        """What the module's picture shows, or None if no cut keeps the limit and the rules."""
        windows = self._windows(limit)
        if windows is None:
            return None
        rules, ends = self.rules, self._ends(limit)
        nothing = int(rules.sent.sum()) + 1  # more than any cut sends
        values = np.zeros(1, dtype=rules.sent.dtype)
        levels = [values]
        for stage in reversed(range(self.num_stages)):
            here = slice(windows.first[stage], windows.last[stage] + 1)
            behind = windows.first[stage + 1]
            first = np.maximum(np.arange(here.start + 1, here.stop + 1), behind) - behind
            last = np.minimum(np.minimum(ends[here], rules.reach[stage][here]), windows.last[stage + 1]) - behind
            values = np.minimum(_least_of_each(values, first, last, nothing) + rules.sent[here], nothing)
            values[~rules.allowed[here]] = nothing
            if (values == nothing).all():
                return None
            levels.append(values)
        return _Levels(windows, levels[::-1])

    def cuts(self, levels: _Levels, limit: int) -> list[int]:
        """Of the cuts that send the least, one in which each is as near to an even share of what is left as can be."""
        prefix, cuts = self.prefix, [0]
        left_to_send = levels.least
        for stage in range(self.num_stages - 1):
            start, first = cuts[-1], levels.windows.first[stage + 1]
            end = min(bisect_right(prefix, prefix[start] + limit) - 1, int(self.rules.reach[stage][start]))
            begin = max(start + 1, first)
            places = (
                np.nonzero(levels.bytes_left[stage + 1][begin - first : end + 1 - first] == left_to_send)[0] + begin
            )
            share = bisect_left(prefix, prefix[start] + (prefix[-1] - prefix[start]) // (self.num_stages - stage))
            cut = int(places[min(int(np.searchsorted(places, share)), len(places) - 1)])
            left_to_send -= int(self.rules.sent[cut])
            cuts.append(cut)
        return [*cuts, len(prefix) - 1]

    def may_move(self, cuts: Sequence[int], index: int, place: int) -> bool:
        """Whether a cut may move there by the rules, and for the same bytes."""
        rules = self.rules
        return bool(
            rules.allowed[place]
            and rules.lowest[index] <= place <= rules.highest[index]
            and rules.sent[place] == rules.sent[cuts[index]]
            and rules.reach[index - 1][cuts[index - 1]] >= place
            and rules.reach[index][place] >= cuts[index + 1]
        )

    def _ends(self, limit: int) -> NDArray[np.int64]:
        """For each first layer of a stage, the place up to which the limit on the load lasts."""
        ends: NDArray[np.int64] = np.searchsorted(self.loads, self.loads[:-1] + limit, side="right") - 1
        return ends

    def _windows(self, limit: int) -> _Windows | None:
        """Greedy stages from the left say how far right each cut can be, greedy stages from the right how far left."""
        prefix, rules = self.prefix, self.rules
        last = [0]
        for stage in range(self.num_stages):
            start = last[-1]
            end = bisect_right(prefix, prefix[start] + limit) - 1
            last.append(min(end, int(rules.reach[stage][start]), rules.highest[stage + 1]))
        first = [len(prefix) - 1]
        for stage in reversed(range(self.num_stages)):
            by_load = bisect_left(prefix, prefix[first[-1]] - limit)
            by_memory = int(np.searchsorted(rules.reach[stage], first[-1]))
            first.append(max(by_load, by_memory, rules.lowest[stage]))
        first.reverse()
        possible = all(left <= right for left, right in zip(first, last, strict=True))
        return _Windows(first, last) if possible else None


def _least_of_each(values: Numbers, first: NDArray[np.int64], last: NDArray[np.int64], nothing: int) -> Numbers:
    """The smallest of values[first[i]] .. values[last[i]] for each i; `nothing` where there is none.

    Each window is covered by two that are a power of two long, and the smallest numbers of all windows of such a length
    come from those of half the length.
    """
    least = np.full(len(first), nothing, dtype=values.dtype)
    powers = np.frexp((last - first + 1).clip(min=0))[1] - 1  # exact logarithms; -1 where the window is empty
    length, shorter = 1, values
    for power in range(int(powers.max(initial=-1)) + 1):
        these = np.nonzero(powers == power)[0]
        least[these] = np.minimum(shorter[first[these]], shorter[last[these] - length + 1])
        shorter = np.minimum(shorter[:-length], shorter[length:])
        length *= 2
    return least


def _too_little_memory(search: _Search) -> SplitError:
    """Says how much would do: the same number of bytes more on every stage, found by binary search."""
    memory = search.rules.memory
    assert memory is not None, "pins and forbidden places that contradict each other were let through"

    def enough(extra: int) -> bool:
        rules = replace(search.rules, reach=memory.reach(extra))
        return replace(search, rules=rules).levels(search.prefix[-1]) is not None

    low, high = 1, 1
    while not enough(high):
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    limit = memory.wish.limit
    if isinstance(limit, (int, float)):
        missing = f"they allow {limit} bytes a stage, and the smallest limit that would do is {limit + low}"
    else:
        missing = f"every stage would need {low} bytes more"
    return SplitError(
        f"no cut into {search.num_stages} stages keeps the memory limits: {missing} (with the pins and forbidden cuts "
        f"as they are); use more stages, smaller micro-batches, activation checkpointing, or a schedule with "
        f"fewer live micro-batches"
    )
