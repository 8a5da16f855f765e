"""Every place in a module where a tensor sits: parameters, buffers, and what Python code keeps in plain attributes.

::

    module ── _parameters["weight"]          weight                what `named_parameters` says
           ── _buffers["mask"]               mask                  also those that no checkpoint has
           ── vars["scales"][0]              scales.0              a list that the module keeps for itself

`torch.nn.Module.to_empty` and its like know the first two. A model that was built without memory must have its values
in all three, so `deferred_init.py` and those who fill stages look here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "places_of"]

_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_DEPTH = 4  # of lists in dicts in lists


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor sits.

    Attributes:
        name: Dotted, from the module that was asked.
        tensor: The tensor that was there.
        kind: "parameter", "buffer" or "attribute".
        module: The module that keeps it.
        container: The dict or list that holds it.
        key: Where in it.
    """

    name: str
    tensor: Tensor
    kind: str
    module: nn.Module
    container: Any
    key: Any

    def put(self, tensor: Tensor) -> None:
        """Puts another tensor there; a module's `__setattr__` is not asked."""
        self.container[self.key] = tensor


def places_of(root: nn.Module) -> Iterator[Place]:
    """All places in a module and in those below it; a shared module once, under its first name.

    Args:
        root: Any module.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> layer.seen = [layer.weight.detach()]
        >>> [(place.name, place.kind) for place in places_of(nn.Sequential(layer))]
        [('0.weight', 'parameter'), ('0.seen.0', 'attribute')]
    """
    for path, module in root.named_modules():
        start = f"{path}." if path else ""
        members: tuple[tuple[str, Any], ...] = (("parameter", module._parameters), ("buffer", module._buffers))
        for kind, tensors in members:
            for key, tensor in list(tensors.items()):
                if tensor is not None:
                    yield Place(start + key, tensor, kind, module, tensors, key)
        for key, value in list(vars(module).items()):
            if key not in _OWN:
                yield from _inside(module, vars(module), key, value, start + key, _DEPTH)


def _inside(module: nn.Module, container: Any, key: Any, value: Any, name: str, depth: int) -> Iterator[Place]:
    if isinstance(value, Tensor):
        yield Place(name, value, "attribute", module, container, key)
        return
    inner = vars(value) if type(value) is SimpleNamespace else value
    if depth == 0 or not isinstance(inner, (list, dict)):
        return
    for at, element in list(inner.items() if isinstance(inner, dict) else enumerate(inner)):
        yield from _inside(module, inner, at, element, f"{name}.{at}", depth - 1)
