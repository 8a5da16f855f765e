"""Symbols that know their value on the example, so that Python that looks at them goes the way it would have gone."""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import operator
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Protocol, final

import torch
import torch.overrides
import torch.utils.checkpoint
from torch import Tensor, fx
from torch.fx.proxy import TraceError

from torchdistpackage.split.operations import same
from torchdistpackage.split.signature import UNKNOWN
from torchdistpackage.split.unrepeatable import Unrepeatable

__all__ = [
    "BY_IDENTITY",
    "LooksAtNumbers",
    "Stale",
    "Symbol",
    "contents_of",
    "depends_on_numbers",
    "line_of_model",
    "line_raised",
    "replace_stale",
    "written_global",
]

_OWN = ("symbols", "tracer", "unrepeatable", "marks", "recordable", "type_answers", "patches")
_MACHINERY = tuple(__file__.replace("symbols", name) for name in _OWN)

# The size of what they return depends on the numbers in a tensor,
_OF_NUMBERS = (
    "nonzero argwhere masked_select unique unique_consecutive bincount item tolist nms batched_nms combinations"
).split()
# and that of these only on their first argument, whatever else they are given.
_AS_FIRST = (
    "index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_put index_put_ scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ masked_fill masked_fill_ masked_scatter masked_scatter_ "
    "setitem zeros_like ones_like empty_like rand_like randn_like full_like"
).split()


class LooksAtNumbers(Unrepeatable):
    """Python wants the numbers in a tensor: no way of recording can know which way it goes."""


class ValueTracer(Protocol):
    """What a symbol asks of the tracer that made it."""

    def value_of(self, symbol: Any) -> Any:
        """What it is on the example; UNKNOWN without one."""

    def look(self, symbol: Any, kind: Callable[[Any], Any]) -> Any:
        """What Python gets to see."""

    @property
    def is_busy(self) -> bool:
        """Whether a value is being computed."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """A new node."""


class Symbol(fx.Proxy):
    """A proxy that knows its value on the example."""

    tracer: Any  # a ValueTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(symbol, torch.Tensor) must say what it says in the plain run. Only to Python's own isinstance:
        # torch's C++ asks for the class as well, and would take a symbol for a tensor's memory.
        value = self.tracer.value_of(self)
        return type(value) if isinstance(value, _KINDS) and _calls_isinstance(sys._getframe(1)) else Symbol

    def __getattr__(self, name: str) -> Any:
        if name in ("node", "_is_param", "__fx_create_arg__", "__array__", "__array_interface__"):
            raise AttributeError(name)
        value = self.tracer.value_of(self)
        if value is not UNKNOWN:
            if not hasattr(value, name):
                raise AttributeError(f"{type(value).__name__} has no attribute {name!r}")
            if name in _OF_AUTOGRAD and isinstance(value, Tensor):
                raise TraceError(f"the forward looks at .{name}, which is not known before autograd runs")
            if getattr(value, name) is None:
                return None
            known = isinstance(getattr(value, name), BY_IDENTITY) and not isinstance(value, Tensor)
            if known or (name in ("dtype", "layout") and _compares_identity(sys._getframe(1))):
                return self.tracer.look(_Attribute(self, name), same)
            if isinstance(value, dict) and name in ("items", "values", "keys"):
                pairs = {
                    "items": lambda: [(key, self[key]) for key in value],
                    "values": lambda: [self[key] for key in value],
                    "keys": lambda: list(value),
                }
                return pairs[name]
        return _Attribute(self, name)

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def keys(self) -> Any:
        """Of a dictionary: its keys, which are plain values."""
        value = self.tracer.value_of(self)
        return list(value) if isinstance(value, dict) else super().keys()

    def __bool__(self) -> bool:
        return bool(self.tracer.look(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.look(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.look(self, int))

    def __float__(self) -> float:
        return float(self.tracer.look(self, float))

    def __len__(self) -> int:
        value = self.tracer.value_of(self)
        return int(self.tracer.look(self, len)) if isinstance(value, Tensor) or value is UNKNOWN else len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer.value_of(self)
        if value is UNKNOWN:
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            return iter([self[i] for i in range(_unpacked(frame.f_back))])
        return iter(list(value)) if isinstance(value, dict) else iter([self[i] for i in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        value = self.tracer.value_of(self)
        if value is UNKNOWN or isinstance(value, Tensor):
            raise LooksAtNumbers("`in` looks at the numbers of a tensor")
        return item in value

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __format__(self, spec: str) -> str:
        value = self.tracer.value_of(self)
        return format(self.tracer.look(self, type(value)), spec) if type(value) in (int, float) else str(self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    target = getattr(operator, name)

    def method(self: Symbol, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor".split():
    setattr(Symbol, f"__{_name}__", _in_place(_name))

BY_IDENTITY = (bool, enum.Enum, type, torch.dtype, torch.layout)  # what Python asks for with `is`
_OF_AUTOGRAD = ("requires_grad", "grad_fn", "grad", "is_leaf")
_KINDS = (Tensor, tuple, list, dict, bool, int, float, str)


@final
class _Attribute(Symbol):
    """`symbol.name`: a node of its own only if it is not called."""

    def __init__(self, root: Symbol, name: str) -> None:
        self.root, self.attribute, self.tracer = root, name, root.tracer
        self._made: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._made is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attribute), {})
            self._made = made.node
        return self._made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attribute, (self.root, *args), kwargs)


@functools.lru_cache(maxsize=256)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _current(frame: FrameType) -> tuple[list[dis.Instruction], int]:
    """The instructions of a frame, and the place of the one that runs."""
    listing = _instructions(frame.f_code)
    return listing, bisect_left(listing, frame.f_lasti, key=lambda instruction: instruction.offset)


def _calls_isinstance(frame: FrameType) -> bool:
    """Whether what the frame calls now is `isinstance(name, type or types)`, in this spelling."""
    listing, at = _current(frame)
    if listing[at].opname == "MATCH_CLASS":
        return True
    for instruction in reversed(listing[max(0, at - 24) : at]):
        if instruction.opname.startswith("LOAD_GLOBAL") and instruction.argval == "isinstance":
            return True
        if instruction.opname.startswith(("CALL", "STORE", "POP_JUMP", "RETURN")):
            return False
    return False


def _compares_identity(frame: FrameType) -> bool:
    """Whether what the frame reads now is compared with `is`, which a symbol cannot answer."""
    listing, at = _current(frame)
    for instruction in listing[at + 1 : at + 6]:
        if instruction.opname == "IS_OP":
            return True
        if not instruction.opname.startswith(("LOAD", "CACHE")):
            return False
    return False


def written_global(forward: Any) -> str | None:
    """A global variable that a forward sets."""
    code = getattr(forward, "__code__", None)
    found = [i.argval for i in _instructions(code) if i.opname == "STORE_GLOBAL"] if code is not None else []
    return str(found[0]) if found else None


def _unpacked(frame: FrameType) -> int:
    """How many values the statement `a, b, c = symbol` wants."""
    listing, at = _current(frame)
    if listing[at].opname == "UNPACK_SEQUENCE":
        return int(listing[at].argval)
    raise TraceError("a loop over a value whose length is not known without an example")


def _is_machinery(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file in _MACHINERY or "/torch/fx/" in file or file.endswith(("nn/modules/module.py", "/torch/_tensor.py"))


def line_of_model() -> str:
    """The line of the model's code that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"


