"""The tensors of a model as an average over its history sees them: order in memory, and what this rank holds.

Names are those of the whole model, in the order of its state dict (`split/model_tensors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.parallel.ema_layout import Box, Entry, Layout
from torchdistpackage.split.model_tensors import is_dtensor, local_tensor, named_tensors

__all__ = ["differences", "entries_of", "flat", "listed", "local_box", "named_tensors"]


def entries_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[Entry]:
    """What is to be held, one entry for a tensor with several names.

    Args:
        tensors: As `named_tensors` gives them.
        dtype: In which averages of floating parameters are held; None for the parameter's own.

    Raises:
        CheckpointError: A tensor has no values, or no strides.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> [(entry.name, entry.shape) for entry in entries_of(named_tensors(model), None)]
        [('weight', (3, 2)), ('bias', (3,))]
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    unique = {id(tensor): tensor for tensor in tensors.values()}
    meshes: list[Any] = []
    return [_entry(tuple(names[key]), tensor, dtype, meshes) for key, tensor in unique.items()]


def _entry(names: tuple[str, ...], tensor: Tensor, dtype: torch.dtype | None, meshes: list[Any]) -> Entry:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise CheckpointError(
            f"{names[0]} has no values yet; materialize the model (to_empty, or a first batch for lazy modules) and "
            "load its weights before averaging them"
        )
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"{names[0]} is {tensor.layout}; only dense tensors are averaged")
    is_parameter = isinstance(tensor, nn.Parameter)
    own = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
    shape, order, placement = tuple(tensor.shape), tuple(range(tensor.dim())), ""
    if is_dtensor(tensor):
        shard: Any = tensor
        if shard.device_mesh not in meshes:
            meshes.append(shard.device_mesh)
        placement = f"{shard.placements} on mesh {meshes.index(shard.device_mesh)}"
    elif is_parameter:
        stride = tensor.stride()
        order = tuple(sorted(order, key=lambda dim: -stride[dim] if shape[dim] > 1 else -inf))
    return Entry(names, shape, own, order, is_parameter, placement)


def local_box(name: str, tensor: Tensor) -> Box:
    """The box of a DTensor that this rank holds.

    Raises:
        CheckpointError: It is partial, or its shard is no box.
    """
    shard: Any = tensor
    chunks = [] if any(one.is_partial() for one in shard.placements) else shard.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local_tensor(tensor).shape):
        raise CheckpointError(
            f"{name} is a DTensor with placements {tuple(shard.placements)}, of which this rank holds no plain block; "
            "redistribute it to Shard or Replicate placements first"
        )
    return Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes))


def flat(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The elements that this rank holds, in the order of memory: a view wherever they lie close together.

    Example:
        >>> flat(torch.arange(4).view(2, 2).T, (1, 0)).tolist()
        [0, 1, 2, 3]
    """
    return local_tensor(tensor.detach()).permute(tuple(order)).reshape(-1)


def differences(layout: Layout, rank: int, tensors: Mapping[str, Tensor]) -> str:
    """What a model has otherwise than the one that the layout was made for; "" if nothing.

    Args:
        layout: The layout.
        rank: This rank in the group.
        tensors: As `named_tensors` gives them.
    """
    known = {name for entry in layout.entries for name in entry.names}
    texts = []
    if missing := [name for name in known if name not in tensors]:
        texts.append(f"it lacks {listed(sorted(missing))}")
    if extra := [name for name in tensors if name not in known]:
        texts.append(f"it has {listed(extra)} as well")
    changed = []
    for index, entry in enumerate(layout.entries):
        tensor = tensors.get(entry.name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != entry.shape:
            changed.append(f"{entry.name} is {tuple(tensor.shape)} and was {entry.shape}")
        elif tuple(local_tensor(tensor).shape) != layout.box(index, rank).size:
            now, then = tuple(local_tensor(tensor).shape), layout.box(index, rank).size
            changed.append(f"this rank's shard of {entry.name} is {now} and was {then}")
    return "; ".join([*texts, *([listed(changed, "; ")] if changed else [])])


def listed(texts: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    """The first few, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + rest
