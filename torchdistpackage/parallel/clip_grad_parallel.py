"""Gradient clipping by the norm of the whole model, of which each rank holds a part.

::

    ||g||_p = ( sum over ranks of ||g_rank||_p ^ p ) ^ (1/p)         p-th powers are added, never norms

Every rank of the pipeline takes part, with or without gradients, and every rank gets the same norm, so that all ranks
clip by the same factor and decide the same on non-finite gradients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.parallel.dtensors import (
    is_sharded_over_tensor_group,
    local_tensor,
    settle_gradient,
    sharding_groups,
)
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.sharded_gradients import holder, holders
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.topology import tpc
from torchdistpackage.topology.expert_replicas import counts_elsewhere, spread_group
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
    parameter that lives on several stages, or is given more than once, counts once.

    Over the tensor group: if any rank has DTensors over it (`apply_tensor_parallel`, `TpMlp`, torch's
    `parallelize_module`), those say how they are sharded, and all other parameters are whole on every rank and count
    once. If there are none, every rank's parameters count, as shards, but for those that are named in `replicated`.
    Gradients that a `Bf16ZeroOptimizer` holds are reduced first, and count over its group. Experts that
    `create_moe_dp_hooks` was given count over the data group, each once.

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
        >>> stage = torch.nn.Linear(3, 1, bias=False)
        >>> stage(torch.full((1, 3), 2.0)).sum().backward()  # in a loop: forward_backward(...)
        >>> clip_grad_norm_(stage.parameters(), 1.0)
        tensor(3.4641)
        >>> stage.weight.grad.norm()
        tensor(1.0000)
    """
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    own = list({id(parameter): parameter for parameter in given}.values())  # chunks of one rank may share some
    tied, whole, sharded = ties(), {id(p) for p in replicated}, holders(own)
    with guarded("clip_grad_norm_"):
        norm_type = float(norm_type)
        if not norm_type > 0:
            raise ValueError(f"norm_type must be positive or inf, got {norm_type}")
        for holding in sharded:
            holding.settle()
        for parameter in own:
            settle_gradient(parameter)
        counted = [p for p in own if not tied.counts_elsewhere(p)]
        held = {at: norm for holding in sharded for at, norm in holding.norms(counted, norm_type).items()}
        total = _total_norm(counted, whole, held, norm_type)
    with_grad = [p for p in own if p.grad is not None and holder(p) is None]
    like = [*(holding.like() for holding in sharded), *with_grad, *own, torch.empty(())][0]
    total = total.to(dtype=like.dtype, device=like.device)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, on every rank; find the layer "
            "that made it, or pass error_if_nonfinite=False to clip all the same"
        )
    scaled = [tensor for holding in sharded for tensor in holding.with_gradients(own)]
    _scale([local_tensor(tensor.grad) for tensor in [*with_grad, *scaled]], max_norm, total)
    for holding in sharded:
        holding.remember()
    return total


@torch.no_grad()
def _scale(gradients: list[Tensor], max_norm: float, total: Tensor) -> None:
    """As torch's `clip_grads_with_norm_`, which cannot scale DTensors beside other tensors."""
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for kind in _by_kind(gradients):
        torch._foreach_mul_(kind, factor.to(kind[0].device))


@dataclass
class _Shards:
    """Gradients that are sharded alike: the local tensors, and the groups over which their amounts are added."""

    groups: tuple[dist.ProcessGroup, ...]
    sharded: list[Tensor] = field(default_factory=list)  # over the tensor group, too
    whole: list[Tensor] = field(default_factory=list)  # on every rank of the tensor group
    plain: list[Tensor] = field(default_factory=list)  # no DTensor over the tensor group: nothing says which


def _total_norm(parameters: list[Tensor], whole: set[int], held: Mapping[int, Tensor], norm_type: float) -> Tensor:
    """The whole model's norm, in float64; `held` has the norms of gradients that an optimizer holds, by parameter.

    Powers are added in float64, parameter by parameter: a large norm's power must not overflow, and where the model is
    cut must not change a bit of the result. Whether plain tensors are shards is known once all ranks have told each
    other whether there is any DTensor over the tensor group: both sums travel, and the answer chooses.
    """
    device, infinite = communication_device(None), math.isinf(norm_type)
    first = tpc.get_group_size("tensor") == 1 or tpc.get_group_rank("tensor") == 0
    op = dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM
    amounts = torch.zeros(4, dtype=torch.float64, device=device)  # certain, plain as shards, plain as whole, said so
    for shards in _sorted_by_sharding(parameters, whole, held):
        mine = [shards.sharded + (shards.whole if first else []), shards.plain, shards.plain if first else []]
        part = torch.stack([_amount(gradients, norm_type, device) for gradients in mine])
        for group in shards.groups:
            dist.all_reduce(part, op=op, group=group)
        amounts[:3] = torch.maximum(amounts[:3], part) if infinite else amounts[:3] + part
    amounts[3] = any(is_sharded_over_tensor_group(parameter) is not None for parameter in parameters)
    for mode in ("pipe", "tensor"):
        if tpc.get_group_size(mode) > 1:
            dist.all_reduce(amounts, op=op, group=tpc.get_group(mode))
    plain = torch.where(amounts[3] > 0, amounts[2], amounts[1])
    return torch.maximum(amounts[0], plain) if infinite else (amounts[0] + plain) ** (1.0 / norm_type)


def _sorted_by_sharding(parameters: list[Tensor], whole: set[int], held: Mapping[int, Tensor]) -> list[_Shards]:
    """By parameters, not by gradients: ranks of a group must agree on what is to be reduced, in one order."""
    found: dict[tuple[str, ...], _Shards] = {}
    if tpc.is_mode_inited("moe_ep"):  # a rank may have no expert at all
        data = tpc.get_group("data")
        found[(data.group_name,)] = _Shards((data,))
    for parameter in parameters:
        experts = spread_group(parameter)
        groups = (*sharding_groups(parameter), *([] if experts is None else [experts]))
        sharded = is_sharded_over_tensor_group(parameter)
        shards = found.setdefault(tuple(group.group_name for group in groups), _Shards(groups))
        norm = held.get(id(parameter))  # stands for its gradient: it is a number's own norm
        if norm is None and (parameter.grad is None or holder(parameter) is not None):
            continue
        if experts is not None and counts_elsewhere(parameter):
            continue
        local = local_tensor(parameter.grad).detach() if norm is None else norm
        if id(parameter) in whole or sharded is False:
            shards.whole.append(local)
        else:
            (shards.plain if sharded is None else shards.sharded).append(local)
    return list(found.values())


def _amount(gradients: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The sum of the p-th powers of their norms, or the largest norm; one call for all gradients of a kind."""
    kinds = _by_kind([gradient for gradient in gradients if gradient.numel()])  # a shard may be empty
    norms = [norm for kind in kinds for norm in torch._foreach_norm(kind, norm_type)]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    amounts = torch.stack([norm.to(dtype=torch.float64, device=device) for norm in norms])
    return amounts.max() if math.isinf(norm_type) else (amounts**norm_type).sum()


def _by_kind(gradients: list[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        kinds[gradient.device, gradient.dtype].append(gradient)
    return list(kinds.values())
