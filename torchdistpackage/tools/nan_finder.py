"""Finds the module, the parameter or the operation in which the first NaN or Inf arises, forward and backward.

::

    with find_nan(model):
        loss_fn(model(images), targets).backward()

In the forward pass the inputs and outputs of every module are looked at. Who gives out worse numbers than came in, and
than the modules inside it gave out, made them::

    root(x)             x finite
      embed(x)          finite -> finite
      (root's own code: y = y / 0)
      block(y)          NaN came in, and nobody gave it out: root made it, before block

In the backward pass every operation of autograd is looked at in the same way; whose it is, `graph_nodes.py` knows. The
scale is finite < Inf < NaN: an attention mask full of -Inf is nobody's fault, but a NaN made from it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.tools.finite import Trouble, trouble_in
from torchdistpackage.tools.graph_nodes import GraphNodes, is_leaf
from torchdistpackage.tools.module_calls import ModuleCall, ModuleCalls, in_backward
from torchdistpackage.tools.non_finite import NonFinite, count, words
from torchdistpackage.tools.values import tensors_in

__all__ = ["NanFinder", "NonFinite", "find_nan"]

_MOST = 100  # findings that are remembered

logger = logging.getLogger(__name__)


def find_nan(model: nn.Module, *, raise_error: bool = True, check_inputs: bool = True, inf: bool = True) -> NanFinder:
    """Watches a model from now on, until `remove()` or the end of the `with` block.

    The first module whose output is worse than all that came in is named with its enclosing modules, and how many
    elements are bad. If one of its parameters is bad, that is named instead: it was so before. Backward, it is the
    first operation, and the module and the parameter that it belongs to. In a pipeline, watch each rank's stage: the
    rank that finds something raises, and the step fails on all ranks with its message.

    Every input, output and gradient is read once, which on a CPU takes a tenth to a quarter of the time of a step; on
    CUDA the device is waited for each time, which is slow where kernels are short. Layers that work in place,
    checkpointing and outputs in containers are fine. Compiled modules are looked at from outside. A pass has one
    finding, as the rest follows from it.

    Args:
        model: The model; several, or a loss with them, in an `nn.ModuleList`.
        raise_error: Whether to raise; if not, findings are logged as warnings, and are in `found`.
        check_inputs: Whether a NaN in what the model is called with is reported. Inf is not: masks are made of it.
        inf: Whether Inf counts. Under a gradient scaler gradients overflow now and then on purpose: pass False.

    Returns:
        The finder, a context manager.

    Raises:
        ValueError: The model was scripted, or compiled in place.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
        >>> _ = nn.init.constant_(model[0].bias, float("nan"))
        >>> with find_nan(model, raise_error=False) as finder:
        ...     _ = model(torch.zeros(1, 2))
        >>> finder.first.parameter, finder.first.module
        ('0.bias', '0')
    """
    return NanFinder(model, raise_error=raise_error, check_inputs=check_inputs, inf=inf)


@dataclass
class _Seen:
    """How bad numbers were in one call: those that came in, and all that its own code has had in hands."""

    inputs: Trouble
    worst: Trouble


@final
class NanFinder:
    """What `find_nan` returns; arguments as there.

    Attributes:
        found: What was found, in order, one a pass; 100 at most.

    Example:
        >>> class Log(nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> model = nn.Sequential(nn.ReLU(), Log())
        >>> finder = NanFinder(model, raise_error=False)
        >>> _ = model(torch.tensor([2.0, -2.0]))
        >>> print(finder.first)
        Inf in the output of 1 (Log), inside root (Sequential) [forward]: 0 NaN and 1 Inf in 2 elements, ...
        >>> finder.remove()
    """

    def __init__(
        self, model: nn.Module, *, raise_error: bool = True, check_inputs: bool = True, inf: bool = True
    ) -> None:
        self.found: list[NonFinite] = []
        self._raise, self._check_inputs = raise_error, check_inputs
        self._least = Trouble.INF if inf else Trouble.NAN
        self._model = model
        self._nodes = GraphNodes()
        self._seen: dict[ModuleCall, _Seen] = {}
        self._last: dict[str, ModuleCall] = {}
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: dict[int, str] = {}
        self._active = True
        self._spoilt = False  # this pass has its finding; what follows from it is none
        self._calls = ModuleCalls(model, self)

    @property
    def first(self) -> NonFinite | None:
        """The first that was found."""
        return self.found[0] if self.found else None

    def remove(self) -> None:
        """Ends the watch."""
        self._active = False
        self._calls.remove()

    def __enter__(self) -> NanFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # ---- forward -----------------------------------------------------------------------------------------------------

    def started(self, call: ModuleCall, inputs: Any) -> None:
        """Looks at what came in; see `module_calls.Watcher`."""
        tensors = tensors_in(inputs)
        caller = call.parent
        if caller is None:
            self._begin(call, tensors)
        else:
            self._watch(tensors, caller)
        trouble = self._trouble(tensors)
        self._seen[call] = _Seen(trouble, trouble)
        if caller is None:
            if trouble is Trouble.NAN and not in_backward():
                if self._check_inputs:
                    self._report_input(call, tensors)
                self._spoilt = True
        elif trouble is Trouble.NAN and self._seen[caller].worst < trouble:
            advice = f"{_before(self._seen[caller])}, and no module inside it gave it out"
            self._blame(caller, f"what {caller} computes before it calls {call}", tensors, trouble, advice)
            self._seen[caller].worst = trouble

    def finished(self, call: ModuleCall, output: Any) -> None:
        """Looks at what goes out."""
        tensors = tensors_in(output)
        self._watch(tensors, call)
        trouble, seen = self._trouble(tensors), self._seen.pop(call)
        self._last[call.name] = call
        if call.parent in self._seen:
            around = self._seen[call.parent]
            around.worst = max(around.worst, trouble)
        else:
            self._end(tensors)
        if trouble > seen.worst and trouble >= self._least:
            self._blame(call, f"the output of {call}", tensors, trouble, _before(seen))

    def failed(self, call: ModuleCall, error: BaseException | None) -> None:
        """Forgets the call."""
        self._seen.pop(call, None)
        if not self._seen:
            self._nodes.forget()

    def _begin(self, call: ModuleCall, inputs: Sequence[torch.Tensor]) -> None:
        """A pass begins, or checkpointing computes again what it has not kept."""
        self._nodes.skip(inputs)
        if not in_backward():
            self._last.clear()
            self._spoilt = False
            self._names = {id(parameter): name for name, parameter in self._model.named_parameters()}

    def _end(self, outputs: Sequence[torch.Tensor]) -> None:
        self._nodes.forget()
        if not in_backward():
            for node in {tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None}:
                node.register_prehook(self._arrived)

    def _trouble(self, tensors: Sequence[torch.Tensor]) -> Trouble:
        """How bad tensors are; what one module gives to the next is read once."""
        worst = Trouble.NONE
        for tensor in tensors:
            version = -1 if tensor.is_inference() else tensor._version
            known = self._known.get(tensor)  # type: ignore[no-untyped-call]
            if known is None or version < 0 or known[0] != version:
                known = self._known[tensor] = (version, trouble_in([tensor]))
            worst = max(worst, known[1])
        return worst

    # ---- backward ----------------------------------------------------------------------------------------------------

    def _watch(self, tensors: Sequence[torch.Tensor], call: ModuleCall) -> None:
        """Has the operations looked at that made these tensors and that nobody has met yet: they are the call's."""
        for node in self._nodes.new(tensors):
            if not is_leaf(node):
                self._hook(node, call)

    def _hook(self, node: Node, call: ModuleCall) -> None:
        operation = node.name()  # the hook must not hold the node, which holds the hook
        leaves = [self._leaf_name(behind) for behind, _ in node.next_functions]

        def look(gradients_out: Sequence[Any], gradients_in: Sequence[Any]) -> None:
            if not self._active or self._spoilt:
                return
            results = tensors_in(list(gradients_out))
            trouble = trouble_in(results)
            if trouble < self._least:
                return
            given = trouble_in(tensors_in(list(gradients_in)))
            if trouble <= given or (given and self._least > given):  # of an Inf that does not count, a NaN may come
                return
            bad = [g is not None and trouble_in([g]) is trouble for g in gradients_out]
            names = [name for name, is_bad in zip(leaves, bad, strict=False) if is_bad and name]
            self._blame_operation(call, operation, names, results, trouble, given)

        node.register_hook(look)

    def _leaf_name(self, node: Node | None) -> str | None:
        return self._names.get(id(node.variable)) if node is not None and is_leaf(node) else None  # type: ignore[attr-defined]

    def _arrived(self, gradients: Sequence[Any]) -> None:
        """What comes back to the model's outputs was made outside of it."""
        given = tensors_in(list(gradients))
        trouble = trouble_in(given) if self._active else Trouble.NONE
        if trouble >= self._least:
            advice = "it came from outside: look at the loss and what scales it"
            what = "the gradient that reaches the model's output"
            self._report(NonFinite(trouble.words, "backward", what, None, (), count(given), advice))

    # ---- findings ----------------------------------------------------------------------------------------------------

    def _blame(
        self, call: ModuleCall, what: str, tensors: Sequence[torch.Tensor], trouble: Trouble, before: str
    ) -> None:
        """Reports what a call gave out: its parameters' fault, or its own."""
        phase = "forward, recomputed" if in_backward() else "forward"
        for name, tensor, least in _held(call):
            if trouble_in([tensor]) >= least:
                whole = name if call.name == "root" else f"{call.name}.{name}"
                told = f"{whole}, which {call} computes with"
                advice = "it was so before this call: look at the last optimizer step, or where the model was loaded"
                held = trouble_in([tensor]).words
                inside = self._around(call)
                self._report(NonFinite(held, phase, told, call.name, inside, count([tensor]), advice, whole))
                return
        advice = f"{before}; look for a division, log, sqrt or exp of extreme numbers there, or a wider dtype"
        self._report(NonFinite(trouble.words, phase, what, call.name, self._around(call), count(tensors), advice))

    def _blame_operation(
        self,
        call: ModuleCall,
        operation: str,
        names: Sequence[str],
        gradients: Sequence[torch.Tensor],
        trouble: Trouble,
        given: Trouble,
    ) -> None:
        of = f"the gradient of {' and '.join(names)}" if names else "the gradient"
        what = f"{of} that {operation} of {call} computes"
        advice = (
            f"{words(given, 'the gradients that it was given')}; where its derivative has no bound (sqrt or norm at 0, "
            f"a division) add an epsilon, or clamp its input"
        )
        found = NonFinite(
            trouble.words, "backward", what, call.name, self._around(call), count(gradients), advice,
            names[0] if names else None, operation,
        )  # fmt: skip
        self._report(found)

    def _report_input(self, call: ModuleCall, tensors: Sequence[torch.Tensor]) -> None:
        advice = "it came from outside: look at the data and at what ran before the model"
        what = f"the inputs of {call}"
        self._report(NonFinite("NaN", "forward", what, None, (), count(tensors), advice))

    def _around(self, call: ModuleCall) -> tuple[str, ...]:
        """The calls around one; for one that checkpointing repeats, those of the first time."""
        around = list(call.chain())[1:]
        outermost = around[-1] if around else call
        if in_backward() and outermost.name in self._last:
            around += list(self._last[outermost.name].chain())[1:]
        return tuple(map(str, dict.fromkeys(around)))

    def _report(self, found: NonFinite) -> None:
        if self._spoilt:
            return
        self._spoilt = True
        if len(self.found) < _MOST:
            self.found.append(found)
        if self._raise:
            raise found.as_error()
        logger.warning("%s", found)


def _before(seen: _Seen) -> str:
    return words(seen.inputs, "its inputs")


def _held(call: ModuleCall) -> list[tuple[str, torch.Tensor, Trouble]]:
    """What a module computes with, and how bad it must be to be bad: masks among buffers may be full of -Inf."""
    parameters = [(name, tensor, Trouble.INF) for name, tensor in call.module.named_parameters()]
    return [*parameters, *((name, tensor, Trouble.NAN) for name, tensor in call.module.named_buffers())]
