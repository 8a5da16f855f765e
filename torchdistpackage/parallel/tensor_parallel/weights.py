"""Parameters of tensor-parallel layers: DTensors that come from whole tensors.

`distribute_tensor` sends the shards of the first rank's tensor, so that equal seeds are not needed anywhere.
Neighbours: `layers.py` is made of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up

__all__ = ["set_whole", "spread", "take_over"]


def spread(module: nn.Module, mesh: DeviceMesh, name: str, shape: Sequence[int], placement: Placement) -> None:
    """Turns a parameter into a DTensor of that shape (its own if empty) with the numbers of the first rank."""
    whole = getattr(module, name)
    if whole is not None:
        viewed = whole.detach().reshape(shape) if shape else whole.detach()
        shards = _distributed(viewed, mesh, [placement])
        setattr(module, name, nn.Parameter(shards, requires_grad=whole.requires_grad))


def take_over(linear: Any, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> None:
    """Gives a layer of that whole shape, (in, out), the parameters of a dense one; a bias of None changes nothing.

    Raises:
        SplitError: A shape is another, or the layer has no bias.
    """
    for name, given, wanted in (("weight", weight, shape), ("bias", bias, shape[1:])):
        if given is not None and tuple(given.shape) != wanted:
            hint = "; the weight of an nn.Linear has to be transposed" if tuple(given.shape) == wanted[::-1] else ""
            raise SplitError(f"the whole layer's {name} has shape {wanted} (in, out), got {tuple(given.shape)}{hint}")
    if bias is not None and linear.bias is None:
        raise SplitError(f"a bias of shape {tuple(bias.shape)} for a layer that has none; make it with bias=True")
    set_whole(linear.weight, weight)
    if bias is not None and linear.bias is not None:
        set_whole(linear.bias, bias)


@torch.no_grad()
def set_whole(parameter: Tensor, whole: Tensor) -> None:
    """Gives a parameter the values of a whole tensor; to a DTensor the first rank sends its own."""
    plain = whole.full_tensor() if isinstance(whole, DTensor) else whole.detach()
    if isinstance(parameter, DTensor):
        viewed = plain.to(device=parameter.device, dtype=parameter.dtype).reshape(parameter.shape)
        if any(placement.is_replicate() for placement in parameter.placements):
            viewed = viewed.clone()  # torch broadcasts in place: what the caller gave stays the caller's
        plain = _distributed(viewed, parameter.device_mesh, parameter.placements)
    parameter.copy_(plain)


def _distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """`distribute_tensor`; if a rank fails meanwhile, all say which, where a pipeline's board is there to tell."""
    # On the CPU, because under torch.device("meta") torch 2.6 fails to load what its DTensors need.
    with guarded_if_set_up("the weights of a tensor-parallel layer"), torch.device("cpu"):
        return distribute_tensor(whole, mesh, placements)
