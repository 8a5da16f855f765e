"""Calls the user's function that shards or wraps each stage: `fully_shard` in place, or DistributedDataParallel around.

How a stage is made parallel within itself is the user's business; here is only who is called with what.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["parallelized"]


def parallelized(
    part: nn.Module,
    function: Callable[..., Any],
    world_mesh: Any,
    moe_mesh: Any,
    axes: dict[str, Any],
) -> nn.Module:
    """What the user's function makes of a stage.

    Args:
        part: The stage.
        function: See `ParallelizeFnProtocol`; `pp_enabled=True` goes to those that have a parameter for it.
        world_mesh: First mesh argument.
        moe_mesh: Second mesh argument.
        axes: Names of axes, by keyword.

    Returns:
        The module that the function returned, or else the stage, changed in place.

    Example:
        >>> stage = nn.Linear(2, 2)
        >>> parallelized(stage, lambda model, world, moe, **axes: None, None, None, {}) is stage
        True
    """
    options = {"pp_enabled": True} if _takes(function, "pp_enabled") else {}
    made = function(part, world_mesh, moe_mesh, **options, **axes)
    return made if isinstance(made, nn.Module) else part


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
