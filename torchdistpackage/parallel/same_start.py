"""Replicas start alike: they have the same parameters, and the values of one of them.

Neighbours: `naive_ddp.py`, `moe_data_parallel.py` and `zero.py`, each at its construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import PipelineError, TopologyError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["agree_on_parameters", "broadcast_tensors", "source_rank"]


def agree_on_parameters(what: str, kinds: Sequence[str], group: Any) -> None:
    """Whether all replicas have the same parameters: else a reduction would mix them up, or wait for ever.

    Args:
        what: Whose, for messages.
        kinds: Each parameter in words.
        group: The replicas.

    Raises:
        PipelineError: They are not the same, on every rank.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(kinds).encode()).digest()[:7], "big")
    numbers = torch.tensor([digest, -digest], dtype=torch.int64, device=communication_device(group))
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    top = numbers.tolist()
    if top[0] != -top[1]:
        shown = "; ".join(kinds[:4]) + ("; ..." if len(kinds) > 4 else "")
        raise PipelineError(
            f"the {dist.get_world_size(group)} replicas of a {what} have different trainable parameters; rank "
            f"{dist.get_rank()} has {len(kinds)}: {shown}. Build the same module on every rank of the group, and check "
            "that the group holds the ranks that hold the same stage"
        )


def source_rank(group: Any, wanted: int) -> int:
    """The global rank that a group starts from.

    Args:
        group: The group.
        wanted: A global rank; 0 stands for the group's first, if it is not in the group.

    Raises:
        TopologyError: It is not in the group, or this rank is not.
    """
    kind = type(group)
    if not issubclass(kind, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TopologyError(
            f"the process group is a {kind.__name__}; pass one of torch's, such as tpc.get_group('data')"
        )
    if dist.get_world_size(group) < 1:
        raise TopologyError(
            f"rank {dist.get_rank()} is not in the given process group; make the module data-parallel on the ranks of "
            "the group only"
        )
    ranks = dist.get_process_group_ranks(group)
    if wanted in ranks:
        return wanted
    if wanted == 0:
        return int(ranks[0])
    raise TopologyError(
        f"rank {wanted}, whose parameters are to be copied, is not in the group {ranks}: give a global rank of the "
        "group, for example dist.get_global_rank(group, 0), or leave it out for the group's first"
    )


def broadcast_tensors(tensors: list[Tensor], group: Any, source: int) -> None:
    """Makes tensors those of one rank.

    Args:
        tensors: Of any dtype, strides and device; the same on every rank. Of DTensors, this rank's part.
        group: The ranks.
        source: A global rank.

    Raises:
        PipelineError: One is on the meta device.
    """
    if any(tensor.is_meta for tensor in tensors):
        raise PipelineError("parameters are on the meta device: call module.to_empty(device=...) and load them first")
    device = communication_device(group)
    with torch.no_grad():
        for tensor in tensors:
            part = local_tensor(tensor.detach())
            # As bytes, since not every backend knows every dtype.
            flat = part.contiguous().reshape(-1).view(torch.uint8)
            moved = flat if flat.device.type == device.type else flat.to(device)
            dist.broadcast(moved, source, group=group)
            part.copy_(moved.to(part.device).view(part.dtype).view(part.shape))
