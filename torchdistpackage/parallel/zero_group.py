"""The ranks that share an optimizer's state, and the collectives between them.

::

    dp_group        shares: each rank owns 1/d of the state                reduce-scatter, all-gather
    replica_group   where the shard of this rank is held once more         all-reduce of the shard

With shards inside of a node and replicas across nodes, what goes between nodes is 1/d of the gradient.

Where the chunks of a bucket differ in size (whole parameters), each goes to its owner by a `reduce` and comes from it
by a `broadcast`: the same traffic, more calls.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import TopologyError
from torchdistpackage.parallel.zero_layout import BucketLayout
from torchdistpackage.topology import tpc
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["ShardGroup"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class ShardGroup:
    """Who shares with this rank.

    Attributes:
        group: Of the ranks that own a shard each; None for one rank.
        replica_group: Of the ranks with the same shard; None for one rank.
        rank: This rank's index in `group`.
        size: Ranks of `group`.
        replicas: Ranks of `replica_group`.
    """

    group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    rank: int
    size: int
    replicas: int

    @classmethod
    def find(cls, dp_group: dist.ProcessGroup | None, replica_group: dist.ProcessGroup | None) -> ShardGroup:
        """Those of the given groups, or the default: the data group of `tpc` if that is set up, else the world.

        Raises:
            TopologyError: This rank is not in a group.
        """
        if dp_group is None and dist.is_available() and dist.is_initialized():
            if not tpc._is_inited("global"):
                dp_group = dist.group.WORLD
            elif tpc._is_inited("data"):
                dp_group = tpc.get_group("data")
        shards, replicas = _place(dp_group, "dp_group"), _place(replica_group, "replica_group")
        if shards.group is not None and replica_group is None:
            _warn_of_replicas(shards.group)
        return cls(shards.group, replicas.group, shards.rank, shards.size, replicas.size)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those of more than one rank."""
        return [group for group in (self.group, self.replica_group) if group is not None]

    def ranks(self) -> list[int]:
        """The global ranks that share, in order."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType, *, replicas: bool = True) -> Tensor:
        """The sum or maximum over all shards, and if wanted over the replicas."""
        tensor = tensor.to(self.device)
        for group in self.groups if replicas else [self.group] if self.group is not None else []:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    @property
    def device(self) -> torch.device:
        """Whose tensors the groups move."""
        return communication_device(self.groups[0]) if self.groups else torch.device("cpu")

    def owner(self, rank: int) -> int:
        """The global rank of a rank of `group`."""
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    # ---- buckets ----

    def begin_sum(self, flat: Tensor, layout: BucketLayout, *, everywhere: bool) -> Sum:
        """Starts to add up a bucket over the shards' ranks.

        Args:
            flat: The bucket of this rank; is overwritten.
            layout: Of the bucket.
            everywhere: Every rank gets all of it, not only its chunk.
        """
        own = flat[layout.bounds[self.rank] : layout.bounds[self.rank + 1]]
        if self.group is None:
            return Sum(flat if everywhere else own, [])
        if everywhere:
            return Sum(flat, [dist.all_reduce(flat, group=self.group, async_op=True)])
        if layout.even:
            chunk = torch.empty_like(own)
            return Sum(chunk, [dist.reduce_scatter_tensor(chunk, flat, group=self.group, async_op=True)], flat)
        works = [
            dist.reduce(flat[low:high], dst=self.owner(rank), group=self.group, async_op=True)
            for rank, (low, high) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False))
            if low < high
        ]
        return Sum(own, works, flat)

    def begin_gather(self, flat: Tensor, layout: BucketLayout) -> list[Any]:
        """Starts to fill a bucket with every rank's chunk; this rank's is in its place already."""
        if self.group is None:
            return []
        if layout.even:
            own = flat[layout.bounds[self.rank] : layout.bounds[self.rank + 1]].clone()
            return [dist.all_gather_into_tensor(flat, own, group=self.group, async_op=True)]
        return [
            dist.broadcast(flat[low:high], src=self.owner(rank), group=self.group, async_op=True)
            for rank, (low, high) in enumerate(zip(layout.bounds, layout.bounds[1:], strict=False))
            if low < high
        ]

    def finish_sum(self, begun: Sum) -> Tensor:
        """Waits for a sum, and adds up the replicas'."""
        for work in begun.works:
            work.wait()
        if self.replica_group is not None:
            dist.all_reduce(begun.result, group=self.replica_group)
        return begun.result


@final
@dataclass(frozen=True, eq=False)
class Sum:
    """A sum that is under way.

    Attributes:
        result: Where it will be.
        works: What to wait for.
        source: What must live until then.
    """

    result: Tensor
    works: list[Any]
    source: Tensor | None = None


def _warn_of_replicas(group: dist.ProcessGroup) -> None:
    """Says so if the group is a part of the data group: alone, its gradients stay apart from the others'.

    The ranks that hold the same experts are such a part, and the right one for a model that a wrapper reduces.
    """
    ranks = dist.get_process_group_ranks(group)
    if tpc._is_inited("moe_dp") and ranks == tpc.get_ranks_in_group("moe_dp"):
        return
    known = tpc._is_inited("data")
    replicas = (
        tpc.get_ranks_in_group("data") if known else [] if tpc._is_inited("global") else range(dist.get_world_size())
    )
    if len(ranks) < len(replicas) and set(ranks) <= set(replicas):
        _logger.warning(
            "Bf16ZeroOptimizer averages gradients over the global ranks %s only, and there are %d replicas: pass "
            "replica_group=..., of the ranks that hold the same shard, or wrap the model in DDP or NaiveDDP",
            ranks,
            len(replicas),
        )


@final
@dataclass(frozen=True)
class _Place:
    """Where this rank is in a group, which is None if it has one rank."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1


def _place(group: dist.ProcessGroup | None, name: str) -> _Place:
    if group is None:
        return _Place()
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TopologyError(f"{name} is a {type(group).__name__}; pass a process group, such as tpc.get_group('data')")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise TopologyError(
            f"global rank {dist.get_rank()} is not in the {name} that it was given; pass each rank the group that it "
            "is in, as tpc.get_group('data') and setup_node_groups() do"
        )
    return _Place(group, rank, size) if size > 1 else _Place()
