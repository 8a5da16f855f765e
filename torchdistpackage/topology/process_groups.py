"""Makes torch process groups without surprises: the one place that calls `torch.distributed.new_group`.

A rank creates only the groups that it is in (`use_local_synchronization=True`): at 65,536 ranks, walking all groups of
all modes on every rank would be the slowest part of start-up. That way has two traps in torch, which live here alone:

* torch hashes a local group's name from its ranks and from how many groups this process has made (torch 2.15) or has
  registered (2.6 to 2.13). Ranks that disagree on the number wait for each other under different names until the
  time-out. So the ranks compare their numbers first, and walk all groups together, the slow way, if they differ.
* Before 2.15 destroying a group lowers the number, so that a name comes again and leads to the dead group's addresses
  in the store; and freeing a gloo group can block for ever. There, old groups live as long as their world.

Every mode gets a process group of its own, even where two modes have equal ranks (with pipe only, "pipe" and "model").
A shared one would be a single queue: on NCCL a norm's all-reduce would wait behind receives that were posted ahead for
the pipe, on some ranks but not on others, and the step would deadlock. A communicator that is not used costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.connections import note_sockets
from torchdistpackage.topology.rank_table import RankTable, node_groups

__all__ = [
    "as_timedelta",
    "communication_device",
    "control_group",
    "create_groups",
    "destroy_groups",
    "edge_groups",
    "initialised_world",
    "moves_cpu_tensors",
    "setup_node_groups",
]

_CAN_DESTROY = torch.__version__ >= "2.15"  # the second trap above; TorchVersion compares as versions do


def create_groups(
    memberships: dict[str, tuple[RankTable, str]],
    *,
    timeout: timedelta | float | None = None,
    backend: str | None = None,
) -> dict[str, dist.ProcessGroup]:
    """Create this rank's process group for each entry. Every rank of the world calls it with the same entries.

    Args:
        memberships: for each result's key, the table and its mode.
        timeout: of the groups' operations, also as seconds; None for the world's.
        backend: None for the world's.

    Returns:
        The group of this rank, by key.

    Raises:
        TopologyError: the ranks ask for different groups, or made different numbers of groups before.
    """
    local = _agree_on_local_creation(", ".join(_describe(key, *entry) for key, entry in memberships.items()))
    rank = dist.get_rank()
    groups: dict[str, dist.ProcessGroup] = {}
    for key, (table, mode) in memberships.items():
        for ranks in [table.group_of(mode, rank)] if local else table.all_groups(mode):
            with note_sockets() as made:
                group = dist.new_group(
                    list(ranks),
                    timeout=as_timedelta(timeout) or _world_timeout(),
                    backend=backend,
                    use_local_synchronization=local,
                    group_desc=f"torchdistpackage:{key}",
                )
                if rank in ranks:
                    groups[key] = cast(dist.ProcessGroup, group)
                    made.append(groups[key])
    return groups


def destroy_groups(groups: Sequence[dist.ProcessGroup]) -> None:
    """Destroy groups of the present world where torch allows it; groups that are gone already are left alone."""
    for group in groups if _CAN_DESTROY else ():
        try:
            dist.destroy_process_group(group)
        except (ValueError, AssertionError, KeyError, RuntimeError):
            continue  # destroyed by its owner, or with its world


def control_group(table: RankTable, mode: str, timeout: timedelta | float | None = None) -> dist.ProcessGroup:
    """A gloo group over the same ranks as the group of `mode`, for CPU tensors next to an NCCL group."""
    return create_groups({f"{mode}:control": (table, mode)}, timeout=timeout, backend="gloo")[f"{mode}:control"]


def edge_groups(
    table: RankTable, group: dist.ProcessGroup, timeout: timedelta | float | None = None
) -> dict[str, dist.ProcessGroup]:
    """Two more groups of a pipeline's ranks, one for each direction; none where its tensors move through the host."""
    if communication_device(group).type != "cuda":
        return {}
    return create_groups(dict.fromkeys(("pipe:up", "pipe:down"), (table, "pipe")), timeout=timeout)


