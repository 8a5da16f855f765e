"""Small questions about modules, nodes and values that `tracer.py` asks while it records."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from torchdistpackage.errors import SplitError
from torchdistpackage.split.names import tensors_of
from torchdistpackage.split.operations import ASKS_FOR_GRADIENTS

__all__ = [
    "asks_for_gradients",
    "check_recordable",
    "has_hooks",
    "has_name",
    "is_plain_sequence",
    "may_write",
    "same_objects",
    "versions",
]


def has_name(function: Any) -> bool:
    """Whether generated code can say what it calls; a local or compiled function is an object that it is given."""
    if isinstance(function, FunctionType):
        return getattr(sys.modules.get(function.__module__), function.__name__, None) is function
    return not isinstance(function, (torch.jit.ScriptFunction, MethodType, functools.partial))


def may_write(node: fx.Node) -> bool:
    """Whether an operation may write into one of its arguments, by its name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and (name.endswith("_") or name.startswith("i") or name == "setitem")


def same_objects(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two dicts hold the same objects."""
    return len(before) == len(after) and all(name in after and after[name] is value for name, value in before.items())


def asks_for_gradients(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether the node only wants to be told of gradients, which there are none of yet."""
    return node.op == "call_method" and node.target in ASKS_FOR_GRADIENTS and isinstance(args[0], Tensor)


def check_recordable(model: nn.Module) -> None:
    """Refuses what belongs to the whole forward, of which no stage runs all, and what has no shape yet.

    Raises:
        SplitError: For these reasons.
    """
    if has_hooks(model):
        raise SplitError(
            f"{type(model).__name__} itself has hooks, and no stage runs the whole forward: register them on its "
            "submodules, or put the model into a module without hooks and split that one"
        )
    if lazy := [name for name, tensor in tensors_of(model) if is_lazy(tensor)]:
        raise SplitError(f"{lazy[0]} has no shape yet: call the model once before it is split")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be told when the module runs."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in hooks)


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether running its members in turn is all that the module does."""
    own = "forward" in vars(module)
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not own


def versions(value: Any) -> list[int]:
    """How often each tensor of a value has been changed in place."""
    leaves = pytree.tree_leaves(value)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
