"""How a model is called and what it returns: any signature and any structure, in and out of a flat list of tensors.

::

    model(images, mask=m)  ->  {"images": .., "mask": ..}  ->  [images, m]  ->  stage 0 .. stage p-1  ->  [logits]
                                                                              Output(logits=.., loss=None)  <-

A recorded forward holds for one structure of the arguments and for the values of those that are no tensors; both are
checked in each call.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from torch import Tensor
from torch.utils import _pytree as pytree

from torchdistpackage.errors import SplitError

__all__ = ["UNKNOWN", "Calling", "Example", "Returning", "bound_arguments", "call_arguments", "opened_dataclasses"]

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()
"""Stands for a tensor of which nothing is known."""


@dataclass(frozen=True)
class Example:
    """What the model is called with, once.

    Attributes:
        args: Positional arguments: pytrees of tensors and plain values.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Any, kwargs: Mapping[str, Any] | None = None) -> Example:
        """A bare tensor or dict is one argument; a tuple or list is several."""
        return cls(tuple(args) if type(args) in (tuple, list) else (args,), dict(kwargs or {}))


def bound_arguments(forward: Callable[..., Any], example: Example | None) -> Mapping[str, Any]:
    """The arguments of a call by the names of the parameters; without an example, those that have no default.

    Raises:
        SplitError: The arguments do not fit the signature.
    """
    signature = inspect.signature(forward)
    if example is None:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {p.name: UNKNOWN for p in signature.parameters.values() if p.default is p.empty and p.kind not in kinds}
    try:
        return signature.bind(*example.args, **example.kwargs).arguments
    except TypeError as error:
        raise SplitError(f"the example does not fit the model, forward{signature}: {error}") from error


def call_arguments(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> inspect.BoundArguments:
    """Arguments by name, ready to call with."""
    return inspect.BoundArguments(inspect.signature(forward), OrderedDict(arguments))


@final
@dataclass(frozen=True)
class Calling:
    """The arguments that a recording holds for.

    Attributes:
        signature: Of the model's forward.
        spec: Structure of the bound arguments.
        fixed: Place among the leaves -> the value that is no tensor.

    Example:
        >>> import torch
        >>> example = Example.of(torch.zeros(2), {"scale": 3})
        >>> def forward(x, scale=1): ...
        >>> leaves, spec = pytree.tree_flatten(dict(bound_arguments(forward, example)))
        >>> Calling(inspect.signature(forward), spec, {1: 3}).tensors((torch.ones(2),), {"scale": 3})
        [tensor([1., 1.])]
    """

    signature: inspect.Signature
    spec: pytree.TreeSpec
    fixed: Mapping[int, Any]

    @cached_property
    def count(self) -> int:
        """How many tensors the model takes."""
        return self.spec.num_leaves - len(self.fixed)

    @cached_property
    def _places(self) -> dict[str, Any]:
        """The arguments, with the place of each leaf in its stead."""
        found: dict[str, Any] = pytree.tree_unflatten(range(self.spec.num_leaves), self.spec)
        return found

    @cached_property
    def _plain(self) -> bool:
        """Whether the example was positional tensors and nothing else."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in self.signature.parameters.values() if p.kind in positional]
        bare = all(isinstance(place, int) for place in self._places.values())
        return not self.fixed and bare and list(self._places) == names[: self.count]

    def takes_several(self, values: Sequence[Any]) -> bool:
        """Whether a list is meant as all positional arguments: the example had as many, and not one list."""
        places = list(self._places.values())
        if len(places) == len(values) and (len(places) > 1 or isinstance(places[0], int)):
            return True
        try:
            bound = self.signature.bind(*values).arguments
        except TypeError:
            return False
        return len(values) > 1 and pytree.tree_structure(dict(bound)) == self.spec  # forward(self, *tensors)

    def takes_by_name(self, values: Mapping[str, Any]) -> bool:
        """Whether a dict is meant as keyword arguments: it has their names, and no argument is a dict itself."""
        return values.keys() == self._places.keys() and not any(type(p) is dict for p in self._places.values())

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The tensors of a call.

        Raises:
            SplitError: The call is unlike the example.
        """
        if self._plain and not kwargs and len(args) == self.count and all(isinstance(arg, Tensor) for arg in args):
            return args  # what binding and flattening would give, which take 20 us
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise SplitError(f"the first stage takes what the model takes, forward{self.signature}: {error}") from error
        leaves, spec = pytree.tree_flatten(dict(bound))
        if spec != self.spec:
            raise SplitError(
                f"the first stage is called with {_names(bound, spec)}, but the model was split with an example of "
                f"{_names(self.signature.parameters, self.spec)}; call it alike, or split with an example like this"
            )
        for place, value in self.fixed.items():
            if not _same(leaves[place], value):
                raise SplitError(
                    f"the model was split with {value!r} for an argument that is now {leaves[place]!r}: what is no "
                    "tensor is part of the split. Split with this value, or call it with the other"
                )
        return [leaf for place, leaf in enumerate(leaves) if place not in self.fixed]


@final
@dataclass(frozen=True)
class Returning:
    """What the model returns, around the tensors that the last stage computes.

    Attributes:
        spec: Structure of the output.
        literals: Place among its leaves -> a value that is the same in each run.

    Example:
        >>> leaves, spec = pytree.tree_flatten({"logits": 1, "loss": None})
        >>> Returning(spec, {1: None}).build([7])
        {'logits': 7, 'loss': None}
    """

    spec: pytree.TreeSpec
    literals: Mapping[int, Any]

    def build(self, values: Sequence[Any]) -> Any:
        """The output."""
        if self.spec.is_leaf() and not self.literals:
            return values[0]
        if self.literals:
            given = iter(values)
            places = range(self.spec.num_leaves)
            values = [self.literals[place] if place in self.literals else next(given) for place in places]
        return pytree.tree_unflatten(values, self.spec)


@final
@dataclass(frozen=True)
class _Fields:
    """A dataclass on its way through a pytree, without registering the user's class with torch."""

    kind: type
    values: Mapping[str, Any]


def _unflatten_fields(values: Any, context: Any) -> Any:
    kind, names = context
    made = object.__new__(kind)  # not __init__: it may take something else, or check what is not there yet
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    _Fields,
    lambda of: (list(of.values.values()), (of.kind, tuple(of.values))),
    _unflatten_fields,
)


def opened_dataclasses(value: Any) -> Any:
    """The same value, with dataclasses that torch's pytree takes for leaves opened."""

    def opened(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(type(leaf)):
            return leaf
        names = [item.name for item in dataclasses.fields(leaf)]
        return _Fields(type(leaf), {name: opened_dataclasses(getattr(leaf, name)) for name in names})

    return pytree.tree_map(opened, value)


def _same(mine: Any, theirs: Any) -> bool:
    return mine is theirs or bool(type(mine) is type(theirs) and mine == theirs)


def _names(arguments: Mapping[str, Any], spec: pytree.TreeSpec) -> str:
    return f"({', '.join(arguments)}) with {spec.num_leaves} values"
