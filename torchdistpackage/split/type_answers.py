"""`type(x)`, `isinstance(x, ...)` and `callable(x)` in a forward that is being recorded: what a symbol stands for.

No object can answer them itself without telling torch's C++ the same, which would take a symbol for a tensor's memory.
So the names mean something else while a forward is recorded, in the modules of the model's own code.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["answering_types"]


@contextmanager
def answering_types(model: nn.Module, value_of: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the forwards of the model's classes get the types of values where they have symbols.

    Args:
        model: Whose code is meant; torch's own is left alone.
        value_of: What a symbol stands for.
    """

    class Answer(builtins.type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return builtins.type(value_of(args[0]) if len(args) == 1 else args[0], *args[1:], **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, builtins.type)

    forwards = [inspect.getattr_static(builtins.type(module), "forward", None) for module in model.modules()]
    spaces = [space for forward in forwards if (space := getattr(forward, "__globals__", None)) is not None]
    own = {id(space): space for space in spaces if not str(space.get("__name__", "")).startswith("torch.")}
    answers = {
        "type": Answer("type", (), {}),
        "isinstance": lambda instance, kinds: isinstance(value_of(instance), kinds),
        "callable": lambda instance: callable(value_of(instance)),
    }
    changed = [(space, name) for space in own.values() for name in answers if name not in space]
    try:
        for space, name in changed:
            space[name] = answers[name]
        yield
    finally:
        for space, name in changed:
            space.pop(name, None)
