"""Gradient clipping by the norm of the whole model, of which each rank holds a part.

    ||g||_p = ( sum over ranks of ||g_rank||_p ^ p ) ^ (1/p)         p-th powers are added, never norms

Every rank of the pipeline takes part, with or without gradients, and every rank gets the same norm, so that all ranks
clip by the same factor and decide the same on non-finite gradients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.topology import tpc
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    replicated: Iterable[Tensor] = (),
) -> Tensor:
    """Clips the gradients of this rank's parameters as `torch.nn.utils.clip_grad_norm_` would those of the whole model.

    Collective over the pipe and the tensor group: call it on every rank, after the step and before the optimizer. A
    parameter that lives on several stages, or is given more than once, counts once. Over the tensor group every rank's
    parameters count, as shards; those that all of its ranks hold whole are named in `replicated`.

    Args:
        parameters: This rank's parameters, of all of its chunks; those without a gradient count nothing.
        max_norm: The norm that the gradients have at most afterwards.
        norm_type: p > 0, or `inf`.
        error_if_nonfinite: Raise, on every rank, if the total norm is NaN or infinite.
        replicated: Parameters that every rank of the tensor group holds whole.

    Returns:
        The norm before clipping, a 0-d tensor, the same on every rank.

    Raises:
        ValueError: norm_type is not positive.
        RuntimeError: The norm is not finite and `error_if_nonfinite` is set.
        PipelineError: Another rank has failed.
        TopologyError: Process groups have not been set up.

    Example:
        >>> forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=4)
        >>> total_norm = clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
    """
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    own = list({id(parameter): parameter for parameter in given}.values())  # chunks of one rank may share some
    with_grad = [p for p in own if p.grad is not None]
    tied = ties()
    elsewhere = {id(p) for p in own if tied.counts_elsewhere(p)}
    if tpc.get_group_size("tensor") > 1 and tpc.get_group_rank("tensor") > 0:
        elsewhere |= {id(p) for p in replicated}
    with guarded("clip_grad_norm_"):
        norm_type = float(norm_type)
        if not norm_type > 0:
            raise ValueError(f"norm_type must be positive or inf, got {norm_type}")
        counted = [p.grad for p in with_grad if id(p) not in elsewhere and p.grad is not None]
        total = _total_norm(counted, own, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, on every rank; find the layer "
            "that made it, or pass error_if_nonfinite=False to clip all the same"
        )
    torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, total)
    return total


def _total_norm(gradients: list[Tensor], own: list[Tensor], norm_type: float) -> Tensor:
    """The whole model's norm, in the dtype of this rank's gradients.

    Powers are added in float64, parameter by parameter: a large norm's power must not overflow, and where the model is
    cut must not change a bit of the result.
    """
    device, like = communication_device(None), (gradients or own or [torch.empty(())])[0]
    norms = [norm.to(dtype=torch.float64, device=device) for norm in _norms(gradients, norm_type)]
    amounts = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=device)
    if math.isinf(norm_type):
        amount = amounts.max()
        _all_reduce(amount, dist.ReduceOp.MAX)
    else:
        amount = (amounts**norm_type).sum()
        _all_reduce(amount, dist.ReduceOp.SUM)
        amount = amount ** (1.0 / norm_type)
    return amount.to(dtype=like.dtype, device=like.device)


def _norms(gradients: list[Tensor], norm_type: float) -> list[Tensor]:
    """The norm of each gradient, one call for all of a kind; a DTensor's is that of the whole tensor."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        kinds[type(gradient), gradient.device, gradient.dtype].append(gradient.detach())
    found = [norm for kind in kinds.values() for norm in torch._foreach_norm(kind, norm_type)]
    return [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in found]


def _all_reduce(amount: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    for mode in ("pipe", "tensor"):
        if tpc.get_group_size(mode) > 1:
            dist.all_reduce(amount, op=op, group=tpc.get_group(mode))
