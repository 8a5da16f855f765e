"""What a sharded optimizer and its parameters take on one rank, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from torch import Tensor

from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.zero_buckets import Bucket

__all__ = ["ShardMemory", "distinct_bytes", "shard_memory"]


@final
@dataclass(frozen=True)
class ShardMemory:
    """Bytes on this rank, between two operations: buckets that are under way come on top.

    Attributes:
        parameters: The model's own, which every rank has.
        gradients: In the parameters, and this rank's chunks of the averaged ones.
        master: Float32 copies of this rank's pieces.
        state: What the wrapped optimizer keeps.

    Example:
        >>> print(ShardMemory(parameters=2 * 2**20, gradients=2**20, master=2**21, state=2**22))
        parameters    2.00 MiB
        gradients     1.00 MiB
        master        2.00 MiB
        state         4.00 MiB
        total         9.00 MiB
    """

    parameters: int
    gradients: int
    master: int
    state: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.gradients + self.master + self.state

    def __str__(self) -> str:
        rows = [*((field.name, getattr(self, field.name)) for field in fields(self)), ("total", self.total)]
        return "\n".join(f"{name:<11} {size / 2**20:9.2f} MiB" for name, size in rows)


def distinct_bytes(tensors: Iterable[Tensor | None], apart: Iterable[Tensor] = ()) -> int:
    """The bytes of the memory behind these tensors, each counted once, and none that is behind those of `apart`."""
    known = {local_tensor(tensor.detach()).untyped_storage().data_ptr() for tensor in apart}
    total = 0
    for tensor in tensors:
        storage = None if tensor is None else local_tensor(tensor.detach()).untyped_storage()
        if storage is not None and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def shard_memory(parameters: Sequence[Tensor], buckets: Sequence[Bucket], state: Mapping[Any, Any]) -> ShardMemory:
    """What an optimizer takes.

    Args:
        parameters: All of the model's.
        buckets: All of them.
        state: The wrapped optimizer's.
    """
    values = [value for entry in state.values() for value in entry.values()]
    return ShardMemory(
        parameters=distinct_bytes(parameters),
        gradients=distinct_bytes([*(p.grad for p in parameters), *(bucket.gradient for bucket in buckets)]),
        master=distinct_bytes((piece.tensor for bucket in buckets for piece in bucket.pieces), apart=parameters),
        state=distinct_bytes(value for value in values if isinstance(value, Tensor)),
    )
