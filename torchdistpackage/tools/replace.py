"""Modules of one kind are replaced by modules of another, wherever they are in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["replace_all_module"]

Model = TypeVar("Model", bound=nn.Module)


def replace_all_module(
    model: Model,
    if_replace_hook: Callable[[str, nn.Module], bool],
    get_new_module: Callable[[str, nn.Module], nn.Module],
) -> Model:
    """Replaces every module inside a model that a function chooses, in place.

    What is replaced is not searched, nor is what takes its place: a new module may hold the old one. A module that is
    in several places is replaced once and by one module, so that what was shared stays shared. The model itself is
    never replaced. New modules get the training flag of the old ones; an optimizer made before holds the old
    parameters, so make it afterwards.

    Args:
        model: Is changed.
        if_replace_hook: Called with a name and a module; whether to replace it. The name is the one that the module
            has in its parent: `"fc1"` for `blocks.0.mlp.fc1`.
        get_new_module: Called with the same; what to put there.

    Returns:
        The model.

    Raises:
        TypeError: An argument is not what it should be, or `get_new_module` returned something that is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
        >>> is_relu = lambda name, module: isinstance(module, nn.ReLU)
        >>> replace_all_module(model, is_relu, lambda name, module: nn.GELU())[1][0]
        GELU(approximate='none')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(if_replace_hook) or not callable(get_new_module):
        raise TypeError("if_replace_hook and get_new_module are functions of (name, module)")
    new_modules: dict[nn.Module, nn.Module] = {}
    searched: set[nn.Module] = set()

    def search(parent: nn.Module) -> None:
        if parent in searched:
            return
        searched.add(parent)
        # Not named_children(), which leaves out the second name of a module that a parent has twice.
        for name, module in list(parent._modules.items()):
            if module is None:
                continue
            if module not in new_modules:
                if not if_replace_hook(name, module):
                    search(module)
                    continue
                new_modules[module] = _new_module(name, module, get_new_module)
            setattr(parent, name, new_modules[module])

    search(model)
    return model


def _new_module(name: str, module: nn.Module, get_new_module: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    new = get_new_module(name, module)
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"get_new_module must return a torch.nn.Module, got {type(new).__name__} for {name!r} "
            f"({type(module).__name__}); to leave a module as it is, let if_replace_hook return False"
        )
    if new.training is not module.training:
        new.train(module.training)
    return new
