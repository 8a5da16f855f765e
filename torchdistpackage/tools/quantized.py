"""Linear layers -> the 8-bit ones of other packages, which are optional: a function is None where its package is not.

bitsandbytes is maintained. bminf no longer is: its function is here so that programs that ask for it can look.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchdistpackage.tools.replace import replace_all_module

__all__ = ["replace_linear_by_bminf", "replace_linear_by_bnb"]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # not installed, or its compiled half does not fit this machine
        return None


bnb, bminf = _package("bitsandbytes"), _package("bminf")


def _is_linear(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear  # a subclass computes something else, or is 8-bit already


def _by_bnb(model: nn.Module, bnb_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Replaces every `nn.Linear` inside a model by `bitsandbytes.nn.Linear8bitLt`, in place.

    bitsandbytes quantizes a weight when it is moved to a device, so the new layers are made on the CPU and moved to
    where the old ones were.

    Args:
        model: Is changed.
        bnb_kwargs: Of `Linear8bitLt`; by default `has_fp16_weights=False` (inference) and `threshold=6.0` (columns
            with larger values are multiplied in 16 bits).

    Returns:
        The model.

    Example:
        >>> model = replace_linear_by_bnb(model.half(), {"has_fp16_weights": False})  # doctest: +SKIP
    """
    options = {"has_fp16_weights": False, "threshold": 6.0} if bnb_kwargs is None else dict(bnb_kwargs)

    def new_linear(name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        has_bias = module.bias is not None
        new: nn.Module = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=has_bias, **options)
        new.to(dtype=module.weight.dtype)
        new.load_state_dict(module.state_dict())
        return new.to(module.weight.device)

    return replace_all_module(model, _is_linear, new_linear)


def _by_bminf(model: nn.Module) -> nn.Module:
    """Replaces every `nn.Linear` inside a model by `bminf.QuantizedLinear`, in place; returns the model."""
    return replace_all_module(model, _is_linear, lambda name, module: bminf.QuantizedLinear(module))


replace_linear_by_bnb: Callable[..., nn.Module] | None = None if bnb is None else _by_bnb
replace_linear_by_bminf: Callable[..., nn.Module] | None = None if bminf is None else _by_bminf
