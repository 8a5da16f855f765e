"""Rank tables: the documented layout, brute force over small worlds, and a world of 65,536 ranks."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.rank_table import RankTable, node_groups, rank_table

DOCUMENTED = [("data", 4), ("pipe", 2), ("tensor", 2)]


def test_documented_layout() -> None:
    table = rank_table(16, DOCUMENTED)
    assert table.all_groups("tensor") == tuple((first, first + 1) for first in range(0, 16, 2))
    assert table.all_groups("pipe") == ((0, 2), (4, 6), (8, 10), (12, 14), (1, 3), (5, 7), (9, 11), (13, 15))
    assert table.all_groups("data") == ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    assert table.all_groups("model") == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    assert table.all_groups("global") == (tuple(range(16)),)
    assert table.modes == ("data", "pipe", "tensor", "model", "global")


def test_data_innermost() -> None:
    table = rank_table(16, [("pipe", 2), ("tensor", 2), ("data", 4)])
    assert table.group_of("data", 5) == (4, 5, 6, 7)
    assert table.group_of("model", 5) == (1, 5, 9, 13)


def brute_force(sizes: tuple[int, ...], fixed: list[int]) -> set[tuple[int, ...]]:
    """Groups of the ranks whose coordinates in the dims `fixed` agree."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        groups.setdefault(tuple(place[dim] for dim in fixed), []).append(rank)
    return {tuple(group) for group in groups.values()}


@st.composite
def tables(draw: st.DrawFn) -> RankTable:
    dims = draw(st.permutations(["data", "pipe", "tensor", "other"]))[: draw(st.integers(1, 4))]
    config = [(name, draw(st.integers(1, 4))) for name in dims]
    return rank_table(math.prod(size for _, size in config), config, custom_dims=["other"])


@settings(max_examples=60, deadline=None)
@given(tables())
def test_groups_equal_brute_force(table: RankTable) -> None:
    for mode in table.modes:
        if mode in table.dims:
            fixed = [dim for dim, name in enumerate(table.dims) if name != mode]
        else:
            fixed = [dim for dim, name in enumerate(table.dims) if name == "data" and mode == "model"]
        groups = table.all_groups(mode)
        assert set(groups) == brute_force(table.sizes, fixed)
        assert len(groups) == len(set(groups))
        assert 0 in groups[0]
        for group in groups:
            assert table.size(mode) == len(group)
            assert [table.group_of(mode, rank) for rank in group] == [group] * len(group)
            assert [table.index(mode, rank) for rank in group] == list(range(len(group)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_moe_groups_follow_their_data_group(outer: int, dp: int, ep: int, inner: int) -> None:
    config = [("pipe", outer), ("data", dp * ep), ("tensor", inner)]
    table = rank_table(outer * dp * ep * inner, config).with_moe(moe_ep_size=ep)
    wanted: dict[str, set[tuple[int, ...]]] = {"moe_ep": set(), "moe_dp": set()}
    for group in table.all_groups("data"):
        wanted["moe_ep"] |= {group[start : start + ep] for start in range(0, dp * ep, ep)}
        wanted["moe_dp"] |= {group[start::ep] for start in range(ep)}
    for mode, groups in wanted.items():
        assert set(table.all_groups(mode)) == groups
        assert {table.group_of(mode, rank) for rank in range(table.world_size)} == groups


def test_moe_dp_size_alone_is_enough() -> None:
    table = rank_table(8, [("data", 8)])
    assert table.with_moe(moe_dp_size=2) == table.with_moe(2, 4)


def test_a_world_of_65536_ranks_is_quick() -> None:
    start = time.perf_counter()
    table = rank_table(65536, [("data", 512), ("pipe", 16), ("tensor", 8)])
    for mode in table.modes:
        assert len(table.group_of(mode, 40000)) == table.size(mode)
        assert sum(map(len, table.all_groups(mode))) == 65536
    assert time.perf_counter() - start < 2  # about 0.05 s on a quiet machine


def test_sizes_that_do_not_multiply_to_the_world() -> None:
    with pytest.raises(TopologyError, match=r"data 1 x pipe 2 = 2 ranks, but the world has 3"):
        rank_table(3, [("data", 1), ("pipe", 2)])
    with pytest.raises(TopologyError, match="set data to 4, or start 4 ranks"):
        rank_table(8, [("data", 2), ("pipe", 2)])


def test_no_data_dim() -> None:
    table = rank_table(3, [("pipe", 3)])
    assert table.group_of("pipe", 1) == table.group_of("model", 1) == (0, 1, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "empty"),
        ({}, "list of"),
        ({"pipe": 4}, r"list of \(name, size\), .*; of {'pipe': 4} pass list\(config.items\(\)\)"),
        (("pipe", 4), r"such as .*; got \('pipe', 4\): put it into a list, \[\('pipe', 4\)\]"),
        ("pipe", "list of .*; got 'pipe'"),
        (4, "list of .*; got 4"),
        ([("pipe", 2, 2)], r"list of .*; got \[\('pipe', 2, 2\)\]"),
        ([("pip", 4)], "unknown dim 'pip'"),
        ([("pp", 4)], "did you mean 'pipe'"),
        ([("pipe", 2), ("pipe", 2)], "2 times"),
        ([("pipe", 0), ("data", 4)], "at least 1, got 0"),
        ([("pipe", 4 / 3)], "whole number"),
        ([("pipe", "4")], "whole number"),
        ([("pipe", None)], "whole number"),
        ([("global", 4)], "reserved"),
        ([("pipe", 2), ("model", 2)], "leave"),
    ],
)
def test_wrong_configurations(config: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        rank_table(4, config)


def test_sizes_from_a_division() -> None:
    assert rank_table(16, [("data", 16 / 4), ("pipe", 4)]).sizes == (4, 4)


@pytest.mark.parametrize(("dp", "ep"), [(None, None), (2, 3), (3, None), (None, 5), (0, None)])
def test_moe_sizes_must_fit_the_data_size(dp: int | None, ep: int | None) -> None:
    with pytest.raises(TopologyError):
        rank_table(4, [("data", 4)]).with_moe(dp, ep)


def test_questions_about_what_is_not_there() -> None:
    table = rank_table(4, [("data", 4)])
    for mode in ("model", "moe_ep", "pipe"):
        with pytest.raises(TopologyError, match="the modes are data, global"):
            table.group_of(mode, 0)
    with pytest.raises(TopologyError, match="rank 4 is not in the world of 4"):
        table.group_of("data", 4)
    with pytest.raises(TopologyError, match="data"):
        rank_table(4, [("pipe", 4)]).with_moe(moe_ep_size=2)


def test_node_groups() -> None:
    assert node_groups(6, 3) == ((0, 1, 2), (3, 4, 5))
    with pytest.raises(TopologyError, match="6 ranks do not divide into nodes of 4"):
        node_groups(6, 4)
