"""Plain data between the ranks of a group, outside of steps: sizes, names, addresses, plans.

It travels as JSON: torch's own `all_gather_object` unpickles what a peer sends, which is to run it. Tuples arrive as
lists and the keys of dicts as strings; floats keep every bit.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.process_groups import communication_device, moves_cpu_tensors

__all__ = ["broadcast_json", "gather_json"]

_LONGEST = 1 << 30  # bytes; a length that is longer was not sent by this code


def gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, in the order of the ranks. Collective.

    Args:
        value: What JSON can say.
        group: Of any backend; one that moves CPU tensors is used as such.

    Raises:
        TopologyError: What came is not JSON.

    Example:
        >>> gather_json({"rank": dist.get_rank()}, tpc.get_control_group("pipe"))  # doctest: +SKIP
        [{'rank': 0}, {'rank': 1}]
    """
    mine, device = _encoded(value), _device(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([mine.numel()], device=device), group=group)
    sizes = [_checked(int(length)) for length in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [_decoded(text[:size]) for text, size in zip(texts, sizes, strict=True)]


def broadcast_json(value: Any, group: dist.ProcessGroup) -> Any:
    """The value of the group's first rank, on every rank. Collective.

    Args:
        value: What JSON can say; of the first rank, the others' do not matter.
        group: Of any backend; one that moves CPU tensors is used as such.

    Raises:
        TopologyError: What came is not JSON.
    """
    first, source = group.rank() == 0, dist.get_global_rank(group, 0)
    text, device = _encoded(value) if first else torch.empty(0, dtype=torch.uint8), _device(group)
    length = torch.tensor([text.numel()], device=device)
    dist.broadcast(length, src=source, group=group)
    text = text.to(device) if first else torch.empty(_checked(int(length)), dtype=torch.uint8, device=device)
    dist.broadcast(text, src=source, group=group)
    return _decoded(text)


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cpu") if moves_cpu_tensors(group) else communication_device(group)


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: Tensor) -> Any:
    try:
        return json.loads(text.cpu().numpy().tobytes())
    except ValueError as error:
        raise TopologyError(f"a rank of the group has sent {text.numel()} bytes that are not JSON: {error}") from error


def _checked(length: int) -> int:
    if not 0 < length <= _LONGEST:
        raise TopologyError(f"a rank of the group announces {length} bytes; do all ranks make the same call?")
    return length
