"""`tpc` over real gloo groups: membership, absent dims, meshes, repeated set-up, and faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology import (
    ParallelContext,
    find_free_port,
    is_using_pp,
    setup_distributed,
    setup_node_groups,
    tpc,
)
from torchdistpackage.topology.context import torch_parallel_context
from torchdistpackage.topology.pipeline_links import LinkSettings

pytestmark = pytest.mark.timeout(60)
STANDARD = ("data", "pipe", "tensor", "model")


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return run_distributed(function, world_size, *args, timeout=40)


def members(context: ParallelContext, mode: str) -> list[int]:
    """The ranks that really are in the group, found by communicating over it."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(context.get_group_size(mode))]
    dist.all_gather(found, torch.tensor([dist.get_rank()]), group=context.get_group(mode))
    return [int(rank) for rank in found]


def compare_all(rank: int, world_size: int, config: list[tuple[str, float]]) -> None:
    setup_distributed()
    tpc.setup_process_groups(config)
    assert tpc is torch_parallel_context
    for mode in tpc.modes:
        ranks = tpc.get_ranks_in_group(mode)
        assert members(tpc, mode) == ranks
        assert ranks in tpc.all_ranks(mode)
        assert tpc.get_group_rank(mode) == ranks.index(rank) == dist.get_rank(tpc.get_group(mode))
        assert tpc.get_group_size(mode) == len(ranks) == dist.get_world_size(tpc.get_group(mode))
        assert tpc.is_first_in_group(mode) == (rank == ranks[0])
        assert tpc.is_last_in_group(mode) == (rank == ranks[-1])
        assert tpc.get_next_global_rank(mode) == ranks[(ranks.index(rank) + 1) % len(ranks)]
        assert tpc.get_prev_global_rank(mode) == ranks[ranks.index(rank) - 1]
        assert tpc.is_first_group(mode) == (ranks == tpc.all_ranks(mode)[0])
        assert tpc.is_mode_inited(mode) == (len(ranks) > 1)
        assert tpc._is_inited(mode)
    for name, mode in (("tensor", "tensor"), ("pipeline", "pipe"), ("data", "data"), ("model", "model")):
        assert getattr(tpc, f"is_first_in_{name}_group")() == tpc.is_first_in_group(mode)
        assert getattr(tpc, f"is_last_in_{name}_group")() == tpc.is_last_in_group(mode)
    assert tpc.all_dp_ranks() == tpc.all_ranks("data")
    assert (tpc.get_group("global"), is_using_pp()) == (None, tpc.get_pp_size() > 1)
    groups = [tpc.get_group(mode) for mode in tpc.modes]
    assert len({id(group) for group in groups}) == len(groups)  # none is shared, not even over equal ranks


@pytest.mark.parametrize(
    "config",
    [
        [("data", 2), ("pipe", 2)],
        [("pipe", 4)],
        [("data", 4)],
        [("tensor", 2), ("data", 2.0), ("pipe", 1)],
        [("data", 1), ("pipe", 2), ("tensor", 2)],
    ],
)
def test_groups_hold_the_ranks_they_say(config: list[tuple[str, float]]) -> None:
    run(compare_all, 4, config)


def pipe_only(rank: int, world_size: int) -> None:
    setup_distributed()
    tpc.setup_process_groups([("pipe", world_size)])
    for mode in ("data", "tensor"):
        assert (tpc.get_group_size(mode), tpc.get_group_rank(mode), tpc.get_ranks_in_group(mode)) == (1, 0, [rank])
        assert tpc.is_first_in_group(mode)
        assert tpc.is_last_in_group(mode)
        assert not tpc.is_mode_inited(mode)
        assert tpc.get_next_global_rank(mode) == tpc.get_prev_global_rank(mode) == rank
        with pytest.raises(TopologyError, match=f"'{mode}' is not initialized; the modes are pipe, model, global"):
            tpc.get_group(mode)
    assert tpc.is_first_in_data_group()
    assert tpc.is_last_in_tensor_group()
    assert (tpc.get_dp_rank(), tpc.get_dp_size(), tpc.get_tp_rank(), tpc.get_tp_size()) == (0, 1, 0, 1)
    assert (tpc.get_pp_rank(), tpc.get_pp_size(), tpc.get_mp_rank(), tpc.get_mp_size()) == (rank, 2, rank, 2)
    assert tpc.is_first_in_pipeline_group() == tpc.is_first_in_model_group() == (rank == 0)
    assert tpc.all_dp_ranks() == [[0], [1]]
    for mode in ("pip", "moe_ep"):
        with pytest.raises(TopologyError, match="not initialized"):
            tpc.get_group_size(mode)


