"""What the runtime asks of autograd: leaves for what arrives, roots for what left, and the right start of a backward.

The loss of a micro-batch counts with its share of the batch. The share is the *start* of the backward (the root's
gradient), not a division of the user's loss: no extra kernel, the user's tensor stays as it is, and the bits are those
of `(loss * share).backward()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError

__all__ = ["BackwardFn", "backward_from_gradients", "backward_from_loss", "differentiable_alias"]

BackwardFn = Callable[[Any, Any], Any]

_engine = torch.autograd.Variable._execution_engine
_unsafe_view = torch.ops.aten._unsafe_view.default


def differentiable_alias(leaf: Tensor) -> Tensor:
    """What the user's stage gets in place of a leaf that collects a gradient.

    A stage may begin with an in-place operation (a ReLU): on a leaf, or on a view of one, autograd refuses it. This is
    neither, shares the memory, and costs about 2 us.
    """
    alias: Tensor = _unsafe_view(leaf, leaf.shape)
    return alias


def backward_from_loss(loss: Any, weight: float, custom: BackwardFn | None) -> None:
    """Runs the backward of the loss stage.

    Args:
        loss: What the user's function returned.
        weight: What this micro-batch counts: its share of the batch, or 1.
        custom: The user's `bwd_fn(output, None)`; gets the weighted loss.

    Raises:
        PipelineError: The loss is not a scalar that requires a gradient, and no custom backward takes it.
    """
    scalar = isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()
    if custom is not None:
        custom(loss if not scalar or weight == 1.0 else loss * weight, None)
        return
    if not scalar:
        raise PipelineError(
            f"in training the last stage's fwd_fn must return the loss, a scalar tensor; it returned {_what(loss)}. "
            "For evaluation call with forward_only=True"
        )
    if not loss.requires_grad:
        raise PipelineError(
            "the loss does not require a gradient: does the last stage run under torch.no_grad(), or detach its input?"
        )
    _run((loss,), (_root(weight, loss.dtype, loss.device, loss.shape),))


def backward_from_gradients(
    output: Any, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], custom: BackwardFn | None
) -> None:
    """Runs the backward of a stage that is not the last.

    Args:
        output: What the user's function returned; only a custom backward looks at it.
        roots: The tensors of the output that require a gradient.
        gradients: Their gradients, from the next stage; None where it did not use the tensor.
        custom: The user's `bwd_fn(output, output_grad)`; for a bare tensor output_grad is a tensor, else a list with
            one entry for each of `roots`.
    """
    if custom is not None:
        custom(output, gradients[0] if isinstance(output, Tensor) else list(gradients))
        return
    if len(roots) == 1:
        if gradients[0] is not None:
            _run((roots[0],), (gradients[0],))
        return
    pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
    if pairs:
        _run(tuple(root for root, _ in pairs), tuple(gradient for _, gradient in pairs))


def _run(roots: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` without its checks of what is known to fit: 10 us less for each backward."""
    _engine.run_backward(roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


@lru_cache(maxsize=256)
def _root(weight: float, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Tensor:
    return torch.full(shape, weight, dtype=dtype, device=device)


def _what(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
