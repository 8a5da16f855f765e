"""What the data-parallel family and the norm ask of a DTensor, torch's tensor that knows how it is sharded.

::

    Shard over a group       every rank has other elements       Replicate       every rank has all of them
    Partial                  every rank has a summand: gradients of what is whole but ran on other tokens or heads

Nothing here loads `torch.distributed.tensor` (0.4 s): whoever has such a tensor has loaded it. Neighbours:
`clip_grad_parallel.py`, `naive_ddp.py`, `zero.py` and `ema.py`, which work on local tensors.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from torchdistpackage.errors import SplitError
from torchdistpackage.split.model_tensors import is_dtensor, local_tensor
from torchdistpackage.topology import tpc

__all__ = [
    "is_dtensor",
    "is_sharded_over_tensor_group",
    "local_tensor",
    "refuse_fused_shard",
    "settle_gradient",
    "sharding_groups",
]


def sharding_groups(tensor: Any) -> list[dist.ProcessGroup]:
    """The groups over which a DTensor is sharded, besides the tensor group; none for any other tensor."""
    if not is_dtensor(tensor):
        return []
    sharded = [dim for dim, place in enumerate(tensor.placements) if not place.is_replicate()]
    return [tensor.device_mesh.get_group(dim) for dim in sharded if dim != _tensor_dim(tensor)]


def is_sharded_over_tensor_group(tensor: Any) -> bool | None:
    """Whether a DTensor is, or whole on every rank; None for tensors that say nothing about the tensor group."""
    dim = _tensor_dim(tensor) if is_dtensor(tensor) else None
    return None if dim is None else not tensor.placements[dim].is_replicate()


def _tensor_dim(tensor: Any) -> int | None:
    """The dimension of its mesh that is the tensor group, whoever has made that mesh."""
    if tpc.get_group_size("tensor") == 1:
        return None
    mesh, ranks = tensor.device_mesh, tpc.get_ranks_in_group("tensor")
    found = (dim for dim in range(mesh.ndim) if dist.get_process_group_ranks(mesh.get_group(dim)) == ranks)
    return next(found, None)


def settle_gradient(parameter: Any) -> None:
    """Brings a gradient into its parameter's placement: once, in place of it, for all who look at it later.

    A backward leaves summands (norms in sequence parallel), or a whole gradient of a sharded parameter (embeddings).
    Collective over the groups that have the summands; nothing happens to other gradients.
    """
    gradient = parameter.grad
    if is_dtensor(gradient) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def refuse_fused_shard(name: str, parameter: Any) -> None:
    """Raises for a parameter that is sharded part by part (`FusedColwise`), and again in that dimension.

    What `fully_shard` makes of a plain shard of the tensor group looks alike, with the placements the other way round.

    Raises:
        SplitError: `fully_shard` was applied to such a parameter: torch has no name for the order of its rows.
    """
    if not is_dtensor(parameter) or parameter.device_mesh.ndim == 1:
        return
    *others, last = parameter.placements
    if type(last).__name__ == "_StridedShard" and any(getattr(place, "dim", None) == last.dim for place in others):
        raise SplitError(
            f"fully_shard cuts {name} along the dimension in which tensor parallelism has cut each of its parts, and "
            "torch has no name for that order of rows: checkpoints would be wrong. Use NaiveDDP or Bf16ZeroOptimizer "
            "over the data group, or a tensor parallel plan without this module"
        )
