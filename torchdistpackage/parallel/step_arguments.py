"""What `forward_backward` is given, looked at before anything runs: one sentence for each way to get it wrong.

What is refused here would else run as something that was not meant, or fail steps later in words of somebody else's.
Neighbours: `pipeline_sched.py` asks here first, and says what does not fit the schedule; `step_plan.py` reads that.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.words import with_type

__all__ = ["check_functions", "check_memory_limit", "check_options"]

_ORDER = "the order of arguments is forward_backward(optimizer, fwd_fn, bwd_fn, inputs, ...)"


def check_functions(optimizer: Any, fwd_fn: Any, bwd_fn: Any) -> None:
    """Refuses what is no optimizer, or no function; a list has one function a stage.

    Raises:
        PipelineError: One of them is something else.
    """
    if fwd_fn is None:
        raise PipelineError("fwd_fn is missing: pass the function that runs this stage, fwd_fn(inputs)")
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise PipelineError(f"optimizer is a {type(optimizer).__name__} without zero_grad(); {_ORDER}")
    for name, function in _entries("fwd_fn", fwd_fn):
        if not callable(function):
            raise PipelineError(f"{name} must be callable, got {with_type(function)}; {_ORDER}")
    for name, function in _entries("bwd_fn", bwd_fn):
        if function is not None and not callable(function):
            raise PipelineError(
                f"{name} must be a function of (output, output_grad) or None, got {with_type(function)}; {_ORDER}"
            )


def check_options(forward_only: Any, loss_reduction: Any, dtype: Any, data_parallel: Any, scaler: Any) -> None:
    """Refuses options of another kind than the one that is asked for.

    Raises:
        PipelineError: One of them is something else.
    """
    if not isinstance(forward_only, bool):
        meant = repr(forward_only) if isinstance(forward_only, str) else '"zb-h1"'
        raise PipelineError(
            f"forward_only must be True or False, got {with_type(forward_only)}; it is the sixth argument by position, "
            f"and a schedule is given by keyword, schedule={meant}"
        )
    if loss_reduction not in ("mean", "sum"):
        raise PipelineError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PipelineError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise PipelineError(f"scaler must be a PipelineGradScaler or None, got {with_type(scaler)}")
    for entry in _flat(data_parallel):
        if entry is not None and not isinstance(entry, nn.Module):
            raise PipelineError(
                f"data_parallel holds {with_type(entry)}; pass the data-parallel modules that fwd_fn uses, a module or "
                "a list of modules, or leave data_parallel out to have them found"
            )


def check_memory_limit(limit: Any) -> None:
    """Refuses what is no number of bytes: the plan that it bounds is made some steps later.

    Raises:
        PipelineError: It is none.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Real) or not float(limit) > 0):
        raise PipelineError(
            f"memory_limit must be a number of bytes above 0, such as memory_limit=2e9 for 2 GB, got {limit!r}"
        )


def _entries(name: str, given: Any) -> list[tuple[str, Any]]:
    if isinstance(given, (list, tuple)):
        return [(f"{name}[{i}]", entry) for i, entry in enumerate(given)]
    return [(name, given)]


def _flat(given: Any) -> list[Any]:
    return [each for entry in given for each in _flat(entry)] if isinstance(given, (list, tuple)) else [given]
