"""What Python does while a forward is recorded and no stage would do again: state of modules, random numbers, seeds.

A recording holds operations on tensors. A forward that counts its calls, keeps a list, stores a tensor in its module or
draws from `random` does that once, here, and never again in a stage; the numbers would be wrong in silence. So it is
watched, and such a module stays whole, or, if it is the model itself, is refused with the line.

What whole modules do to their own attributes is put back afterwards: the model is left as it is.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Unrepeatable", "as_they_were", "check_held", "random_as_it_was", "unrepeated", "watched"]

_SETTINGS = [
    *((torch, name) for name in "manual_seed seed set_rng_state set_default_dtype set_default_device".split()),
    *((torch.random, name) for name in "manual_seed seed set_rng_state".split()),
]
# What these say of a parameter is the same in each step.
_FACTS = "size dim numel stride is_floating_point is_complex element_size is_contiguous __len__ ndimension".split()
_NO_STATE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, tuple)


class Unrepeatable(TraceError):
    """Python does something that no way of recording repeats."""


@contextmanager
def watched(
    model: nn.Module,
    is_quiet: Callable[[], bool],
    *,
    value_of: Callable[[Any], Any] = lambda value: value,
    tensors: bool = True,
) -> Iterator[None]:
    """Inside, a forward that sets an attribute of one of the model's modules, a seed or a default, is stopped.

    Args:
        model: Whose modules are watched.
        is_quiet: Says when they may: a module that stays whole is running.
        value_of: What a symbol stands for: `self.count += 1` sets the tensor that is there already.
        tensors: Whether to stop for tensors as well; torch.export looks after them itself.

    Raises:
        Unrepeatable: In the forward, at that line.
    """
    names = {id(module): name for name, module in model.named_modules()}
    set_attribute = nn.Module.__setattr__

    def checked(module: nn.Module, name: str, value: Any) -> None:
        if not is_quiet() and id(module) in names and (tensors or not isinstance(value, Tensor)):
            places = (vars(module), module._parameters, module._buffers, module._modules)
            old = next((place[name] for place in places if name in place), Unrepeatable)
            if value_of(value) is old:
                return
            if not (type(old) is type(value) and isinstance(value, _PLAIN) and old == value):
                at = f"{names[id(module)] or 'self'}.{name}"
                raise Unrepeatable(f"the forward sets {at}, which would be done once, now, and not in each step")
        set_attribute(module, name, value)

    def stopped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not is_quiet():
                raise Unrepeatable(
                    f"the forward calls torch.{name}, which would be done once, now, and not in each step"
                )
            return function(*args, **kwargs)

        return call

    kept = [(home, name, getattr(home, name)) for home, name in _SETTINGS]
    try:
        nn.Module.__setattr__ = checked  # type: ignore[method-assign, assignment]
        for home, name, function in kept:
            setattr(home, name, stopped(name, function))
        yield
    finally:
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
        for home, name, function in kept:
            setattr(home, name, function)


@final
class RecordedParameters(TorchFunctionMode):
    """Inside, what is computed from parameters and buffers themselves (`for p in self.parameters()`) is recorded, too.

    Args:
        symbol_of: A symbol for a tensor of the model; itself for any other value.
        is_quiet: Says when nothing is recorded.
    """

    def __init__(self, symbol_of: Callable[[Any], Any], is_quiet: Callable[[], bool]) -> None:
        super().__init__()
        self._symbol_of, self._is_quiet = symbol_of, is_quiet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, with symbols in the place of the model's tensors."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._is_quiet() or name in _FACTS:
            return func(*args, **kwargs)
        given = pytree.tree_map(self._symbol_of, (args, kwargs))
        if all(a is b for a, b in zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(given), strict=True)):
            return func(*args, **kwargs)
        if name == "__get__":
            found = func(*args, **kwargs)
            if isinstance(found, Tensor):
                raise TraceError("an attribute of a parameter is itself a tensor, and is not recorded")
            return found
        args, kwargs = given
        if torch.overrides.is_tensor_method_or_property(func) and isinstance(args[0], fx.Proxy):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def as_they_were(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of all modules back, and what is in their lists, dicts and sets; not what is in tensors."""
    kept = [(module, dict(vars(module)), _containers(module)) for module in model.modules()]
    limited = [module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None]
    weights = [(weight, weight.detach().clone()) for weight in limited if isinstance(weight, Tensor)]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, content in weights:  # an embedding with max_norm scales its rows when they are looked up
                weight.copy_(content)
        for module, attributes, containers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for _, mine, content in containers:
                _refill(mine, content)


