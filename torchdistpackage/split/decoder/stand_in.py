"""What takes the place of a module that another stage holds, for the time of one forward.

A stand-in answers like the module and computes nothing: where the forward asks a layer for its type or its index, the
twin's layer answers; where it is called, it returns something of the right form. What that is made of does not matter:
the hidden state that arrived from the stage before replaces it before anything real looks at it.

Stand-ins are put into the instance dictionary of the module that owns the real one, where Python looks first; nobody's
class and no entry of `_modules` is changed, and after the forward they are gone::

    part.model.layers                        ModuleDict(3, 4, 5)       what state_dict, fully_shard, DDP see
    part.model.__dict__["layers"]            [. . . 3 4 5 . .]         what the forward sees while it runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["HIDDEN", "WARNING", "AbsentModule", "Called", "filled", "form_of", "nothing", "on_meta", "shown"]

WARNING = "warn_if_padding_and_no_attention_mask"
"""A method of transformers that reads token ids for a warning and nothing else: no reason to send them."""

HIDDEN = object()
"""In the form of what a layer returns: here is the hidden state, of the shape that it had when it came in."""


@final
@dataclass(frozen=True)
class _Other:
    """In such a form: another tensor."""

    shape: torch.Size
    dtype: torch.dtype


def form_of(output: Any, hidden: Tensor) -> Any:
    """The form of what a layer returns.

    Args:
        output: What it returned.
        hidden: The hidden state that it got.
    """
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.shape == hidden.shape]

    def form(leaf: Tensor) -> Any:
        return HIDDEN if found and leaf is found[0] else _Other(leaf.shape, leaf.dtype)

    return tree_map_only(Tensor, form, output)


def filled(form: Any, hidden: Tensor) -> Any:
    """Something of that form, with a hidden state and zeros."""
    if form is HIDDEN:
        return hidden

    def value(leaf: Any) -> Any:
        if isinstance(leaf, _Other):
            return torch.zeros((), dtype=leaf.dtype, device=hidden.device).expand(leaf.shape)
        return hidden if leaf is HIDDEN else leaf

    return tree_map(value, form)


@final
class Called:
    """A layer of the row as the forward sees it: attributes of the layer or of its twin, and a call of our own.

    Args:
        module: Who answers for attributes.
        call: Gets the arguments of the call.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Our own call."""
        return self._call(*args, **kwargs)


@final
class AbsentModule:
    """An embedding or norm that another stage holds: returns zeros of the form that the real one would return.

    They may be changed in place, like the real ones, so that they take the memory of one hidden state.

    Args:
        twin: The module on the meta device; it says shapes and types.
        device: Where the zeros are.
        dtype: Type of floating zeros; None for that of the twin.
    """

    def __init__(self, twin: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        self._twin, self._device, self._dtype = twin, device, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._twin, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros."""
        with torch.no_grad():
            found = self._twin(*on_meta(args), **on_meta(kwargs))
        return tree_map_only(Tensor, self._zeros, found)

    def _zeros(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.zeros(tensor.shape, dtype=dtype, device=self._device)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of what has no effect on the result."""


@contextmanager
def shown(root: nn.Module, stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Shows a forward other objects in the place of submodules.

    Args:
        root: The module whose forward is to run.
        stand_ins: Dotted name below root -> what is found there; entries of a list or dict of modules are put into
            one list, or dict, that takes the place of all of it.
    """
    changed: list[tuple[dict[str, Any], str]] = []
    try:
        for name, value in stand_ins.items():
            parent, _, attribute = name.rpartition(".")
            space = vars(root.get_submodule(parent))
            space[attribute] = value
            changed.append((space, attribute))
        yield
    finally:
        for space, attribute in changed:
            space.pop(attribute, None)


def on_meta(values: Any) -> Any:
    """The same values with every tensor on the meta device."""
    if all(not isinstance(leaf, Tensor) or leaf.is_meta for leaf in tree_leaves(values)):
        return values
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), values)
