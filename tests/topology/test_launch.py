"""`setup_distributed` under torchrun, SLURM and alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology import find_free_port, setup_distributed
from torchdistpackage.topology.launch import _expand_nodes, _find_launch

TORCHRUN = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
NOTHING: dict[str, str | None] = dict.fromkeys(TORCHRUN)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_NODELIST": "node[03-04]", "PATH": ""}


def launch_twice(rank: int, world_size: int, arguments: dict[str, object]) -> tuple[object, ...]:
    first = setup_distributed(**arguments)  # type: ignore[arg-type]
    assert setup_distributed(**arguments) == first  # type: ignore[arg-type]
    found_rank, found_size, port, addr = first
    assert (dist.get_rank(), dist.get_world_size()) == (found_rank, found_size) == (rank, world_size)
    return port, addr, dist.get_backend(), port == int(os.environ.get("MASTER_PORT", port))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world_size", [2, 4])
def test_torchrun_environment_on_cpu(world_size: int) -> None:
    results = run_distributed(launch_twice, world_size, {"timeout": 30}, timeout=40)
    assert {result[1:] for result in results} == {("127.0.0.1", "gloo", True)}


@pytest.mark.timeout(60)
def test_two_backends_and_a_port() -> None:
    port = int(find_free_port())
    arguments = {"backend": "cpu:gloo", "port": port, "timeout": timedelta(seconds=30)}
    results = run_distributed(launch_twice, 2, arguments, timeout=40)
    assert [result[0] for result in results] == [port, port]


def launch_alone(rank: int, world_size: int) -> tuple[object, ...]:
    launch = setup_distributed()
    return launch.rank, launch.world_size, launch.addr, launch.port > 0, [name in os.environ for name in TORCHRUN]


@pytest.mark.timeout(60)
def test_a_single_process_needs_no_environment_and_leaves_none() -> None:
    env = NOTHING | dict.fromkeys(name for name in os.environ if name.startswith("SLURM_"))
    assert run_distributed(launch_alone, 1, env=env, timeout=40) == [(0, 1, "127.0.0.1", True, [False] * 5)]


def launch_by_slurm(rank: int, world_size: int, fake_bin: str) -> tuple[object, ...]:
    for name in TORCHRUN:
        os.environ.pop(name, None)
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world_size), "SLURM_LOCALID": str(rank)}
    os.environ |= {"SLURM_NODELIST": "some[1-2]", "PATH": fake_bin + os.pathsep + os.environ["PATH"]}
    launch = setup_distributed(port=os.environ["TEST_PORT"])
    return (*launch, [os.environ[name] for name in TORCHRUN])


@pytest.mark.timeout(60)
def test_slurm_asks_scontrol_for_the_first_host(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames some[1-2]" ] && echo 127.0.0.1 && echo other\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    port = find_free_port()
    results = run_distributed(launch_by_slurm, 2, str(tmp_path), env={"TEST_PORT": port}, timeout=40)
    exported = [[str(rank), "2", str(rank), "127.0.0.1", port] for rank in range(2)]
    assert results == [(rank, 2, int(port), "127.0.0.1", exported[rank]) for rank in range(2)]


@pytest.mark.parametrize("answer", ["exit 1", "echo"])
def test_an_scontrol_that_does_not_know_leaves_the_node_list_to_us(tmp_path: Path, answer: str) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n{answer}\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert _find_launch(SLURM, None).launch.addr == "node03"


def test_slurm_variables_without_scontrol() -> None:
    plan = _find_launch(SLURM | {"SLURM_LOCALID": "1"}, None)
    assert (plan.launch, plan.local_rank) == ((1, 4, 54647, "node03"), 1)
    assert _find_launch(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, None).launch[2:] == (1234, "head")
    assert _find_launch(SLURM | {"MASTER_PORT": "1234"}, 99).launch.port == 99


def test_complete_torchrun_variables_win_over_slurm() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    assert _find_launch(SLURM | torchrun, None).launch == (0, 2, 29500, "here")
    assert _find_launch(SLURM | {"WORLD_SIZE": "2"}, None).launch == (1, 4, 54647, "node03")


def test_the_store_of_torchrun_keeps_its_port() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    assert _find_launch(torchrun, 99).launch.port == 99
    assert _find_launch(torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, 99).launch.port == 29500


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "RANK, MASTER_PORT missing"),
        ({"SLURM_PROCID": "0"}, "SLURM_NTASKS, SLURM_NODELIST missing"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "rank 2 of 2"),
    ],
)
def test_incomplete_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        _find_launch(environment, None)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],other", ["node01", "node02", "node03", "node07", "other"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("a-b.c,d[8-11]", ["a-b.c", "d8", "d9", "d10", "d11"]),
    ],
)
def test_node_lists(nodes: str, hosts: list[str]) -> None:
    assert _expand_nodes(nodes) == hosts


@pytest.mark.parametrize("nodes", ["", "node[1-", "node[1-x]", "node]", "node[-1]"])
def test_unreadable_node_lists(nodes: str) -> None:
    with pytest.raises(TopologyError, match="MASTER_ADDR"):
        _expand_nodes(nodes)


def launch_differently(rank: int, world_size: int) -> None:
    setup_distributed("gloo", timeout=30)
    for other in ({"backend": "mpi"}, {"port": 1}, {"timeout": 31}):
        with pytest.raises(TopologyError, match="runs already"):
            setup_distributed(**other)  # type: ignore[arg-type]
    assert setup_distributed() == setup_distributed("cpu:gloo", timeout=timedelta(seconds=30))


@pytest.mark.timeout(60)
def test_a_second_call_that_asks_for_something_else() -> None:
    run_distributed(launch_differently, 1, timeout=40)


def launch_after_somebody_else(rank: int, world_size: int) -> tuple[object, ...]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return tuple(setup_distributed())


@pytest.mark.timeout(60)
def test_a_world_that_was_initialised_by_the_user() -> None:
    assert run_distributed(launch_after_somebody_else, 1, env=NOTHING, timeout=40) == [(0, 1, 0, "")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_nccl_without_cuda() -> None:
    with pytest.raises(TopologyError, match="gloo"):
        setup_distributed("nccl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": "x"}, "port must be a whole number, got 'x'"),
        ({"backend": "glooo"}, "backend 'glooo': torch does not know 'glooo'; it has gloo, "),
        ({"backend": "cpu:gloo,cuda:ncl"}, "torch does not know 'ncl'"),
        ({"timeout": 0}, "must be positive, got 0"),
        ({"timeout": float("inf")}, "finite number of seconds, got inf"),
        ({"timeout": "60"}, "finite number of seconds, got '60'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        setup_distributed(**arguments)  # type: ignore[arg-type]


def test_find_free_port() -> None:
    port = find_free_port()
    assert isinstance(port, str)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(port)))


RESTARTED = """
import os, sys, torch, torch.distributed as dist
from torchdistpackage import setup_distributed, tpc

setup_distributed(backend="gloo")
tpc.setup_process_groups([("pipe", 3)])
value = torch.ones(1)
dist.all_reduce(value, group=tpc.get_group("pipe"))
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < 2 and dist.get_rank() == attempt:
    os._exit(1)
dist.barrier()
print(f"attempt {attempt} sum {value.item()}\\n", end="", flush=True)
"""


@pytest.mark.timeout(150)
def test_ranks_that_torchrun_restarts_find_each_other(tmp_path: Path) -> None:
    """Its store keeps what the ended processes have said of their addresses."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    options = ["--standalone", "--nproc-per-node", "3", "--max-restarts", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("attempt 2 sum 3.0") == 3
