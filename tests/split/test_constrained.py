"""Cuts that keep to rules: brute force over all cuts says which is the best."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistpackage.errors import SplitError
from torchdistpackage.split.boundaries import MemoryLimit, balanced_boundaries
from torchdistpackage.split.constrained import constrained_cuts
from torchdistpackage.split.constraints import make_rules

unhurried = settings(deadline=None)  # the machine may be busy


@dataclass(frozen=True)
class Case:
    costs: list[int]
    num_stages: int
    wishes: dict[str, Any] = field(default_factory=dict)

    def keeps(self, cuts: tuple[int, ...]) -> bool:
        stages = list(pairwise(cuts))
        pins, memory = self.wishes.get("stage_of") or {}, self.wishes.get("memory")
        fits = memory is None or all(
            sum(memory.static[left:right]) + live * sum(memory.activations[left:right]) <= limit
            for (left, right), live, limit in zip(stages, memory.live, memory.limit, strict=True)
        )
        pinned = all(stages[stage][0] <= layer < stages[stage][1] for layer, stage in pins.items())
        return fits and pinned and not {*cuts} & {*self.wishes.get("forbidden", ())}

    def cuts(self) -> Iterator[tuple[int, ...]]:
        for inner in combinations(range(1, len(self.costs)), self.num_stages - 1):
            if self.keeps(cuts := (0, *inner, len(self.costs))):
                yield cuts

    def worst(self, cuts: tuple[int, ...]) -> tuple[int, int]:
        return max((sum(self.costs[left:right]), right - left) for left, right in pairwise(cuts))

    def sent(self, cuts: tuple[int, ...]) -> int:
        numbers = self.wishes.get("cut_bytes") or [0] * len(self.costs)
        return sum(numbers[cut - 1] for cut in cuts[1:-1])

    def rank(self, cuts: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
        return self.sent(cuts), self.worst(cuts)

    def best(self) -> tuple[int, tuple[int, int]] | None:
        possible = list(self.cuts())
        if not possible:
            return None
        most = min(self.worst(cuts)[0] for cuts in possible) * (1 + Fraction(self.wishes.get("slack", 0)))
        return min(self.rank(cuts) for cuts in possible if self.worst(cuts)[0] <= most)


def numbers(size: int, largest: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, largest), min_size=size, max_size=size)


@st.composite
def cases(draw: st.DrawFn, *, wishes: str = "bytes forbidden pins memory") -> Case:
    n = draw(st.integers(1, 9))
    p = draw(st.integers(1, min(n, 5)))
    case = Case(draw(numbers(n, 6)), p, {})
    if "bytes" in wishes and draw(st.booleans()):
        case.wishes["cut_bytes"] = draw(numbers(n - 1, 3))
        case.wishes["slack"] = draw(st.sampled_from([0, 0.25, 0.5, 1.0, 10.0]))
    if "forbidden" in wishes and n > 1:
        case.wishes["forbidden"] = draw(st.sets(st.integers(1, n - 1), max_size=n // 2))
    if "pins" in wishes:
        case.wishes["stage_of"] = draw(st.dictionaries(st.integers(0, n - 1), st.integers(0, p - 1), max_size=2))
    if "memory" in wishes and draw(st.booleans()):
        limit = draw(st.lists(st.integers(2, 25), min_size=p, max_size=p))
        case.wishes["memory"] = MemoryLimit(limit, draw(numbers(n, 4)), draw(numbers(n, 3)), draw(numbers(p, 3)))
    return case


@settings(max_examples=600, deadline=None)
@given(cases())
def test_of_all_cuts_that_keep_the_rules_the_best_is_found(case: Case) -> None:
    best = case.best()
    if best is None:
        with pytest.raises(SplitError):
            balanced_boundaries(case.costs, case.num_stages, **case.wishes)
    else:
        cuts = balanced_boundaries(case.costs, case.num_stages, **case.wishes)
        assert cuts in set(case.cuts())
        assert case.rank(cuts) == best


@unhurried
@given(cases())
def test_no_single_cut_can_be_moved_within_the_rules_to_even_out_its_neighbours(case: Case) -> None:
    if case.best() is not None:
        cuts = balanced_boundaries(case.costs, case.num_stages, **case.wishes)
        for index in range(1, case.num_stages):
            left, cut, right = cuts[index - 1 : index + 2]
            for other in range(left + 1, right):
                moved = (*cuts[:index], other, *cuts[index + 1 :])
                if case.keeps(moved) and case.sent(moved) == case.sent(cuts):
                    assert max(sum(case.costs[left:cut]), sum(case.costs[cut:right])) <= max(
                        sum(case.costs[left:other]), sum(case.costs[other:right])
                    )


@unhurried
@given(cases(wishes=""), st.integers(0, 3), st.sampled_from([0, 0.5, 3]))
def test_rules_that_forbid_nothing_change_nothing(case: Case, same: int, slack: float) -> None:
    n, p = len(case.costs), case.num_stages
    free = MemoryLimit(math.inf, [1] * n, [1] * n, 1)
    expected = balanced_boundaries(case.costs, p)
    assert balanced_boundaries(case.costs, p, slack=slack) == expected
    assert balanced_boundaries(case.costs, p, slack=slack, cut_bytes=[same] * (n - 1)) == expected
    assert balanced_boundaries(case.costs, p, memory=free) == expected
    assert balanced_boundaries(case.costs, p, stage_of={0: 0, n - 1: p - 1}) == expected


@unhurried
@given(cases(wishes="bytes memory"))
def test_numbers_that_no_machine_word_holds(case: Case) -> None:
    """Python's integers do as well as numpy's: everything times 2 ** 70."""
    large, wishes = 2**70, dict(case.wishes)
    if "cut_bytes" in wishes:
        wishes["cut_bytes"] = [number * large for number in wishes["cut_bytes"]]
    if memory := wishes.get("memory"):
        scaled = ([number * large for number in row] for row in (memory.limit, memory.static, memory.activations))
        wishes["memory"] = MemoryLimit(*scaled, memory.live)
    if case.best() is not None:
        cuts = balanced_boundaries([cost * large for cost in case.costs], case.num_stages, **wishes)
        assert case.keeps(cuts)
        assert case.rank(cuts) == case.best()


@unhurried
@given(cases(wishes="forbidden pins memory"))
def test_too_little_memory_says_how_much_would_do(case: Case) -> None:
    memory = case.wishes.pop("memory", None)
    if memory is None or case.best() is None:
        return
    limit = memory.limit[0]

    def cut(limit: int) -> tuple[int, ...]:
        same = MemoryLimit(limit, memory.static, memory.activations, memory.live)
        return balanced_boundaries(case.costs, case.num_stages, **case.wishes, memory=same)

    try:
        cut(limit)
    except SplitError as error:
        enough = int(str(error).split("would do is ")[1].split()[0])
        assert cut(enough)
        with pytest.raises(SplitError, match=rf"allow {enough - 1} bytes a stage.* would do is {enough} "):
            cut(enough - 1)


def test_the_layers_and_the_extras_count_for_load_alone() -> None:
    memory = MemoryLimit([10, 4], [1] * 4, [1] * 4, [2, 1])
    assert balanced_boundaries([1] * 4, 2, last_extra=10, memory=memory) == (0, 3, 4)
    assert balanced_boundaries([1] * 4, 2, first_extra=10, memory=memory) == (0, 2, 4)  # stage 1 is full with two


def test_cheap_cuts_are_worth_as_much_load_as_the_slack_says() -> None:
    sent = [9, 1, 9, 5, 9, 9, 0]
    for slack, cuts in [(0, (0, 4, 8)), (0.49, (0, 4, 8)), (0.5, (0, 2, 8)), (0.74, (0, 2, 8)), (0.75, (0, 7, 8))]:
        assert balanced_boundaries([1] * 8, 2, cut_bytes=sent, slack=slack) == cuts


def test_a_stage_that_cannot_hold_one_layer_may_be_placed_elsewhere() -> None:
    """Places that stage 1 can reach are not all between its first and its last: layer 2 alone is too large for it."""
    memory = MemoryLimit([9, 2, 9], [1, 1, 5, 1, 1], [0] * 5, [1, 1, 1])
    assert balanced_boundaries([9, 9, 1, 1, 1], 3, memory=memory) == (0, 1, 2, 5)
    assert balanced_boundaries([1, 1, 1, 9, 9], 3, memory=memory) == (0, 3, 4, 5)
    assert balanced_boundaries([1, 1, 1, 9, 9], 3, memory=memory, stage_of={2: 2}) == (0, 1, 2, 5)


@pytest.mark.parametrize("pins", [{5: 0, 3: 1}, {0: 1}, {9: 2}, {4: 1, 5: 3}, {1: 2}, {10: 0}, {2: 4}, {-1: 3}])
def test_pins_that_contradict_each_other(pins: dict[int, int]) -> None:
    words = r"layer -?\d+ is .* stage"
    with pytest.raises(SplitError, match=words):
        balanced_boundaries([1] * 10, 4, stage_of=pins)


def test_messages_name_the_pins_the_places_and_what_to_try() -> None:
    with pytest.raises(SplitError, match=r"layer 3 is pinned to stage 1 and layer 5 is pinned to stage 0, but"):
        balanced_boundaries([1] * 10, 4, stage_of={5: 0, 3: 1})
    message = r"layer 0 .* stage 0 and layer 9 .* last stage: that takes 3 cuts.*only 2 places \(7 more are forbidden\)"
    with pytest.raises(SplitError, match=message):
        balanced_boundaries([1] * 10, 4, forbidden=range(1, 8))
    with pytest.raises(SplitError, match=r"every stage would need 1 bytes more .*more stages, smaller micro-batches"):
        balanced_boundaries([1] * 4, 2, memory=MemoryLimit([3, 5], [0] * 4, [2] * 4, [2, 1]))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"cut_bytes": [1, 2, 3]}, r"3 cut_bytes were given for 3 layers; .* the 2 places"),
        ({"cut_bytes": [1, -2]}, r"cut_bytes\[1\] is -2"),
        ({"slack": -0.1}, r"slack is -0.1"),
        ({"slack": math.nan}, r"slack is nan"),
        ({"forbidden": [3]}, r"forbidden has 3, but 3 layers can be cut at 1 to 2"),
        ({"memory": MemoryLimit(9, [1] * 2, [1] * 3, 1)}, r"static has 2 numbers and memory.activations 3"),
        ({"memory": MemoryLimit([9], [1] * 3, [1] * 3, 1)}, r"memory.limit has 1 numbers for 2 stages"),
        ({"memory": MemoryLimit(9, [1] * 3, [1] * 3, [2, 1, 0])}, r"memory.live has 3 numbers for 2 stages"),
        ({"memory": MemoryLimit(9, [1] * 3, [1] * 3, [1.5, 1])}, r"memory.live is \[1.5, 1\]"),
        ({"memory": MemoryLimit(9, [1, math.nan, 1], [1] * 3, 1)}, r"memory.static\[1\] is nan"),
        ({"memory": MemoryLimit(-1, [1] * 3, [1] * 3, 1)}, r"memory.limit\[0\] is -1"),
        ({"memory": MemoryLimit(9, [1] * 3, [1, 1, -3], 1)}, r"memory.activations\[2\] is -3"),
    ],
)
def test_malformed_wishes(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        balanced_boundaries([1, 1, 1], 2, **wishes)


def test_one_number_for_all_stages_may_come_from_numpy() -> None:
    memory = MemoryLimit(np.int64(4), np.array([1, 1, 1, 1]), np.array([0.5] * 4), np.int64(2))
    assert balanced_boundaries([5, 1, 1, 1], 2, memory=memory) == (0, 2, 4)


def test_the_search_agrees_with_the_greedy_one_on_a_long_row() -> None:
    draw = random.Random(1)
    costs = [draw.randint(0, 99) for _ in range(500)]
    prefix = list(accumulate((cost * 501 + 1 for cost in costs), initial=0))
    for p in (1, 2, 7, 32):
        rules = make_rules(500, p, None, (), {}, None)
        assert tuple(constrained_cuts(prefix, p, rules, Fraction(0))) == balanced_boundaries(costs, p)


@pytest.mark.parametrize("shape", ["even", "random", "one heavy"])
def test_ten_thousand_layers_with_everything_to_keep_to(shape: str) -> None:
    draw, n, p = random.Random(0), 10_000, 64
    costs = {"even": [1.5] * n, "random": [draw.random() for _ in range(n)], "one heavy": [0.1] * 9_999 + [1e6]}[shape]
    memory = MemoryLimit([3 * n / p] * p, [1.0] * n, [draw.random() / p for _ in range(n)], list(range(p, 0, -1)))
    rules = {"forbidden": [c for c in range(1, n) if c % 3], "stage_of": {i * n // 9: i * p // 9 for i in range(9)}}
    start = time.process_time()
    sent = [draw.randint(1, 10**9) for _ in range(n - 1)]
    assert len(balanced_boundaries(costs, p, cut_bytes=sent, slack=0.3, memory=memory, **rules)) == p + 1
    assert time.process_time() - start < 2
