"""What a sharded optimizer refuses at construction, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.same_start import agree_on_parameters, broadcast_tensors, source_rank
from torchdistpackage.parallel.zero_group import ShardGroup
from torchdistpackage.topology.expert_replicas import SAME_EXPERTS, different_experts

__all__ = ["check_arguments", "check_optimizer", "check_parameters", "start_alike"]

_WHOLE_TENSORS = ("Adafactor", "Muon")  # of torch.optim, in newer versions of torch
_NEVER = {
    "LBFGS": "it computes one direction from all parameters together",
    "SparseAdam": "it takes sparse gradients, which cannot be averaged by elements",
}


def check_optimizer(optim: Any, partition: str) -> None:
    """Refuses what is no optimizer, or one that sharding would make another optimizer.

    Raises:
        PipelineError: It is such a one.
    """
    name = type(optim).__name__
    if not isinstance(optim, torch.optim.Optimizer) or not hasattr(optim, "param_groups"):
        raise PipelineError(
            f"Bf16ZeroOptimizer wraps an optimizer, got {name}; pass "
            "Bf16ZeroOptimizer(torch.optim.AdamW(model.parameters()))"
        )
    kinds = {kind.__name__ for kind in type(optim).__mro__}
    if "Bf16ZeroOptimizer" in kinds or "ZeroRedundancyOptimizer" in kinds:
        raise PipelineError(f"this {name} shards its state already; wrap the optimizer that is inside of it")
    for other, reason in _NEVER.items():
        if other in kinds:
            raise PipelineError(f"{name} cannot be sharded: {reason}; use it as it is, on every rank")
    found = kinds.intersection(_WHOLE_TENSORS)
    if found and partition == "elements":
        raise PipelineError(
            f"{name} looks at whole tensors, and a piece of one is another tensor; pass partition='parameters', which "
            "leaves every parameter whole on one rank"
        )


def check_arguments(stage: Any, bucket_size: Any, partition: Any, reduce_dtype: Any) -> None:
    """Refuses wrong values.

    Raises:
        PipelineError: One is wrong.
    """
    if stage not in (1, 2) or not isinstance(stage, int) or isinstance(stage, bool):
        raise PipelineError(
            f"stage must be 1 (shard the optimizer's state) or 2 (and gradients), got {stage!r}; for stage 3, which "
            "shards the parameters too, apply torch.distributed.fsdp.fully_shard to the modules"
        )
    if (
        not isinstance(bucket_size, (int, float))
        or isinstance(bucket_size, bool)
        or not 1 <= bucket_size < float("inf")
    ):
        raise PipelineError(f"bucket_size is a number of elements, at least 1, got {bucket_size!r}; try 25e6")
    if partition not in ("elements", "parameters"):
        raise PipelineError(f"partition must be 'elements' or 'parameters', got {partition!r}")
    if reduce_dtype is not None and not (isinstance(reduce_dtype, torch.dtype) and reduce_dtype.is_floating_point):
        raise PipelineError(f"reduce_dtype must be a floating torch.dtype or None, got {reduce_dtype!r}")


def check_parameters(groups: Sequence[Sequence[Tensor]], ranks: Sequence[int]) -> None:
    """Refuses parameters that are given twice, or that are sharded over the same ranks already.

    Args:
        groups: The parameters of each group.
        ranks: The global ranks that are to share.

    Raises:
        PipelineError: There is such a one.
    """
    places: dict[int, int] = {}
    everything = [parameter for group in groups for parameter in group]
    for index, parameter in enumerate(everything):
        first = places.setdefault(id(parameter), index)
        if first != index:
            raise PipelineError(
                f"parameters {first} and {index} of the optimizer are one tensor; give each once, as "
                "module.parameters() does"
            )
        if parameter.is_meta:
            raise PipelineError(
                f"parameter {index} of the optimizer is on the meta device: call module.to_empty(device=...) and load "
                "its weights first, and then make the optimizer"
            )
        if parameter.requires_grad and not parameter.is_floating_point():
            raise PipelineError(f"parameter {index} of the optimizer is {parameter.dtype}; only real ones are sharded")
        mesh = getattr(parameter, "device_mesh", None)
        for dim, placement in enumerate(getattr(parameter, "placements", ())):
            assert mesh is not None
            common = set(dist.get_process_group_ranks(mesh.get_group(dim))) & set(ranks)
            if not placement.is_replicate() and len(common) > 1:
                raise PipelineError(
                    f"parameter {index} of the optimizer is sharded already, by fully_shard or over these ranks "
                    f"{sorted(common)}: its optimizer's state is 1/{len(common)} as it is. Use the plain optimizer"
                )


def start_alike(groups: Sequence[Sequence[Tensor]], shards: ShardGroup, arguments: Sequence[Any]) -> None:
    """Every rank gets the weights of the first one of its group: it will write a part of them only. Collective.

    Raises:
        PipelineError: The ranks have other parameters, other experts, or other arguments.
    """
    everything = [parameter for parameters in groups for parameter in parameters]
    for group in shards.groups:
        if wrong := different_experts(everything, group):
            raise PipelineError(f"Bf16ZeroOptimizer: {wrong}; {SAME_EXPERTS}")
    kinds = [
        f"{number}.{index} {tuple(p.shape)} {p.dtype} {p.requires_grad}"
        for number, parameters in enumerate(groups)
        for index, p in enumerate(parameters)
    ]
    for group in shards.groups:
        agree_on_parameters("Bf16ZeroOptimizer", [*kinds, str(arguments)], group)
        broadcast_tensors(everything, group, source_rank(group, 0))