def test_pipe_only_needs_no_data_dim() -> None:
    run(pipe_only, 2)


def wrong_product(rank: int, world_size: int) -> str:
    setup_distributed()
    with pytest.raises(TopologyError) as caught:
        tpc.setup_process_groups([("data", 1), ("pipe", 2)])
    assert not tpc._is_inited("pipe")
    return str(caught.value)


def test_a_wrong_product_raises_on_every_rank() -> None:
    message = "data 1 x pipe 2 = 2 ranks, but the world has 3; set pipe to 3, or start 2 ranks"
    assert run(wrong_product, 3) == [message] * 3


def ranks_disagree(rank: int, world_size: int) -> str:
    setup_distributed()
    with pytest.raises(TopologyError) as caught:
        tpc.setup_process_groups([("pipe", 2)] if rank == 0 else [("data", 2)])
    return str(caught.value)


def test_ranks_that_ask_for_different_groups_hear_it() -> None:
    messages = run(ranks_disagree, 2)
    assert "groups of 2 in pipe 2" in messages[0]
    assert "groups of 2 in data 2" in messages[1]


def set_up_again(rank: int, world_size: int, ports: list[str]) -> None:
    for port in ports:  # a quick rank would else find the store of the first world again
        setup_distributed(port=port)
        for config in ([("pipe", 4)], [("data", 2), ("pipe", 2)], [("data", 2), ("pipe", 2)], [("tensor", 4)]):
            tpc.setup_process_groups(config)
            assert all(members(tpc, mode) == tpc.get_ranks_in_group(mode) for mode in tpc.modes)
            assert tpc.is_mode_inited("pipe") == ("pipe" in dict(config))
        tpc.reset()
        assert not tpc._is_inited("tensor")
        tpc.setup_process_groups([("data", 4)])
        dist.barrier()
        dist.destroy_process_group()
        assert not tpc.is_mode_inited("data")
        with pytest.raises(TopologyError, match="not set up"):
            tpc.get_dp_rank()


def test_repeated_set_up_replaces_the_former() -> None:
    run(set_up_again, 4, [find_free_port(), find_free_port()])


def groups_made_before(rank: int, world_size: int) -> None:
    setup_distributed()
    for _ in range(2):  # members and others now know of different numbers of groups
        dist.new_group([0, 1])
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    assert all(members(tpc, mode) == tpc.get_ranks_in_group(mode) for mode in tpc.modes)
    second = ParallelContext()
    second.setup_process_groups([("pipe", 2), ("data", 2)])
    assert members(second, "pipe") == tpc.get_ranks_in_group("data") == members(tpc, "data")


def test_groups_of_the_user_and_a_second_context_do_not_interfere() -> None:
    run(groups_made_before, 4)


def nothing_set_up(rank: int, world_size: int) -> None:
    for question in (lambda: tpc.get_pp_rank(), lambda: tpc.get_group("pipe"), lambda: tpc.mesh, lambda: tpc.modes):
        with pytest.raises(TopologyError, match=r"setup_distributed\(\) and then tpc.setup_process_groups"):
            question()
    for setup in (lambda: tpc.setup_process_groups([("pipe", 1)]), lambda: setup_node_groups(1)):
        with pytest.raises(TopologyError, match="setup_distributed"):
            setup()
    assert not tpc.is_mode_inited("pipe")
    assert not tpc._is_inited("no such")
    assert not is_using_pp()
    tpc.reset()


def test_questions_before_set_up() -> None:
    run(nothing_set_up, 1)


def groups_of_one(rank: int, world_size: int) -> None:
    setup_distributed()
    tpc.setup_process_groups([("data", 1), ("pipe", 2)])
    model = DistributedDataParallel(torch.nn.Linear(2, 2), process_group=tpc.get_group("data"))
    model(torch.ones(1, 2)).sum().backward()
    assert model.module.weight.grad is not None


def test_a_group_of_one_works_with_ddp() -> None:
    run(groups_of_one, 2)


def make_mesh(rank: int, world_size: int) -> None:
    setup_distributed()
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    mesh = tpc.mesh
    assert mesh is tpc.mesh
    assert mesh.mesh_dim_names == ("data", "pipe")
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert mesh.get_group("pipe") is tpc.get_group("pipe")
    assert mesh["data"].get_local_rank() == tpc.get_dp_rank()
    tpc.setup_from_mesh(mesh)  # its own: nothing to do
    assert ParallelContext.from_mesh(mesh).get_group("data") is tpc.get_group("data")
    assert members(tpc, "data") == tpc.get_ranks_in_group("data")


def test_the_mesh_has_the_groups_of_tpc() -> None:
    run(make_mesh, 4)


