"""What the modules of a model cost in the pass that runs now: the watcher that `profile.py` hooks in.

A pass is one call of the outermost module, and the backward pass that follows it. Costs are noted per call and summed
up by module when the pass is over; a call's time and memory without those of the calls inside it are its own, so the
sums of the whole are sums of parts.

What autograd keeps is counted as it is saved, in the hooks that torch has for it. A storage may be saved many times::

    y = norm(x)      norm saves x, and y's storage
    q, k = Wq(y), Wk(y)     both save y                  -> counted once, at the first
    checkpoint(attn)        would free y only if everyone who saved it is inside attn,
                            and if attn was not given y: a checkpoint keeps its inputs
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from torchdistpackage.tools.graph_nodes import GraphNodes
from torchdistpackage.tools.laps import Laps
from torchdistpackage.tools.module_calls import ModuleCall, ModuleCalls, in_backward
from torchdistpackage.tools.profile_table import ModuleCost
from torchdistpackage.tools.ranges import ModuleRanges
from torchdistpackage.tools.values import num_bytes, plain_tensors, storage, tensors_in

__all__ = ["Recorder"]


@dataclass
class _Spent:
    """What one call cost without the calls inside it; `freed`, `output` and `again` are of the whole call."""

    forward: float = 0.0
    backward: float = 0.0
    kept: int = 0
    freed: int = 0
    output: int = 0
    again: bool = False  # called by checkpointing, in the backward pass
    inputs: frozenset[Any] = field(default_factory=frozenset)


@dataclass
class _Saved:
    """A storage that autograd was given."""

    size: int
    first: ModuleCall
    common: ModuleCall | None  # the innermost call around everyone who saved it


@final
class Recorder:
    """Watches the calls of a model's modules, and reports after each pass and each backward pass.

    While torch.profiler runs, the calls are ranges in its trace as well.

    Args:
        model: Gets hooks at once.
        report: Called with the costs of the modules that ran, by name.
        memory: Whether to count what autograd keeps. It takes some microseconds a saved tensor, which would show in
            the times of small modules.
        times: Whether to take times. On a device each press of the stop watch is an operation, which would show in a
            trace.

    Attributes:
        modules: The modules that are watched, by name.
        broken_by: The call in which the last exception arose, and the exception.
    """

    def __init__(
        self,
        model: nn.Module,
        report: Callable[[dict[str, ModuleCost]], None],
        *,
        memory: bool = True,
        times: bool = True,
    ) -> None:
        self._model, self._report, self._memory, self._times = model, report, memory, times
        self._nodes = GraphNodes()
        self._node_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks: saved_tensors_hooks | None = None
        self._saved: dict[Any, _Saved] = {}
        self._spent: dict[ModuleCall, _Spent] = {}
        self._last: dict[str, ModuleCall] = {}  # of each module's calls in this pass
        self._going_back = False
        self._laps = Laps()
        self._ranges = ModuleRanges()
        self.broken_by: tuple[ModuleCall, BaseException] | None = None
        self._calls = ModuleCalls(model, self)
        self.modules = self._calls.modules

    def remove(self) -> None:
        """Takes all hooks off."""
        self._calls.remove()
        self._forget_pass()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def started(self, call: ModuleCall, inputs: Any) -> None:
        """The caller's time ends; see `module_calls.Watcher`."""
        tensors = tensors_in(inputs)
        again = in_backward()
        if call.parent is None and not again:
            self._start_pass(tensors)
        elif call.parent is None and call.name in self._last:
            call.parent = self._last[call.name].parent  # checkpointing calls what was called there
        if call.parent is not None:
            self._press((call.parent, again))
        if call is self._calls.stack[0]:
            self._nodes.skip(tensors)
        elif call.parent is not None:
            self._own(tensors, call.parent)
        spent = self._spent[call] = _Spent(again=again)
        if self._memory and not again:
            spent.inputs = frozenset(storage(part) for tensor in tensors for part in plain_tensors(tensor))
        self._press(None)  # this hook's own time is nobody's
        self._ranges.start(call)

    def finished(self, call: ModuleCall, output: Any) -> None:
        """The call's time ends."""
        self._ranges.end(call)
        spent = self._spent[call]
        self._press((call, spent.again))
        tensors = tensors_in(output)
        self._own(tensors, call)
        if not spent.again:
            self._last[call.name] = call
            spent.output = num_bytes(tensors)
        if call is self._calls.stack[0]:
            self._nodes.forget()
            if not spent.again:
                self._end_pass(tensors)
        self._press(None)

    def failed(self, call: ModuleCall, error: BaseException | None) -> None:
        """A pass that fails has no costs."""
        self._ranges.end(call)
        if error is not None and (self.broken_by is None or self.broken_by[1] is not error):
            self.broken_by = (call, error)
        if call in self._spent and self._spent[call].again:
            self._press((call, True))  # torch ends a recomputation by an exception once it has what it needs
            if call is self._calls.stack[0]:
                self._nodes.forget()
        elif call is self._calls.stack[0]:
            self._close_hooks()
            self._forget_pass()

    # ---- a pass ------------------------------------------------------------------------------------------------------

    def _start_pass(self, inputs: list[torch.Tensor]) -> None:
        self._forget_pass()
        module = self._calls.stack[0].module
        devices = {tensor.device for tensor in (*inputs, *module.parameters())}
        self._laps = Laps({device for device in devices if device.type not in ("cpu", "meta")})
        if self._memory:
            pack = self._pack
            if "torch._dynamo" in sys.modules:
                # What a compiled module calls would be compiled as well.
                pack = torch.compiler.disable(pack)  # type: ignore[no-untyped-call]
            self._hooks = saved_tensors_hooks(pack, _unpack)
            self._hooks.__enter__()

    def _end_pass(self, outputs: list[torch.Tensor]) -> None:
        self._close_hooks()
        held = {
            storage(part)
            for tensor in (*self._model.parameters(), *self._model.buffers())
            for part in plain_tensors(tensor)
        }
        for key, saved in self._saved.items():
            if key in held or key.expired():
                continue
            self._spent[saved.first].kept += saved.size
            for call in saved.common.chain() if saved.common is not None else ():
                if key not in self._spent[call].inputs:
                    self._spent[call].freed += saved.size
        self._saved.clear()
        for node in {tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None}:
            self._node_hooks.append(node.register_prehook(self._go_back))
        self._settle()

    def _forget_pass(self) -> None:
        """The hooks of leaves would outlive the graph, as DDP holds on to these nodes."""
        for handle in self._node_hooks:
            handle.remove()
        self._node_hooks.clear()
        self._ranges.forget()
        self._nodes.forget()
        self._saved.clear()
        self._spent.clear()
        self._last.clear()
        self._going_back = False

    def _close_hooks(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(None, None, None)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        for part in plain_tensors(tensor):
            self._count(part)
        # Detached, as an output that saves itself would never be freed. The version is what autograd would compare.
        return tensor.detach(), tensor._version

    def _count(self, tensor: torch.Tensor) -> None:
        key = storage(tensor)
        if not self._calls.stack:
            return
        call = self._calls.stack[-1]
        saved = self._saved.get(key)
        if saved is None:
            self._saved[key] = _Saved(tensor.untyped_storage().nbytes(), call, call)
            return
        around = set(call.chain())
        if saved.common is not None:
            saved.common = next((other for other in saved.common.chain() if other in around), None)

    # ---- the backward pass -------------------------------------------------------------------------------------------

    def _own(self, tensors: list[torch.Tensor], call: ModuleCall) -> None:
        """The time of the nodes that made these tensors goes to a call."""

        def press(*_: Any) -> None:
            self._go_back()
            self._press((call, True))

        for node in self._nodes.new(tensors):
            self._node_hooks += self._ranges.around(node, call)
            if self._times:
                self._node_hooks.append(node.register_hook(press))

    def _go_back(self, *_: Any) -> None:
        if not self._going_back:
            self._going_back = True
            self._press(None)  # what was before is not the model's
            torch.autograd.Variable._execution_engine.queue_callback(self._came_back)

    def _came_back(self) -> None:
        self._going_back = False
        self._settle()

    def _press(self, owner: tuple[ModuleCall, bool] | None) -> None:
        """The time up to now was that of a call, there or back."""
        if self._times:
            self._laps.press(owner)

    # ---- sums --------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Adds up the laps and tells what the modules have cost up to now."""
        for owner, seconds in self._laps.seconds().items():
            assert isinstance(owner, tuple)
            call, backward = owner
            if backward:
                self._spent[call].backward += seconds
            else:
                self._spent[call].forward += seconds
        self._report(self._costs())

    def _costs(self) -> dict[str, ModuleCost]:
        costs: dict[str, _Sums] = {}
        for call, spent in self._spent.items():
            sums = costs.setdefault(call.name, _Sums())
            sums.forward_self += spent.forward
            sums.backward_self += spent.backward
            sums.kept_self += spent.kept
            if not spent.again:
                sums.calls += 1
                sums.freed += spent.freed
                sums.output += spent.output
            for name in {around.name for around in call.chain()}:
                whole = costs.setdefault(name, _Sums())
                whole.forward += spent.forward
                whole.backward += spent.backward
                whole.kept += spent.kept
        return {name: ModuleCost.of(self.modules[name], **vars(sums)) for name, sums in costs.items()}


@dataclass
class _Sums:
    """A `ModuleCost` in the making."""

    calls: int = 0
    forward: float = 0.0
    forward_self: float = 0.0
    backward: float = 0.0
    backward_self: float = 0.0
    kept: int = 0
    kept_self: int = 0
    freed: int = 0
    output: int = 0


def _unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified in place after it was "
            f"saved: it is at version {tensor._version}, expected {version}; clone it before the operation in place"
        )
    return tensor
