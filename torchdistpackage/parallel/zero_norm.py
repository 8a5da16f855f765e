"""Norms of gradients of which each rank holds chunks: p-th powers are added over the chunks, never norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.parallel.zero_buckets import Bucket, Member
from torchdistpackage.parallel.zero_group import ShardGroup

__all__ = ["shard_norms"]


@torch.no_grad()
def shard_norms(
    members: Sequence[Member], buckets: Sequence[Bucket], shards: ShardGroup, norm_type: float
) -> list[Tensor]:
    """The norm of each member's gradient, in float64: 0-d tensors, the same on all ranks of the group.

    Of a DTensor it is the norm of this rank's part.

    Args:
        members: Whose.
        buckets: All of them.
        shards: Who shares.
        norm_type: p > 0, or `inf`.
    """
    if not members:
        return []
    norm_type = float(norm_type)
    infinite = math.isinf(norm_type)
    place = {id(member): number for number, member in enumerate(members)}
    pieces = [piece for bucket in buckets for piece in bucket.pieces if id(piece.member) in place]
    found = [(place[id(piece.member)], piece.tensor.grad) for piece in pieces if piece.tensor.grad is not None]
    powers = torch.zeros(len(members), dtype=torch.float64, device=shards.device)
    if found:
        places = torch.tensor([at for at, _ in found], device=powers.device)
        norms = torch._foreach_norm([gradient for _, gradient in found], norm_type)
        own = torch.stack([norm.to(powers) for norm in norms])
        powers.scatter_reduce_(0, places, own if infinite else own**norm_type, "amax" if infinite else "sum")
    op = dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM
    powers = shards.all_reduce(powers, op, replicas=False)
    return list((powers if infinite else powers ** (1.0 / norm_type)).unbind())