def use_mesh(rank: int, world_size: int) -> None:
    setup_distributed()
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "pp", "cp"))
    tpc.setup_from_mesh(mesh)
    assert tpc.modes == ("data", "pipe", "cp", "model", "global")
    assert tpc.mesh is mesh
    assert tpc.get_group("pipe") is mesh.get_group("pp")
    assert all(members(tpc, mode) == tpc.get_ranks_in_group(mode) for mode in tpc.modes)
    tpc.reset()
    dist.all_reduce(torch.ones(1), group=mesh.get_group("dp"))  # the mesh keeps its groups
    with pytest.raises(TopologyError, match="pass the whole mesh"):
        tpc.setup_from_mesh(mesh["pp"])
    with pytest.raises(TopologyError, match="no dim names"):
        tpc.setup_from_mesh(init_device_mesh("cpu", (4,)))


def test_tpc_from_an_existing_mesh() -> None:
    run(use_mesh, 4)


def moe(rank: int, world_size: int) -> None:
    setup_distributed()
    tpc.setup_process_groups([("data", 4)])
    with pytest.raises(TopologyError, match="build_moe_groups"):
        tpc.get_group("moe_ep")
    with pytest.raises(TopologyError, match="data size 4"):
        tpc.build_moe_groups()
    for ep_size, ep_group in ((2, [[0, 1], [2, 3]]), (4, [[0, 1, 2, 3]])):
        tpc.build_moe_groups(moe_ep_size=ep_size)
        assert tpc.all_ranks("moe_ep") == ep_group
        assert tpc.is_mode_inited("moe_dp") == (ep_size == 2)
        for mode in ("moe_ep", "moe_dp"):
            assert members(tpc, mode) == tpc.get_ranks_in_group(mode)


def test_moe_groups() -> None:
    run(moe, 4)


def nodes(rank: int, world_size: int) -> list[int] | None:
    setup_distributed()
    assert setup_node_groups() is None
    assert tpc.setup_node_groups(3) is None
    with pytest.raises(TopologyError, match="at least 1"):
        setup_node_groups(0)
    group = setup_node_groups(num_per_node=2)
    return None if group is None else dist.get_process_group_ranks(group)


def test_node_groups() -> None:
    assert run(nodes, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def control(rank: int, world_size: int) -> None:
    setup_distributed()
    tpc.setup_process_groups([("pipe", 2)])
    assert tpc.get_control_group() is tpc.get_group("pipe")
    assert tpc.get_control_group("global") is dist.group.WORLD
    # A group without a CPU backend, such as NCCL's.
    device_only = dist.new_group([0, 1], backend="cuda:gloo")
    context = ParallelContext.from_mesh(
        DeviceMesh.from_group([device_only], "cpu", mesh=torch.arange(2), mesh_dim_names=("pipe",))
    )
    assert context.get_group("pipe") is device_only is not context.get_control_group("pipe")
    assert context.get_control_group("pipe") is context.get_control_group("pipe")
    total = torch.ones(1)
    dist.all_reduce(total, group=context.get_control_group("pipe"))
    assert total == 2


def test_the_control_group_moves_cpu_tensors() -> None:
    run(control, 2)


def short_timeout(rank: int, world_size: int) -> bool:
    setup_distributed()
    tpc.setup_process_groups([("pipe", 2)], timeout=0.5)
    if rank == 0:
        with pytest.raises(RuntimeError):
            dist.recv(torch.zeros(1), 1, group=tpc.get_group("pipe"))
    return True


def test_the_time_out_reaches_the_groups() -> None:
    assert run(short_timeout, 2) == [True, True]


def different_numbers_of_groups(rank: int, world_size: int) -> str:
    setup_distributed()
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    with pytest.raises(TopologyError) as caught:
        tpc.setup_process_groups([("pipe", 2)])
    return str(caught.value)


def test_ranks_that_made_different_numbers_of_groups_hear_it() -> None:
    messages = run(different_numbers_of_groups, 2)
    assert all("made different numbers of process groups before" in message for message in messages)


def group_that_the_user_destroys(rank: int, world_size: int) -> None:
    setup_distributed("cpu:gloo")
    for _ in range(2):
        tpc.setup_process_groups([("pipe", 1)])
        dist.destroy_process_group(tpc.get_group("pipe"))
    tpc.reset()
    assert not tpc._is_inited("pipe")


def test_a_group_that_the_user_has_destroyed_is_no_trouble() -> None:
    run(group_that_the_user_destroys, 1)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_watchdog_has_some_patience(seconds: float) -> None:
    with pytest.raises(TopologyError, match=f"watchdog must be a positive number of seconds, got {seconds}"):
        LinkSettings(watchdog=seconds)
