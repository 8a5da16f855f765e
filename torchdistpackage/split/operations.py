"""The few functions of our own that a recorded graph calls, beside the model's and torch's.

They stand in the generated code of a stage, so they are module-level functions with plain arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchdistpackage.errors import SplitError

__all__ = [
    "ASKS_FOR_GRADIENTS",
    "Ambient",
    "apply_function",
    "arguments_of",
    "call_object",
    "check_holds",
    "check_same",
    "device_of",
    "outside",
    "run_inside",
    "run_node",
    "same",
]


# A hook gets the whole gradient of a tensor only where the tensor is made: elsewhere it is one of several users.
ASKS_FOR_GRADIENTS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")


def same(value: Any) -> Any:
    """A value that is compared by identity, as it is."""
    return value


_LOOKS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "len": len,
    "index": operator.index,
    "same": same,
}


class Ambient(NamedTuple):
    """The contexts that decide what an operation does, besides its arguments.

    Attributes:
        grad: Whether autograd records.
        autocast: For the CPU and CUDA: whether autocast is on, and its dtype.
    """

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]


def outside() -> Ambient:
    """The contexts that are in force now."""
    kinds = ("cpu", "cuda")
    return Ambient(
        torch.is_grad_enabled(),
        tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
    )


def run_inside(ambient: Ambient, usual: Ambient, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function under the contexts that the model's forward has entered around it.

    Args:
        ambient: What was in force when it was recorded.
        usual: What was in force around the whole forward; only differences are made.
        function: What to call; the name of a method of the first argument also goes.
        args: For the function.
        kwargs: For the function.
    """
    with ExitStack() as stack:
        if ambient.grad != usual.grad:
            stack.enter_context(torch.set_grad_enabled(ambient.grad))
        for mine, theirs in zip(ambient.autocast, usual.autocast, strict=True):
            if mine != theirs:
                stack.enter_context(torch.autocast(mine[0], enabled=mine[1], dtype=mine[2]))
        if isinstance(function, str):
            return getattr(args[0], function)(*args[1:], **kwargs)
        return function(*args, **kwargs)


def apply_function(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """Calls a custom autograd function, whose backward is its own."""
    return function.apply(*args, **kwargs)


def call_object(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function that has no name in any module."""
    return function(*args, **kwargs)


def check_same(value: Any, kind: str, expected: Any, where: str) -> None:
    """Stops a run in which the model's own Python would have gone another way than when it was split.

    Raises:
        SplitError: It would.
    """
    found = _LOOKS[kind](value)
    if found != expected:
        raise SplitError(
            f"the forward was split for inputs where {kind}(...) in {where} gives {expected!r}, and it gives {found!r} "
            "here: Python would go another way. Split with an example like this input, or name the module around that "
            "line in leaf_modules, so that its Python runs as it is"
        )


def check_holds(check: Any, *args: Any) -> None:
    """Runs the checks of an exported forward.

    Raises:
        SplitError: This input is unlike the example.
    """
    try:
        check(*args)
    except (AssertionError, RuntimeError) as error:
        raise SplitError(
            f"the forward was split for other inputs ({error}): Python would go another way. Split with an example "
            "like this input"
        ) from error


def device_of(*values: Any) -> torch.device:
    """The device of a stage: a device that another stage has looked at means the one of this stage's tensors here."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, (Tensor, nn.Parameter)):
            return leaf.device
    return torch.get_default_device()


class Arguments(NamedTuple):
    """What a node is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> Arguments:
    """A node's arguments in containers of their own, which a module may write into."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        if isinstance(argument, (list, tuple)) and not hasattr(argument, "_fields"):
            found = [plain(entry) for entry in argument]
            return tuple(found) if isinstance(argument, tuple) else found
        if isinstance(argument, dict):
            return {key: plain(entry) for key, entry in argument.items()}
        return fx.node.map_arg(argument, values.__getitem__)

    return Arguments(plain(node.args), plain(node.kwargs))


def run_node(model: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Runs one node of a recorded graph."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return model.get_submodule(str(node.target))(*args, **kwargs)
