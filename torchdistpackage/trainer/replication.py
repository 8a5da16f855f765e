"""Stages among replicas: each wrapped or sharded as the arguments say, and the optimizer with them.

=========  ==================================  ==============================================  ==================
           stage                               optimizer                                       a rank keeps of it
=========  ==================================  ==============================================  ==================
ddp        `DDP` around it                     as it is                                        all
fsdp2      `fully_shard`, layer by layer       as it is, over shards                           1/d, weights too
zero1      as it is                            `Bf16ZeroOptimizer(stage=1)`                    1/d
zero2      as it is                            `Bf16ZeroOptimizer(stage=2)`                    1/d, gradients too
=========  ==================================  ==============================================  ==================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from torchdistpackage.errors import TrainerError
from torchdistpackage.parallel import DDP
from torchdistpackage.parallel.fully_sharded import refuse_device
from torchdistpackage.topology import tpc

__all__ = ["quiet_contexts", "replicated", "sharded_optimizer"]


def replicated(stages: Mapping[int, nn.Module], kind: str) -> dict[int, nn.Module]:
    """This rank's stages, ready for the data group.

    Args:
        stages: Global index -> module, on its device.
        kind: `"ddp"`, `"fsdp2"`, `"zero1"` or `"zero2"`.

    Raises:
        TrainerError: `fully_shard` cannot shard a stage here.
    """
    replicas = tpc.get_dp_size()
    if kind == "ddp":
        if replicas == 1:
            return dict(stages)
        # Left alone, torch's wrapper changes the order in which three or more replicas are summed after its first step
        # in a process, and a resumed run would have other bits.
        return {index: DDP(stage, find_unused_parameters=replicas > 2) for index, stage in stages.items()}
    if kind == "fsdp2" and replicas > 1:
        for stage in stages.values():
            _fully_shard(stage)
    return dict(stages)


def _fully_shard(stage: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = tpc.mesh["data"]
    try:
        refuse_device(stage)
        for block in _blocks(stage):
            fully_shard(block, mesh=mesh)
        fully_shard(stage, mesh=mesh)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise TrainerError(
            f"fully_shard cannot shard a {type(stage).__name__} over {mesh.size()} replicas: {error}. "
            "data_parallel='zero2' shards gradients and optimizer state of any stage"
        ) from error


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: entries of the containers, if they share no parameter with others."""
    owners: dict[int, int] = {}
    for _, parameter in stage.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: list[nn.Module] = []
    for container in stage.modules():
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or container is stage:
            continue
        for block in container.children():
            own = [parameter for _, parameter in block.named_parameters(remove_duplicate=False)]
            shared = any(owners[id(parameter)] > 1 for parameter in own)
            inside = any(block is other or block in other.modules() for other in found)
            if own and not shared and not inside and not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                found.append(block)
    return found


def sharded_optimizer(optimizer: torch.optim.Optimizer, kind: str) -> torch.optim.Optimizer:
    """The optimizer, sharded over the data group where the arguments say so.

    Raises:
        PipelineError: The optimizer cannot be sharded.
    """
    if kind not in ("zero1", "zero2") or tpc.get_dp_size() == 1:
        return optimizer
    from torchdistpackage.parallel import Bf16ZeroOptimizer

    # A bucket is memory on top of the shards while it is reduced: 25 million elements, not the default of 500 million.
    return Bf16ZeroOptimizer(optimizer, stage=1 if kind == "zero1" else 2, bucket_size=25e6)


def quiet_contexts(
    stages: Mapping[int, nn.Module], optimizer: torch.optim.Optimizer
) -> list[Callable[[], AbstractContextManager[Any]]]:
    """What keeps gradients from being reduced by all but the last of several backwards."""
    modules = [stage for stage in stages.values() if isinstance(stage, DDP) and tpc.get_dp_size() > 1]
    owners: list[Any] = [*modules, *([optimizer] if hasattr(optimizer, "no_sync") else [])]
    return [owner.no_sync for owner in owners]
