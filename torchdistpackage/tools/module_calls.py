"""Which module runs now, inside which others: hooks on every module of a model, and the stack that they keep.

::

    model(x)                      stack
      started  root               root
      started    block.0          root > block.0
      started      block.0.fc     root > block.0 > block.0.fc
      finished     block.0.fc     root > block.0
      ...

A call that ends in an exception leaves the stack, too. What `torch.compile(module)` returns counts as one module, as
its insides do not run as modules. A module that was scripted, or compiled in place by `module.compile()`, takes no
hooks: it is part of the module around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol, final

import torch
from torch import nn

__all__ = ["ModuleCall", "ModuleCalls", "Watcher", "in_backward", "visible_modules"]


@final
class ModuleCall:
    """One call of one module, while it lasts and for those who remember it.

    Attributes:
        name: The module's name in the model; the model's is "root".
        module: The module.
        parent: The call inside which this one was made.
    """

    def __init__(self, name: str, module: nn.Module, parent: ModuleCall | None) -> None:
        self.name = name
        self.module = module
        self.parent = parent
        self.handled = sys.exc_info()[1]  # a model may well be called while an exception is handled

    def chain(self) -> Iterator[ModuleCall]:
        """This call and those around it, from the inside out."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.parent

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


class Watcher(Protocol):
    """Who is told. The methods may raise: then the call of the module fails with that."""

    def started(self, call: ModuleCall, inputs: Any) -> None:
        """A call begins; it is on the stack already."""

    def finished(self, call: ModuleCall, output: Any) -> None:
        """A call returns; it is still on the stack."""

    def failed(self, call: ModuleCall, error: BaseException | None) -> None:
        """A call ends in an exception, or was abandoned; it is still on the stack. Must not raise."""


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread: what is called now is called again, by checkpointing."""
    return torch._C._current_graph_task_id() != -1


def visible_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that run as modules, by name; the model is "root". A module with several names has its first.

    Raises:
        TypeError: It is no module.

    Example:
        >>> list(visible_modules(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))))
        ['root', '0', '1', '1.0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    visible: dict[str, nn.Module] = {}
    hidden: set[nn.Module] = set()
    for name, module in model.named_modules():
        if _takes_no_hooks(module) or "_orig_mod" in module._modules:  # the latter is what torch.compile returns
            hidden.update(module.modules())
        if module not in hidden or "_orig_mod" in module._modules:
            visible[name or "root"] = module
    return visible


def _takes_no_hooks(module: nn.Module) -> bool:
    """Scripted modules refuse hooks, and where `module.compile()` was called they would be compiled as well."""
    return isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None


@final
class ModuleCalls:
    """Hooks on the modules of a model, and the stack of the calls that have not returned.

    Args:
        model: The model.
        watcher: Is told about every call.

    Attributes:
        modules: The modules that are watched, by name.
        stack: The calls that have not returned, the outermost first.

    Raises:
        ValueError: The model itself takes no hooks.
    """

    def __init__(self, model: nn.Module, watcher: Watcher) -> None:
        self.modules = visible_modules(model)
        if _takes_no_hooks(model):
            raise ValueError(
                f"this {type(model).__name__} was scripted or compiled in place, so that it takes no hooks: pass the "
                f"model as it was before, or torch.compile(model), which then is one module without parts"
            )
        self.stack: list[ModuleCall] = []
        self._watcher = watcher
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for name, module in self.modules.items():
            self._hook(name, module)

    def _hook(self, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name == "root":
                self.abandon()  # what KeyboardInterrupt ended has run no hook
            call = ModuleCall(name, module, self.stack[-1] if self.stack else None)
            self.stack.append(call)
            self._watcher.started(call, (args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not any(call.module is module for call in self.stack):
                return  # another hook failed before ours
            while self.stack[-1].module is not module:
                self._drop(None)
            call, error = self.stack[-1], sys.exc_info()[1]
            if error is not call.handled:  # torch calls this hook from its `except`
                self._drop(error)
                return
            try:
                self._watcher.finished(call, output)
            finally:
                self.stack.pop()

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def _drop(self, error: BaseException | None) -> None:
        self._watcher.failed(self.stack[-1], error)
        self.stack.pop()

    def abandon(self) -> None:
        """Ends what is on the stack."""
        while self.stack:
            self._drop(None)

    def remove(self) -> None:
        """Takes the hooks off."""
        self.abandon()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
