"""What is done to the gradients of all stages of a rank between the step and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel import clip_grad_norm_

__all__ = ["divide_gradients", "scale_grads_and_clip_grad_norm"]


def scale_grads_and_clip_grad_norm(
    max_grad_norm: float | None,
    model_parts: Sequence[nn.Module],
    *,
    norm_type: float = 2.0,
    pp_enabled: bool = False,
    device_mesh: Any = None,
    moe_mesh: Any = None,
    ep_axis_name: str | None = None,
    pp_axis_name: str | None = None,
    foreach: bool | None = True,
    num_label_tokens: int | None = None,
    dp_group_size: int | None = None,
    expert_tp_replication_factor: int = 1,
    use_torch_clip_grad_norm: bool = False,
) -> Tensor:
    """Divides gradients that are sums over tokens by their number, and clips them by the norm of the whole model.

    Data-parallel wrappers have divided by the number of replicas, which is taken back: the divisor is `num_label_tokens
    / dp_group_size`. Collective over the pipeline, as `torchdistpackage.clip_grad_norm_`, which needs no mesh.

    Args:
        max_grad_norm: The norm that the gradients have at most afterwards; None to measure it only.
        model_parts: This rank's stages.
        norm_type: p of the norm.
        pp_enabled: Whether to divide.
        device_mesh: Accepted.
        moe_mesh: Accepted.
        ep_axis_name: Expert parallelism with gradients of its own is not supported; None.
        pp_axis_name: Accepted.
        foreach: Accepted.
        num_label_tokens: Tokens that count in the loss, of all replicas.
        dp_group_size: Replicas; 1 when not given.
        expert_tp_replication_factor: Accepted.
        use_torch_clip_grad_norm: Accepted.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        PipelineError: There is an expert-parallel axis; or another rank failed.

    Example:
        >>> part = nn.Linear(2, 1, bias=False)  # autopipeline.parts
        >>> part(torch.ones(4, 2)).sum().backward()
        >>> scale_grads_and_clip_grad_norm(1.0, [part], pp_enabled=True, num_label_tokens=4)
        tensor(1.4142)
        >>> part.weight.grad.norm()
        tensor(1.0000)
    """
    if ep_axis_name is not None:
        raise PipelineError(
            f"ep_axis_name={ep_axis_name!r}: gradients of experts that are spread over ranks are scaled by hand; leave "
            "it out where experts are sharded with fully_shard"
        )
    if pp_enabled and num_label_tokens is not None:
        divide_gradients(model_parts, num_label_tokens / (dp_group_size or 1))
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    return clip_grad_norm_((p for part in model_parts for p in part.parameters()), limit, norm_type)


@torch.no_grad()
def divide_gradients(parts: Sequence[nn.Module], divisor: float) -> None:
    """Divides the gradients of all stages in place; a parameter of several stages once."""
    for parameter in {id(p): p for part in parts for p in part.parameters()}.values():
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
