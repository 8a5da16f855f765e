"""Norms of gradients of which each rank holds chunks: p-th powers are added over the chunks, never norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.parallel.zero_buckets import Bucket, Member
from torchdistpackage.parallel.zero_group import ShardGroup

__all__ = ["clip_in_world", "shard_norms"]


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


class _Sharded(Protocol):
    def settle(self) -> None: ...

    def norms(self, parameters: Iterable[Tensor], norm_type: float) -> dict[int, Tensor]: ...

    def like(self) -> Tensor: ...

    def with_gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]: ...

    def remember(self) -> None: ...


def clip_in_world(
    optimizer: _Sharded, parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """`clip_grad_norm_` where `tpc` is not set up: the optimizer's group holds the whole model. Collective.

    Args:
        optimizer: The sharded one.
        parameters: All of its.
        max_norm: The norm that the averaged gradients have at most afterwards.
        norm_type: p > 0, or `inf`.
        error_if_nonfinite: Raise if the norm is NaN or infinite.

    Raises:
        ValueError: norm_type is not positive.
        RuntimeError: The norm is not finite and `error_if_nonfinite` is set.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive or inf, got {norm_type}")
    optimizer.settle()
    norms = optimizer.norms(parameters, norm_type)
    like = optimizer.like()
    total = torch.linalg.vector_norm(torch.stack([*norms.values()]), norm_type) if norms else torch.zeros(())
    total = total.to(dtype=like.dtype, device=like.device)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {total.item()}, on every rank")
    torch.nn.utils.clip_grads_with_norm_(optimizer.with_gradients(parameters), max_norm, total)
    optimizer.remember()
    return total
