"""What the runtime asks of autograd: leaves for what arrives, roots for what left, and the right start of a backward.

The loss of a micro-batch counts with its share of the batch. The share is the *start* of the backward (the root's
gradient), not a division of the user's loss: no extra kernel, the user's tensor stays as it is, and the bits are those
of `(loss * share).backward()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from torchdistpackage.errors import PipelineError

__all__ = [
    "BackwardFn",
    "Roots",
    "beginning",
    "differentiable_alias",
    "is_compiled",
    "loss_root",
    "pairs",
    "reachable_leaves",
    "run_backward",
    "weighted_loss",
]

BackwardFn = Callable[[Any, Any], Any]

_engine = torch.autograd.Variable._execution_engine
_PYTHON_NODE: type = torch._C._FunctionBase
_unsafe_view = torch.ops.aten._unsafe_view.default


def differentiable_alias(leaf: Tensor) -> Tensor:
    """What the user's stage gets in place of a leaf that collects a gradient.

    A stage may begin with an in-place operation (a ReLU): on a leaf, or on a view of one, autograd refuses it. This is
    neither, shares the memory, and costs about 2 us.
    """
    alias: Tensor = _unsafe_view(leaf, leaf.shape)
    return alias


class Roots(NamedTuple):
    """What a backward starts from: tensors that left the stage (or edges of the graph), and their gradients."""

    tensors: tuple[Any, ...]
    gradients: tuple[Tensor, ...]


def weighted_loss(loss: Any, weight: float) -> Any:
    """The loss as a custom backward gets it: times its share, unless it is no scalar or counts whole."""
    return loss * weight if weight != 1.0 and _is_scalar(loss) else loss


def loss_root(loss: Any, weight: float) -> Roots:
    """The start of the backward of the loss stage.

    Args:
        loss: What the user's function returned.
        weight: What this micro-batch counts: its share of the batch, or 1.

    Raises:
        PipelineError: The loss is not a scalar that requires a gradient.
    """
    if not _is_scalar(loss):
        raise PipelineError(
            f"in training the last stage's fwd_fn must return the loss, a scalar tensor; it returned {_what(loss)}. "
            "Append what else you want to log to a list of yours; for evaluation call with forward_only=True"
        )
    if not loss.requires_grad:
        raise PipelineError(
            "the loss does not require a gradient: does the last stage run under torch.no_grad(), or detach its input?"
        )
    return Roots((loss,), (_root(weight, loss.dtype, loss.device, loss.shape),))


def beginning(output: Tensor) -> GradientEdge:
    """Where the backward of an output begins, without the output itself.

    A graph keeps what it needs; the output of its last operation mostly is not among it. Whoever holds this instead of
    the output lets its memory go as soon as it is sent, if nobody else holds it: the reference counts prove that.
    """
    node = output.grad_fn
    if node is None or isinstance(node, _PYTHON_NODE):
        # A leaf has no node of its own, and a custom function's would not keep its graph alive: a view's does.
        with torch.enable_grad():
            return GradientEdge(output.view_as(output).grad_fn, 0)  # type: ignore[arg-type]
    return GradientEdge(node, output.output_nr)


def pairs(roots: Sequence[GradientEdge], gradients: Sequence[Tensor | None]) -> Roots:
    """The roots that the next stage used: those for which a gradient came back."""
    if len(roots) == len(gradients) == 1:
        gradient = gradients[0]
        return Roots((), ()) if gradient is None else Roots((roots[0],), (gradient,))
    found = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
    return Roots(tuple(root for root, _ in found), tuple(gradient for _, gradient in found))


def reachable_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that a backward from these tensors would give gradients to."""
    return [node.variable for node in _nodes(tensors) if hasattr(node, "variable")]


def is_compiled(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward from these tensors would run a graph that torch.compile has made."""
    return any(
        isinstance(node, BackwardCFunction) and type(node).__name__.startswith("Compiled") for node in _nodes(tensors)
    )


def _nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        fresh = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= fresh
        stack.extend(fresh)


def run_backward(roots: Roots, *, keep_graph: bool = False, inputs: tuple[Tensor, ...] = ()) -> None:
    """`torch.autograd.backward` without its checks of what is known to fit: 10 us less for each backward.

    Args:
        roots: Where it starts; nothing happens without any.
        keep_graph: Whether a part of the graph runs again later.
        inputs: Accumulate for these leaves only; for all if empty.
    """
    if roots.tensors:
        _engine.run_backward(
            roots.tensors, roots.gradients, keep_graph, False, inputs, allow_unreachable=True, accumulate_grad=True
        )


@lru_cache(maxsize=256)
def _root(weight: float, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Tensor:
    return torch.full(shape, weight, dtype=dtype, device=device)


def _is_scalar(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()


def _what(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
