"""What one rank pays for a large job before its first step: making its process groups, building and proving its plan.

    OMP_NUM_THREADS=1 python benchmarks/scale/bench.py

Process groups are made in worlds of up to 65,536 ranks that exist in name only (torch's fake process group), so that
what is measured (in CPU time) is what a rank computes by itself; a device mesh of the same shape stands beside it.
Plans are built, lowered and proved as a step does it the first time. Every figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from torchdistpackage.schedule import build, names

PIPE, TENSOR = 8, 8


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of this file in a new process, where nothing is cached."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def join(world: int, rank: int) -> list[tuple[str, int]]:
    """Makes this process one rank of a world without other ranks; returns the configuration of the topology."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    return [("data", world // (PIPE * TENSOR)), ("pipe", PIPE), ("tensor", TENSOR)]


def set_up_seconds(world: int, rank: int) -> float:
    """CPU seconds of the first set-up of a process."""
    from torchdistpackage import tpc

    config = join(world, rank)
    began = time.process_time()
    tpc.setup_process_groups(config)
    return time.process_time() - began


def mesh_seconds(world: int, rank: int) -> float:
    """The same dims as a device mesh of torch's own."""
    from torch.distributed.device_mesh import init_device_mesh

    config = join(world, rank)
    began = time.process_time()
    init_device_mesh("cpu", tuple(size for _, size in config), mesh_dim_names=tuple(name for name, _ in config))
    return time.process_time() - began


def set_up_memory(world: int, rank: int) -> tuple[int, int, int, int]:
    """Process groups of this rank, the ranks in them, bytes of the rank table, bytes that a second set-up keeps."""
    import torch.distributed as dist

    from torchdistpackage import tpc
    from torchdistpackage.topology.rank_table import rank_table

    config = join(world, rank)
    tpc.setup_process_groups(config)  # the first one imports and fills caches
    tpc.reset()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    table = rank_table(world, config)
    of_table = tracemalloc.get_traced_memory()[0] - before
    tpc.setup_process_groups(config)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before - of_table
    groups = [mode for mode in table.modes if mode != "global"]
    assert len(dist.distributed_c10d._world.pg_map) == len(groups) + 1  # with the world's
    return len(groups), sum(table.size(mode) for mode in groups), of_table, kept


def build_plan(name: str, p: int, m: int) -> tuple[float, int]:
    """CPU seconds to build and prove a plan, and its actions, messages included."""
    began = time.process_time()
    plan = build(name, p, m)
    return time.process_time() - began, sum(map(len, plan.actions))


def topology(worlds: list[int], repeats: int) -> None:
    """Prints the table of set-ups."""
    print(f"set-up of data x pipe {PIPE} x tensor {TENSOR}; the slowest of the first, a middle and the last rank")
    print("world    groups  members  table B  kept KiB   ms  to first  mesh / ours")
    base = 0.0
    for world in worlds:
        ranks = (0, world // 2 + 1, world - 1)
        facts = [fresh(set_up_memory, world, rank) for rank in ranks]
        groups, members, of_table, kept = map(max, zip(*facts, strict=True))
        seconds, mesh = (
            max(statistics.median(fresh(function, world, rank) for _ in range(repeats)) for rank in ranks)
            for function in (set_up_seconds, mesh_seconds)
        )
        base = base or seconds
        print(
            f"{world:<8} {groups:6} {members:8} {of_table:8} {kept / 1024:9.1f} {1e3 * seconds:5.1f} "
            f"{seconds / base:8.2f} {mesh / seconds:12.1f}",
            flush=True,
        )


def plans(sizes: list[int], repeats: int) -> None:
    """Prints the table of plans."""
    print("plans built and proved; microseconds an action, as a multiple of those at the smallest size")
    print("schedule             p      m   actions  seconds  us/action  to smallest")
    for name, factor in [*((name, 2) for name in names()), ("1f1b", 8)]:
        base = 0.0
        for p in sizes:
            runs = [fresh(build_plan, name, p, factor * p) for _ in range(repeats)]
            seconds, actions = min(runs)
            each = 1e6 * seconds / actions
            base = base or each
            print(
                f"{name:<17} {p:4} {factor * p:6} {actions:9} {seconds:8.3f} {each:10.2f} {each / base:12.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="*", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--sizes", type=int, nargs="*", default=[8, 32, 128, 256], help="ranks of a pipeline")
    parser.add_argument("--repeats", type=int, default=3, help="processes a figure; median of set-ups, best of plans")
    args = parser.parse_args()
    topology(args.worlds, args.repeats)
    plans(args.sizes, args.repeats)


if __name__ == "__main__":
    main()
