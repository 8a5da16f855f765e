"""The model's structure without its weights: the same modules and attributes, every tensor on the meta device.

It can be run to see who calls whom with what, and it answers for the layers that a stage does not hold, without keeping
those alive. Making one copies no weight and leaves the model as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError

__all__ = ["make_twin"]


def make_twin(model: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, in evaluation mode; parameters that are one tensor stay one tensor.

    Hooks stay behind: they are the user's, and may look at values.

    Raises:
        SplitError: The module cannot be copied.

    Example:
        >>> twin = make_twin(nn.Linear(2, 3))
        >>> twin.weight.device.type, twin.in_features
        ('meta', 2)
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_on_meta(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _on_meta(buffer)
    for module in model.modules():
        for name, value in vars(module).items():
            if "hook" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and id(value) not in memo:  # kept as a plain attribute
                memo[id(value)] = _on_meta(value)
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise SplitError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and its structure is looked "
            "at in a copy; keep what cannot be copied (locks, open files, process groups) out of the modules"
        ) from error


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)