@contextmanager
def unrepeated(model: nn.Module) -> Iterator[Callable[[str], None]]:
    """Inside, a check of what the forward of one module, named, has done: to its containers, and to random numbers.

    Raises:
        Unrepeatable: In the check: it has done what no stage would do again.
    """
    kept = {name: _containers(module) for name, module in model.named_modules()}
    state = _python_random()

    def check(path: str) -> None:
        for name, mine, content in kept[path]:
            if not _same(mine, content):
                raise Unrepeatable(f"the forward changes {path or 'self'}.{name}, and no stage would do that")
        if _python_random() != state:
            raise Unrepeatable("the forward draws from random or numpy.random, and the stages would not")

    yield check


class _Container(NamedTuple):
    """Something of a module that can be written into.

    Attributes:
        name: Of the attribute.
        mine: A list, dict or set, or the attributes of an object.
        content: A copy.
    """

    name: str
    mine: Any
    content: Any


def _containers(module: nn.Module) -> list[_Container]:
    """The plain containers of a module, and the attributes of its plain objects, each with a copy of what is in it."""
    found = []
    for name, value in vars(module).items():
        if type(value) in (list, dict, set):
            found.append(_Container(name, value, copy.copy(value)))
        elif not isinstance(value, _NO_STATE) and type(getattr(value, "__dict__", None)) is dict:
            found.append(_Container(name, vars(value), dict(vars(value))))
    return found


def _same(mine: Any, content: Any) -> bool:
    if len(mine) != len(content):
        return False
    if isinstance(mine, dict):
        return all(key in content and content[key] is value for key, value in mine.items())
    return mine == content if isinstance(mine, set) else all(a is b for a, b in zip(mine, content, strict=True))


def _refill(mine: Any, content: Any) -> None:
    if _same(mine, content):
        return
    if isinstance(mine, list):
        mine[:] = content
    else:
        mine.clear()
        mine.update(content)


def _python_random() -> Any:
    """The state of Python's and numpy's random numbers, comparable."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    return random.getstate(), tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in drawn)


@contextmanager
def random_as_it_was() -> Iterator[None]:
    """Puts Python's and numpy's random numbers back."""
    numpy = sys.modules.get("numpy")
    state, drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(drawn)


def check_held(value: Any, model: nn.Module) -> None:
    """Stops for an object that holds values of the forward, and for a function that holds modules of the model.

    Such a function would run in a stage with symbols, or with modules that the stage does not have.

    Raises:
        TraceError: It is one.
    """
    function = isinstance(value, (types.FunctionType, types.MethodType, functools.partial))
    for held in _held_by(value, 4):
        if isinstance(held, fx.Proxy):
            raise TraceError(f"{_named(value)} holds a value of the forward ({held}); pass it as an argument")
        if function and isinstance(held, nn.Module) and any(held is module for module in model.modules()):
            raise TraceError(f"{_named(value)} holds a module of the model; pass the module itself")


def _named(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _held_by(value: Any, depth: int) -> Iterator[Any]:
    """What an object holds, as far as Python shows it."""
    inner: list[Any] = []
    if isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inner = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif type(value) in (list, tuple, set):
        inner = list(value)
    elif type(value) is dict:
        inner = list(value.values())
    elif not isinstance(value, (type, types.ModuleType, nn.Module, Tensor)):
        inner = list(getattr(value, "__dict__", {}).values())
    for one in inner:
        yield one
        if depth and type(one) is not fx.Proxy and not isinstance(one, (fx.Proxy, fx.Node)):
            yield from _held_by(one, depth - 1)


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