def moves_cpu_tensors(group: dist.ProcessGroup | None) -> bool:
    """Whether the group (None: the world) has a backend for CPU tensors."""
    return "cpu:" in dist.get_backend_config(group)


def communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors the group moves: the current accelerator where it can, else the CPU."""
    config = dist.get_backend_config(group)
    if "cuda:nccl" in config and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def setup_node_groups(num_per_node: int = 8) -> dist.ProcessGroup | None:
    """A new process group of the ranks on this rank's node. Every rank of the world calls it; needs no `tpc` set-up.

    Args:
        num_per_node: ranks a node; consecutive ranks share a node.

    Returns:
        This rank's node group, or None if there is just one node or the world does not divide into nodes.

    Example:
        >>> ZeroRedundancyOptimizer(..., process_group=setup_node_groups(8))  # doctest: +SKIP

    Raises:
        TopologyError: torch.distributed is not initialised, or `num_per_node` is below 1.
    """
    initialised_world()
    world_size = dist.get_world_size()
    if num_per_node >= 1 and (world_size % num_per_node or world_size <= num_per_node):
        return None
    nodes = node_groups(world_size, num_per_node)
    table = RankTable(("outer", "node"), (len(nodes), num_per_node))
    return create_groups({"node": (table, "node")})["node"]


def initialised_world() -> dist.ProcessGroup:
    """The world's process group, or the error that says what to call."""
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is None:
        raise TopologyError("torch.distributed is not initialised; call setup_distributed() first")
    return world


def as_timedelta(timeout: timedelta | float | None) -> timedelta | None:
    """A time-out given in seconds, or as torch wants it; None stays None.

    Raises:
        TopologyError: it is not positive, or not finite.

    Example:
        >>> as_timedelta(90)
        datetime.timedelta(seconds=90)
    """
    if timeout is None:
        return None
    try:
        result = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    except (TypeError, ValueError, OverflowError):
        raise TopologyError(f"a time-out is a timedelta or a finite number of seconds, got {timeout!r}") from None
    if result <= timedelta(0):
        raise TopologyError(f"a time-out must be positive, got {timeout!r}")
    return result


def _world_timeout() -> timedelta | None:
    """What the world was set up with; None if that is torch's default, which differs between backends."""
    world = initialised_world()
    for device in ("cpu", "cuda"):
        if f"{device}:" not in dist.get_backend_config(world):
            continue
        options = getattr(world._get_backend(torch.device(device)), "options", None)
        found: timedelta | None = getattr(options, "_timeout", None)
        if found is not None and found not in (default_pg_timeout, default_pg_nccl_timeout):
            return found
    return None


def _describe(key: str, table: RankTable, mode: str) -> str:
    shape = " x ".join(f"{dim} {size}" for dim, size in zip(table.dims, table.sizes, strict=True))
    return f"{key} = groups of {table.size(mode)} in {shape}"


def _agree_on_local_creation(request: str) -> bool:
    """Whether every rank may create its own groups only; also proves that all ranks ask for the same thing.

    One all-reduce of six numbers over the world: max(x) and max(-x) = -min(x) say whether a number is the same
    everywhere, so that every rank comes to the same verdict.
    """
    digest = int.from_bytes(hashlib.sha256(request.encode()).digest()[:7], "big")
    state = dist.distributed_c10d._world  # private, but the names of groups depend on these two numbers
    made, registered = state.group_count, len(state.pg_names)
    numbers = [digest, -digest, made, -made, registered, -registered]
    shared = torch.tensor(numbers, dtype=torch.int64, device=communication_device(None))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    top = cast("list[int]", shared.tolist())
    if top[0] != -top[1]:
        raise TopologyError(
            f"the ranks ask for different groups; rank {dist.get_rank()} asks for {request}. Give every rank the same "
            "configuration"
        )
    if top[2] != -top[3]:
        raise TopologyError(
            f"the ranks made different numbers of process groups before ({-top[3]} to {top[2]}, here {made}), and "
            "torch names groups by that number; call new_group equally often on every rank, or do so later"
        )
    return top[4] == -top[5]
