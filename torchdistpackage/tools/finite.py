"""Whether numbers are finite: of one value, of a model's parameters, and around one module that you hook by hand.

`nan_finder.py` does it for a whole model. What both share is `Trouble`: how bad a value is, in one pass over it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from torchdistpackage.tools.values import plain_tensors, tensors_in

__all__ = ["Trouble", "bwd_hook_wrapper", "check_model_params", "check_tensors", "fwd_hook_wrapper", "trouble_in"]

logger = logging.getLogger(__name__)


class Trouble(IntEnum):
    """How bad numbers are. From Inf, NaN may follow, not the other way round."""

    NONE = 0
    INF = 1
    NAN = 2

    @property
    def words(self) -> str:
        """As in messages."""
        return ("finite", "Inf", "NaN")[self]


@torch.no_grad()
def trouble_in(tensors: Iterable[torch.Tensor]) -> Trouble:
    """The worst that is in some tensors. Integers, booleans and tensors on the meta device are never bad.

    Reads every element once and makes no copy; on CUDA it waits for the result, once for all tensors of
    a type.

    Example:
        >>> trouble_in([torch.tensor([1.0, -math.inf]), torch.tensor([3])]).words
        'Inf'
    """
    values = [value for extremes in _extremes(tensors) for value in torch.stack(extremes).tolist()]
    if any(map(math.isnan, values)):
        return Trouble.NAN
    return Trouble.INF if any(map(math.isinf, values)) else Trouble.NONE


def _extremes(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Smallest and largest element of each tensor, grouped by device and type; both are NaN if an element is."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        for part in plain_tensors(tensor.detach()):
            if part.is_complex():
                part = torch.view_as_real(part.resolve_conj())
            if part.is_floating_point() and part.numel() and not part.is_meta:
                if part.element_size() == 1:
                    part = part.float()  # the 8-bit types cannot be compared
                groups.setdefault((part.device, part.dtype), []).extend(torch.aminmax(part))
    return list(groups.values())


def check_tensors(inputs: Any) -> bool:
    """Whether all numbers are finite: neither NaN nor Inf.

    Args:
        inputs: A tensor, or tensors in nested lists, tuples, mappings, dataclasses; other things are finite.

    Example:
        >>> check_tensors({"logits": torch.zeros(2), "tokens": [torch.tensor(3)]})
        True
    """
    return not trouble_in(tensors_in(inputs))


def check_model_params(model: nn.Module) -> bool:
    """Whether all parameters are finite; each one that is not is logged as a warning.

    Example:
        >>> check_model_params(nn.Linear(2, 2))
        True
    """
    found = [(name, trouble_in([parameter])) for name, parameter in model.named_parameters()]
    for name, trouble in found:
        if trouble:
            logger.warning("parameter %s holds %s", name, trouble.words)
    return not any(trouble for _, trouble in found)


def fwd_hook_wrapper(module_name: str = "") -> Callable[[nn.Module, Any, Any], None]:
    """A hook that logs a warning where inputs or outputs of a module are not finite.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(fwd_hook_wrapper("fc"))
    """

    def check_value(module: nn.Module, args: Any, output: Any) -> None:
        _warn(module_name or type(module).__name__, "input", args)
        _warn(module_name or type(module).__name__, "output", output)

    return check_value


def bwd_hook_wrapper(module_name: str = "") -> Callable[[nn.Module, Any, Any], None]:
    """A hook that logs a warning where gradients that reach a module, or that it passes on, are not finite.

    Full backward hooks do not go with layers that work in place on the module's inputs or outputs; `find_nan` does.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_full_backward_hook(bwd_hook_wrapper("fc"))
    """

    def check_value(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        _warn(module_name or type(module).__name__, "grad_output", grad_output)
        _warn(module_name or type(module).__name__, "grad_input", grad_input)

    return check_value


def _warn(module_name: str, what: str, value: Any) -> None:
    trouble = trouble_in(tensors_in(value))
    if trouble:
        logger.warning("%s of %s holds %s", what, module_name, trouble.words)
