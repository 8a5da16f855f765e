"""The arguments of a batch, made ready to be cut into micro-batches along dim 0, and put back inside each of them.

The runtime cuts every tensor along its first dim. A model's own arguments may have their rows elsewhere, or one row
that is meant for all::

    attention_mask (8, 16)      cut                    position_ids (1, 16)        goes to each as it is
    position_ids   (3, 8, 16)   moved to (8, 3, 16),   cut, and moved back inside of the stage

Neighbours: `auto_pipeline_schedule.py` and `steps.py` call both halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchdistpackage.errors import PipelineError

__all__ = ["count_rows", "cut_along_rows", "restored"]


class _HookError(PipelineError, ValueError):
    """A model's hook names what was not given."""


@dataclass(frozen=True, eq=False)
class _Whole:
    """A tensor that every micro-batch gets as it is."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class _Moved:
    """A tensor that is cut along another dim than the first: where it was."""

    dim: int


def cut_along_rows(part: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments, ready to be cut along dim 0.

    Args:
        part: A stage; its hook `get_pipeline_kwargs_chunk_dims(kwargs)` may say where the rows of an argument are.
        kwargs: The arguments of the whole batch.

    Raises:
        PipelineError: The hook names an argument that is not given; a ValueError, too.
    """
    owner = part if hasattr(part, "get_pipeline_kwargs_chunk_dims") else getattr(part, "module", part)
    hook = getattr(owner, "get_pipeline_kwargs_chunk_dims", None)
    dims: Mapping[str, int] = (hook(kwargs) if hook is not None else None) or {}
    unknown = sorted(dims.keys() - kwargs.keys())
    if unknown:
        raise _HookError(
            f"get_pipeline_kwargs_chunk_dims names the unknown kwarg(s) {', '.join(unknown)}; given are "
            f"{', '.join(kwargs) or 'none'}"
        )
    return {name: _ready(value, dims.get(name, 0)) for name, value in kwargs.items()}


def _ready(value: Any, dim: int) -> Any:
    if not isinstance(value, Tensor):
        return pytree.tree_map_only(Tensor, lambda leaf: _ready(leaf, 0), value)
    if value.dim() == 0 or value.shape[dim] == 1:
        return _Whole(value)  # one row for all: a position a token, a mask that is broadcast
    return value if dim == 0 else (value.movedim(dim, 0), _Moved(dim))


def restored(value: Any) -> Any:
    """One argument of a micro-batch, as the model takes it."""
    if isinstance(value, _Whole):
        return value.tensor
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Moved):
        return value[0].movedim(0, value[1].dim)
    if isinstance(value, Tensor):
        return value
    return pytree.tree_map_only(_Whole, lambda leaf: leaf.tensor, value)


def count_rows(value: Any) -> int | None:
    """The rows of the first tensor of a value that has some; None where there is none.

    Example:
        >>> import torch
        >>> count_rows({"scale": torch.tensor(2.0), "image": torch.zeros(8, 3, 4, 4)})
        8
    """
    leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim() > 0)
    first = next(leaves, None)
    return None if first is None else first.shape[0]
