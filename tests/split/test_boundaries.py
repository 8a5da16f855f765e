"""Cut points: brute force says what is best, hypothesis says where to look."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdistpackage.errors import SplitError
from torchdistpackage.split.boundaries import (
    balanced_boundaries,
    boundaries_of_sizes,
    load_balance,
    uniform_boundaries,
    uniform_sizes,
)


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [(0, *inner, num_layers) for inner in combinations(range(1, num_layers), num_stages - 1)]


def worst(costs: list[int], cuts: tuple[int, ...]) -> tuple[int, int]:
    """The worst load, then the most layers of a stage that has it."""
    return max((sum(costs[left:right]), right - left) for left, right in pairwise(cuts))


rows = st.lists(st.integers(0, 8), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


@given(rows)
def test_the_worst_load_is_the_smallest_there_is(row: tuple[list[int], int]) -> None:
    costs, num_stages = row
    cuts = balanced_boundaries(costs, num_stages)
    assert cuts in all_cuts(len(costs), num_stages)  # p + 1 increasing numbers: every stage non-empty
    assert worst(costs, cuts) == min(worst(costs, other) for other in all_cuts(len(costs), num_stages))


@given(rows)
def test_no_single_cut_can_be_moved_to_make_its_neighbours_more_even(row: tuple[list[int], int]) -> None:
    costs, num_stages = row
    cuts = balanced_boundaries(costs, num_stages)
    for left, cut, right in zip(cuts, cuts[1:], cuts[2:], strict=False):
        others = [max(sum(costs[left:other]), sum(costs[other:right])) for other in range(left + 1, right)]
        assert max(sum(costs[left:cut]), sum(costs[cut:right])) == min(others)


@given(rows, st.integers(0, 20), st.integers(0, 20))
def test_extras_load_the_ends(row: tuple[list[int], int], first: int, last: int) -> None:
    costs, num_stages = row
    loaded = list(costs)
    loaded[0] += first
    loaded[-1] += last
    cuts = balanced_boundaries(costs, num_stages, first_extra=first, last_extra=last)
    assert worst(loaded, cuts) == min(worst(loaded, other) for other in all_cuts(len(costs), num_stages))


@given(st.lists(st.floats(0, 1e300, allow_subnormal=True), min_size=1, max_size=8), st.integers(1, 3))
def test_floats_are_cut_like_the_exact_numbers_they_are(costs: list[float], num_stages: int) -> None:
    if num_stages <= len(costs):
        exact = [int(Fraction(cost) * 2**1074) for cost in costs]  # every float is a multiple of 2 ** -1074
        cuts = balanced_boundaries(costs, num_stages)
        assert cuts == balanced_boundaries(exact, num_stages)
        assert worst(exact, cuts) == min(worst(exact, other) for other in all_cuts(len(costs), num_stages))


@given(st.integers(1, 60), st.integers(1, 60))
def test_equal_costs_give_sizes_that_differ_by_one(num_layers: int, num_stages: int) -> None:
    if num_layers >= num_stages:
        for cost in (0, 1, 0.1):
            sizes = [right - left for left, right in pairwise(balanced_boundaries([cost] * num_layers, num_stages))]
            assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 200), st.integers(1, 200))
def test_uniform_sizes_differ_by_one_and_the_last_stage_gets_no_extra(num_layers: int, num_stages: int) -> None:
    if num_layers >= num_stages:
        sizes = uniform_sizes(num_layers, num_stages)
        assert sum(sizes) == num_layers
        assert len(sizes) == num_stages
        assert sorted(sizes[:-1]) == list(sizes[:-1])
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(-50, 50))
def test_extra_len_never_empties_or_overlaps_a_stage(num_layers: int, num_stages: int, extra_len: int) -> None:
    if num_layers >= num_stages:
        cuts = uniform_boundaries(num_layers, num_stages, extra_len=extra_len)
        assert cuts[0] == 0
        assert cuts[-1] == num_layers
        assert all(left < right for left, right in pairwise(cuts))
        if extra_len >= 0:
            loads = [right - left for left, right in pairwise(cuts)]
            loads[-1] += extra_len
            best = balanced_boundaries([1] * num_layers, num_stages, last_extra=extra_len)
            assert max(loads) == max(*(right - left for left, right in pairwise(best)), best[-1] - best[-2] + extra_len)


def test_uniform_pictures() -> None:
    assert uniform_sizes(7, 4) == (2, 2, 2, 1)
    assert uniform_sizes(9, 4) == (2, 2, 3, 2)
    assert uniform_sizes(5, 1) == (5,)
    assert uniform_sizes(8, 4, extra_len=-4) == (1, 1, 1, 5)
    assert uniform_boundaries(7, 4) == (0, 2, 4, 6, 7)


def test_light_layers_beside_a_heavy_one_are_evened_out() -> None:
    assert balanced_boundaries([1, 1, 1, 1, 1, 1, 10], 3) == (0, 3, 6, 7)
    assert balanced_boundaries([10, 1, 1, 1, 1, 1, 1], 3) == (0, 1, 4, 7)


@pytest.mark.parametrize("shape", ["even", "random", "rising", "one heavy", "zeros"])
def test_ten_thousand_layers_take_less_than_a_second(shape: str) -> None:
    draw = random.Random(0)
    costs = {
        "even": [1.5] * 10_000,
        "random": [draw.random() for _ in range(10_000)],
        "rising": [float(index) for index in range(10_000)],
        "one heavy": [0.1] * 9_000 + [1e6] + [0.1] * 999,
        "zeros": [0] * 10_000,
    }[shape]
    start = time.process_time()
    assert len(balanced_boundaries(costs, 64)) == 65
    assert time.process_time() - start < 1


@pytest.mark.parametrize("cost", [-1, -0.5, float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_no_cost(cost: float) -> None:
    with pytest.raises(SplitError, match=r"the cost of layer 1 is .*0 or more"):
        balanced_boundaries([1.0, cost, 1.0], 2)
    with pytest.raises(SplitError, match=r"last_extra is"):
        balanced_boundaries([1.0, 1.0], 2, last_extra=cost)


def test_fewer_layers_than_stages_says_both_numbers_and_what_to_try() -> None:
    for cut in (lambda: uniform_sizes(2, 4), lambda: balanced_boundaries([1, 1], 4), lambda: uniform_boundaries(2, 4)):
        with pytest.raises(SplitError, match=r"2 layers cannot fill 4 stages.*at most 2 stages.*smaller layers"):
            cut()


@pytest.mark.parametrize("num_stages", [0, -1])
def test_no_stages(num_stages: int) -> None:
    with pytest.raises(SplitError, match=r"num_stages must be 1 or more"):
        uniform_sizes(3, num_stages)


def test_explicit_sizes() -> None:
    assert boundaries_of_sizes([3, 2, 3], 8) == (0, 3, 5, 8)
    assert boundaries_of_sizes([0, 3, 0], 3, allow_empty=True) == (0, 0, 3, 3)
    with pytest.raises(SplitError, match=r"\[3, 2\] add up to 5, but there are 8 layers"):
        boundaries_of_sizes([3, 2], 8)
    with pytest.raises(SplitError, match=r"stage 1 has size -1"):
        boundaries_of_sizes([3, -1], 2, allow_empty=True)
    with pytest.raises(SplitError, match=r"stage 1 of sizes \[3, 0, 1\] has no layer; use 2 stages"):
        boundaries_of_sizes([3, 0, 1], 4)
    with pytest.raises(SplitError, match=r"stage 0 has size 1.5"):
        boundaries_of_sizes([1.5, 1.5], 3)  # type: ignore[list-item]


@given(rows)
def test_the_balance_of_a_cut(row: tuple[list[int], int]) -> None:
    costs, num_stages = row
    balance = load_balance(costs, balanced_boundaries(costs, num_stages))
    assert balance.worst == max(balance.loads) == min(worst(costs, cut)[0] for cut in all_cuts(len(costs), num_stages))
    assert sum(balance.loads) == sum(costs) == pytest.approx(balance.mean * num_stages)
    assert balance.imbalance == pytest.approx(balance.worst / balance.mean - 1 if balance.mean else 0)


def test_the_balance_of_what_is_no_cut() -> None:
    assert load_balance([1, 1], (0, 0, 2)).loads == (0, 2)
    for cut in [(0, 3), (1, 2), (0,), (0, 2, 1, 2)]:
        with pytest.raises(SplitError, match=r"do not cut 2 layers"):
            load_balance([1, 1], cut)
