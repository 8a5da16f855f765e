"""`test_comm` on working and on broken topologies."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed

import torchdistpackage.topology as topology
from torchdistpackage.errors import TopologyError, TransportError
from torchdistpackage.topology import setup_distributed, tpc
from torchdistpackage.topology.comm_check import CommReport, CommRow, _verify

pytestmark = pytest.mark.timeout(60)


def check(rank: int, world_size: int, config: list[tuple[str, float]]) -> CommReport:
    setup_distributed()
    tpc.setup_process_groups(config)
    topology.test_comm(numel=1, iterations=1)
    return topology.test_comm(numel=100, iterations=2, timeout=20)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_link_of_a_pipeline_of_any_length(world_size: int) -> None:
    reports = run_distributed(check, world_size, [("pipe", world_size)], timeout=40)
    assert reports.count(reports[0]) == world_size
    links = {row.name for row in reports[0].rows if row.operation == "send"}
    wanted = [(start, (start + 1) % world_size) for start in range(world_size)]
    wanted += [(end, start) for start, end in wanted]
    assert links == {f"link pipe {a} -> {b} (global ranks {a} -> {b})" for a, b in wanted}


def test_groups_and_links_of_a_hybrid_topology() -> None:
    report = run_distributed(check, 4, [("pipe", 2), ("data", 2)], timeout=40)[0]
    assert "link pipe 1 -> 0 (global ranks 3 -> 1)" in {row.name for row in report.rows}
    collectives = [row for row in report.rows if row.operation != "send"]
    assert len(collectives) == 3 * (1 + 2 + 2 + 2)  # global, data, pipe, model
    assert all(row.latency_us > 0 and row.bandwidth_gb_s > 0 for row in report.rows)


def test_a_world_of_one_has_nothing_to_check() -> None:
    assert run_distributed(check, 1, [("pipe", 1)], timeout=40) == [CommReport(())]


def test_the_table_is_aligned() -> None:
    rows = (
        CommRow("group pipe (global ranks 0, 1)", "all_reduce", 4, 1.0, 0.5),
        CommRow("link", "send", 400, 10.0, 5.0),
    )
    assert str(CommReport(rows)).splitlines() == [
        "what                            operation   bytes  latency us  bandwidth GB/s",
        "group pipe (global ranks 0, 1)  all_reduce      4         1.0           0.500",
        "link                            send          400        10.0           5.000",
    ]


def test_contents_are_compared() -> None:
    with pytest.raises(TransportError, match="send delivered 1 wrong values of 3"):
        _verify("send", torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]))


def verdict_without(rank: int, world_size: int, absent: int) -> tuple[str, float]:
    setup_distributed()
    tpc.setup_process_groups([("pipe", world_size)])
    start = time.monotonic()
    if rank == absent:
        return "", 0.0
    with pytest.raises(TransportError) as caught:
        topology.test_comm(timeout=1)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_does_not_call_is_named_within_the_time_out(absent: int) -> None:
    results = run_distributed(verdict_without, 3, absent, timeout=40)
    heard = [result for rank, result in enumerate(results) if rank != absent]
    assert heard[0][0] == heard[1][0]
    assert f"global rank {absent} did not take part within 1 s" in heard[0][0]
    assert max(seconds for _, seconds in heard) < 8


def verdict_with_broken_link(rank: int, world_size: int) -> str:
    setup_distributed()
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    if rank == 3:
        dist.destroy_process_group(tpc.get_group("pipe"))
    with pytest.raises(TransportError) as caught:
        topology.test_comm(numel=10, timeout=2)
    return str(caught.value)


def test_every_rank_hears_which_group_is_broken() -> None:
    verdicts = run_distributed(verdict_with_broken_link, 4, timeout=40)
    assert verdicts.count(verdicts[0]) == 4
    assert "group pipe (global ranks 2, 3)" in verdicts[0]
    assert "global ranks 0, 1" not in verdicts[0]


def verdict_with_stopped_rank(rank: int, world_size: int) -> str:
    setup_distributed()
    tpc.setup_process_groups([("pipe", world_size)])
    topology.test_comm(numel=10)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(TransportError) as caught:
        topology.test_comm(timeout=1)
    return str(caught.value)


def test_a_stopped_rank_is_named() -> None:
    verdicts = run_distributed(verdict_with_stopped_rank, 3, may_die=[1], timeout=40)
    assert verdicts[0] == verdicts[2]
    assert "global rank 1 did not take part" in verdicts[0]


def test_arguments_and_set_up_are_checked_first() -> None:
    with pytest.raises(TopologyError, match="positive"):
        topology.test_comm(numel=0)
    with pytest.raises(TopologyError, match=r"call setup_distributed\(\) first"):
        topology.test_comm()
    assert topology.test_comm.__test__ is False  # type: ignore[attr-defined]


def world_alone(rank: int, world_size: int) -> list[str]:
    setup_distributed()
    return [row.name for row in topology.test_comm(numel=10, iterations=1).rows]


def test_without_a_set_up_the_world_is_checked() -> None:
    assert set(run_distributed(world_alone, 2, timeout=40)[0]) == {"group global (global ranks 0, 1)"}