def line_raised(error: BaseException, forward: Any) -> str:
    """The last line of the model's code on the way to an error, or where its forward begins."""
    code = getattr(forward, "__code__", None)
    where, trace = "?" if code is None else f"{code.co_filename}:{code.co_firstlineno}", error.__traceback__
    while trace is not None:
        if not _is_machinery(trace.tb_frame):
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def depends_on_numbers(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether the sizes of a node's value may differ between batches of one shape."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inputs = node.all_input_nodes
    if name in _OF_NUMBERS or (name == "where" and len(node.args) == 1):
        return True
    if name == "getitem":
        masks = [n for n in inputs[1:] if getattr(values[n], "dtype", None) in (torch.bool, torch.uint8)]
        if masks:
            return True
    elif name in _AS_FIRST:
        inputs = inputs[:1]
    elif name == "repeat_interleave" and len(inputs) > 1:
        return True
    return any(n.meta.get("of_numbers") for n in inputs)


@final
@dataclass(frozen=True)
class Stale:
    """Stands in a list of the forward for an entry of which only the module knows that has replaced it."""

    index: Any


def replace_stale(given: Any, now: Any, was: Any) -> None:
    """Marks the entries of lists that a module has written into.

    Args:
        given: Its arguments as the forward has them: symbols in lists.
        now: The same arguments as values, as the module has left them.
        was: As it was given them.
    """
    if type(given) is tuple:
        for mine, new, old in zip(given, now, was, strict=False):
            replace_stale(mine, new, old)
    elif type(given) is list:
        del given[len(now) :]
        for index, new in enumerate(now):
            if index >= len(given):
                given.append(Stale(index))
            elif _is_replaced(given[index], new, was[index]):
                given[index] = Stale(index)
            else:
                replace_stale(given[index], new, was[index])
    elif type(given) is dict:
        for key in [key for key in given if key not in now]:
            del given[key]
        for key, new in now.items():
            if key not in given or _is_replaced(given[key], new, was[key]):
                given[key] = Stale(key)
            else:
                replace_stale(given[key], new, was[key])


def _is_replaced(mine: Any, new: Any, old: Any) -> bool:
    containers = (list, tuple, dict)
    if isinstance(mine, fx.Proxy) or isinstance(new, Tensor):
        return new is not old
    return type(new) is not type(old) or not (isinstance(mine, containers) or new is old or new == old)


def contents_of(value: Any) -> Any:
    """What is in the lists and dicts of a value, by identity: nothing may write into what another node has returned."""
    if isinstance(value, list):
        return [(id(entry), contents_of(entry)) for entry in value]
    if isinstance(value, dict):
        return [(key, id(entry), contents_of(entry)) for key, entry in value.items()]
    return [contents_of(entry) for entry in value] if type(value) is tuple else None
