"""The batch cut into micro-batches, and the results put together again.

::

    10 rows, m = 4    | 0 1 2 | 3 4 5 | 6 7 | 8 9 |        sizes differ by at most one, nothing is dropped
     3 rows, m = 4    | 0 | 1 | 2 | |                      the last one is empty: every stage skips it

A micro-batch's share of the batch, rows / all rows, is its weight in the mean loss. With equal slices that is 1/m; with
unequal ones it is what makes the gradient the full batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdistpackage.errors import PipelineError

__all__ = ["Slices", "merge_outputs", "microbatch_sizes", "slice_inputs"]


@dataclass(frozen=True)
class Slices:
    """A stage's own inputs, cut.

    Attributes:
        rows: Rows of the whole batch; None if the inputs hold no tensor to cut.
        microbatches: For each micro-batch, the list of this stage's own arguments.
    """

    rows: int | None
    microbatches: list[list[Any]]


def microbatch_sizes(rows: int, num_microbatches: int) -> list[int]:
    """Rows of each micro-batch; the larger ones come first, empty ones last.

    Example:
        >>> microbatch_sizes(10, 4), microbatch_sizes(3, 4)
        ([3, 3, 2, 2], [1, 1, 1, 0])
    """
    small, extra = divmod(rows, num_microbatches)
    return [small + (i < extra) for i in range(num_microbatches)]


def slice_inputs(inputs: Any, num_microbatches: int) -> Slices:
    """Cuts a stage's own inputs along dim 0.

    Args:
        inputs: None, a tensor, a list of arguments, or any pytree (one argument). Tensors of at least one dimension
            are cut; 0-d tensors and everything that is not a tensor go to every micro-batch as they are.
        num_microbatches: m >= 1.

    Raises:
        PipelineError: Tensors disagree on the number of rows, or there are none.

    Example:
        >>> slice_inputs([torch.arange(3), "note"], 2).microbatches
        [[tensor([0, 1]), 'note'], [tensor([2]), 'note']]
    """
    arguments = list(inputs) if type(inputs) in (list, tuple) else [] if inputs is None else [inputs]
    flat = all(isinstance(argument, Tensor) for argument in arguments)  # the usual case, and its own structure
    leaves, spec = (arguments, None) if flat else pytree.tree_flatten(arguments)
    cut = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__"):
            raise PipelineError(
                f"inputs hold a {type(leaf).__name__}, which would reach every micro-batch whole; convert it with "
                "torch.as_tensor first"
            )
    if not cut:
        return Slices(None, [list(arguments) for _ in range(num_microbatches)])
    rows = cut[0].shape[0]
    if any(leaf.shape[0] != rows for leaf in cut):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in cut)
        raise PipelineError(
            f"all tensors in inputs are cut along dim 0 and must have the same number of rows; got shapes {shapes}. "
            "One that is not batched (a mask, the weights of classes) is used inside of fwd_fn, not passed in inputs"
        )
    if rows == 0:
        raise PipelineError("inputs have 0 rows: a step needs at least one")
    sizes = microbatch_sizes(rows, num_microbatches)
    columns = [
        torch.split(leaf, sizes) if isinstance(leaf, Tensor) and leaf.dim() > 0 else [leaf] * num_microbatches
        for leaf in leaves
    ]
    rows_of = (list(row) for row in zip(*columns, strict=True))
    return Slices(rows, list(rows_of) if spec is None else [pytree.tree_unflatten(row, spec) for row in rows_of])


def merge_outputs(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """Puts the outputs of the micro-batches together, rows in order.

    Args:
        outputs: One pytree a micro-batch, all of one structure.
        weights: What a 0-d floating tensor (a loss, a metric) of each micro-batch counts in the sum.

    Returns:
        The same structure: tensors concatenated along dim 0, 0-d floating tensors summed with their weights, other 0-d
        tensors stacked, anything else kept if it is the same in all micro-batches, and otherwise as a list.

    Raises:
        PipelineError: Structures, types or the shapes of rows differ.

    Example:
        >>> merge_outputs([torch.tensor([1, 2]), torch.tensor([3])], [0.5, 0.5])
        tensor([1, 2, 3])
    """
    leaves, spec = pytree.tree_flatten(outputs[0])
    columns = [[leaf] for leaf in leaves]
    for number, output in enumerate(outputs[1:], start=1):
        more, other = pytree.tree_flatten(output)
        if other != spec:
            raise PipelineError(f"micro-batch {number} returned the structure {other}, micro-batch 0 {spec}")
        for column, leaf in zip(columns, more, strict=True):
            column.append(leaf)
    return pytree.tree_unflatten([_merge_leaf(column, weights) for column in columns], spec)


def _merge_leaf(column: list[Any], weights: Sequence[float]) -> Any:
    first = column[0]
    tensors = sum(isinstance(leaf, Tensor) for leaf in column)
    if not tensors:
        return first if all(leaf == first for leaf in column) else column
    if tensors < len(column):
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in column))
        raise PipelineError(f"the last stage returned different types for different micro-batches: {kinds}")
    if first.dim() > 0:
        shapes = dict.fromkeys(tuple(leaf.shape[1:]) for leaf in column)
        if len(shapes) > 1:
            raise PipelineError(
                "the last stage returned rows of different shapes for different micro-batches, which cannot be put "
                f"together: {', '.join(map(str, shapes))}; return them in a list, or pad them"
            )
        return first if len(column) == 1 else torch.cat(column)
    if first.is_floating_point():
        return weighted_sum(column, weights)
    return first if len(column) == 1 else torch.stack(column)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Adds in the order of the micro-batches, as the plain loop does: the same bits."""
    total = values[0].detach() * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.detach() * weight
    return total
