"""Before anything is averaged: all ranks hold the same model, and each gets to know what the others hold of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import CheckpointError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.ema_exchange import Exchange
from torchdistpackage.parallel.ema_layout import Box, Entry, Layout
from torchdistpackage.parallel.ema_tensors import local_box
from torchdistpackage.topology.expert_replicas import SAME_EXPERTS, different_experts

__all__ = ["common_layout", "description"]


def description(
    entries: Sequence[Entry], tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> tuple[str, list[Any]]:
    """A digest of what must be alike on all ranks, and this rank's box of every kind of DTensor.

    Args:
        entries: The tensors of the model.
        tensors: As `named_tensors` gives them.
        group: Of the replicas; None for a rank on its own.

    Raises:
        CheckpointError: A DTensor is partial, a buffer is sharded, or the ranks hold different experts.
    """
    if wrong := different_experts(tensors.values(), *([] if group is None else [group])):
        raise CheckpointError(f"ShardedEMA: {wrong}; {SAME_EXPERTS}")
    boxes = []
    for entry in {entry.kind: entry for entry in reversed(entries) if entry.placement}.values():
        box = local_box(entry.name, tensors[entry.name])
        boxes.append([box.offset, box.size])
    for entry in entries:
        if not entry.is_parameter and local_tensor(tensors[entry.name]).shape != tensors[entry.name].shape:
            raise CheckpointError(f"buffer {entry.name} is sharded; only whole buffers can be taken over")
    return hashlib.sha256("\n".join(_texts(entries)).encode()).hexdigest(), boxes


def common_layout(exchange: Exchange, entries: Sequence[Entry], found: Sequence[Any]) -> Layout:
    """The layout, from the descriptions of all ranks. Collective only if they differ.

    Args:
        exchange: To the other ranks.
        entries: Of this rank.
        found: The description of each rank.

    Raises:
        CheckpointError: Their models differ.
    """
    other = next((rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]), None)
    if other is not None:
        texts = exchange.together("", lambda: _texts(entries))
        one, two = (set(texts[rank]) for rank in (0, other))
        only = [(0, text) for text in texts[0] if text not in two] + [(other, t) for t in texts[other] if t not in one]
        where = f"rank {only[0][0]} alone has {only[0][1]}" if only else "their order is another"
        raise CheckpointError(
            f"ShardedEMA: ranks 0 and {other} of the {exchange.size} ranks of the group hold different models of "
            f"{len(texts[0])} and {len(texts[other])} tensors; {where}. Pass the group of replicas of one stage"
        )
    kinds = {entry.kind: None for entry in reversed(entries) if entry.placement}
    boxes = {
        kind: [Box(tuple(found[rank][1][at][0]), tuple(found[rank][1][at][1])) for rank in range(exchange.size)]
        for at, kind in enumerate(kinds)
    }
    return Layout(entries, exchange.size, boxes)


def _texts(entries: Sequence[Entry]) -> list[str]:
    return [
        f"{', '.join(one.names)} {one.shape} {one.dtype} {one.order} {one.is_parameter} {one.placement}"
        for one in entries
    ]
