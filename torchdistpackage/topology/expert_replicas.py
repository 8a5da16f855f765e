"""Which ranks hold the same expert, where those are fewer than the replicas of the layers around it.

::

    rank             0        1        2        3
    layers           all      all      all      all         replicas: the data group
    experts          A B      C D      A B      C D         replicas: 0 2 and 1 3; the model's experts are A B C D

Whoever takes the ranks of the data group for equals asks here first: the norm counts each expert on one of its ranks
and adds over the data group, checkpoints save all of them, and what reduces gradients over replicas, or shares
parameters out over them, refuses to mix different experts. `parallel/moe_data_parallel.py` registers them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.topology.context import tpc

__all__ = ["LEAVE_ALONE", "SAME_EXPERTS", "counts_elsewhere", "different_experts", "forget", "register", "spread_group"]

LEAVE_ALONE = "list experts in module._ddp_params_and_buffers_to_ignore before it is wrapped"
SAME_EXPERTS = (
    "take the ranks that hold the same experts, tpc.get_group('moe_dp'), which have all other parameters in common, too"
)

_replicas: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> the global ranks that hold the same


def register(parameter: Tensor, group: dist.ProcessGroup) -> None:
    """From now on the parameter is known as an expert's, with a replica on each rank of the group."""
    _replicas[parameter] = tuple(dist.get_process_group_ranks(group))


def forget(parameter: Tensor) -> None:
    """The parameter is nothing special any more."""
    _replicas.pop(parameter, None)  # type: ignore[no-untyped-call]


def spread_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The data group, if its ranks hold different experts in this parameter's place; None for all other parameters."""
    replicas = _ranks(parameter)
    if not replicas or not tpc.is_mode_inited("data"):
        return None
    return tpc.get_group("data") if set(replicas) < set(tpc.get_ranks_in_group("data")) else None


def counts_elsewhere(parameter: Tensor) -> bool:
    """Whether another rank counts this expert in a sum over `spread_group`."""
    return _ranks(parameter)[0] != dist.get_rank()


def different_experts(parameters: Iterable[Tensor], *groups: dist.ProcessGroup) -> str | None:
    """What is wrong with taking the ranks of these groups for replicas of all parameters; None if nothing is.

    Args:
        parameters: Of this rank.
        groups: Of the ranks that would take them for the same. Nobody asks for their ranks where there are no experts:
            they may have been destroyed.
    """
    if not _replicas:
        return None
    shared = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
    for index, parameter in enumerate(parameters):
        replicas = _ranks(parameter)
        if replicas and len(shared) > 1 and not shared <= set(replicas):
            return (
                f"parameter {index}, of shape {tuple(parameter.shape)}, is of experts that ranks {list(replicas)} hold "
                f"alone, and ranks {sorted(shared)} would be taken to have the same"
            )
    return None


def _ranks(parameter: Tensor) -> tuple[int, ...]:
    """Those that hold the same; none if it is not an expert's."""
    found: tuple[int, ...] = _replicas.get(parameter, ())  # type: ignore[no-untyped-call]
    return found
