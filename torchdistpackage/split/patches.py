"""What is patched while a forward is recorded, so that what symbols do not pass through becomes a node all the same."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.overrides
import torch.utils.checkpoint
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage.split.operations import apply_function
from torchdistpackage.split.symbols import ValueTracer

__all__ = ["opaque_functions", "recorded_factories"]

_TRACER = __file__.replace("patches", "tracer")

# Called without symbols they would run once, here; recorded they run in every step, on the device of that day.
_FACTORIES = (
    "arange bernoulli empty empty_like eye full full_like linspace logspace multinomial normal ones ones_like rand "
    "rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like"
).split()


def opaque_functions(model: nn.Module) -> list[Callable[..., Any]]:
    """Functions that look at the type of what they get, or compute elsewhere: they stay nodes wherever they are called.

    Checkpointing, functions that were compiled by TorchScript, and einops.
    """
    einops = sys.modules.get("einops")
    names = "rearrange reduce repeat einsum pack unpack".split()
    found = [checkpoint, *(getattr(einops, name) for name in names if hasattr(einops, name))]
    forwards = [inspect.getattr_static(type(m), "forward", None) for m in model.modules()]
    spaces = {id(space): space for forward in forwards if (space := getattr(forward, "__globals__", None))}
    for space in spaces.values():
        found += [value for value in space.values() if isinstance(value, torch.jit.ScriptFunction)]
    return found


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: what it makes of tensors is its own, and must not be a symbol."""
    while frame is not None and frame.f_code.co_filename != _TRACER:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def recorded_factories(tracer: ValueTracer) -> Iterator[None]:
    """Inside, functions that make tensors of nothing become nodes as well, and custom autograd functions stay whole."""
    torch.overrides.get_testing_overrides()  # torch makes these tables once, and of what it finds then
    torch.overrides.is_tensor_method_or_property(torch.Tensor.add)
    with torch.device("meta"):
        torch.empty(0)  # the table of what a device context changes: without the real functions it would do nothing
    kept: list[tuple[Any, str, Any]] = [(torch, name, getattr(torch, name)) for name in _FACTORIES]
    kept += [(torch, "finfo", torch.finfo), (torch, "iinfo", torch.iinfo)]  # of a dtype that is a symbol
    kept.append((torch.utils.checkpoint, "checkpoint", checkpoint))
    apply = vars(torch.autograd.Function)["apply"]
    recording = [tracer]  # emptied at the end: a module that is imported meanwhile may keep these functions for good

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            plain = not recording or recording[0].is_busy or _is_importing(sys._getframe(1))
            if plain or (isinstance(function, type) and not isinstance(args[0] if args else None, fx.Proxy)):
                return function(*args, **kwargs)
            return recording[0].create_proxy("call_function", function, args, kwargs)

        return call if isinstance(function, type) else functools.wraps(function)(call)

    def recorded_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        symbols = any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values()))
        if not symbols or not recording or recording[0].is_busy:
            return apply.__get__(None, cls)(*args, **kwargs)
        return recording[0].create_proxy("call_function", apply_function, (cls, *args), kwargs)

    try:
        for home, name, function in kept:
            setattr(home, name, recorded(function))
        torch.autograd.Function.apply = classmethod(recorded_apply)
        yield
    finally:
        recording.clear()
        torch.autograd.Function.apply = apply
        for home, name, function in kept:
            setattr(home, name, function)
