"""The second door: `torch.export` records what the first one cannot, at the price of the modules.

`torch.export` runs the forward on tensors that are fake but real to Python, so that code which needs a true tensor
(numpy, C++, `torch.func`) goes through. What comes out are torch's own operators: types of modules and hooks are gone,
and training is burnt in, which is why it is exported once for each mode. Parameters and buffers keep their names.

Everything that is known of torch's export is in this file; what it returns is a `Recording` like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast, final

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from torchdistpackage.split.names import tensors_of
from torchdistpackage.split.operations import arguments_of, check_holds, outside, run_node
from torchdistpackage.split.recordable import versions
from torchdistpackage.split.recording import Recording
from torchdistpackage.split.signature import Example, bound_arguments
from torchdistpackage.split.unrepeatable import as_they_were, unrepeated, watched
from torchdistpackage.split.untraceable import Untraceable, reason_of

__all__ = ["record_exported"]

# Older torch's checkpointing notes its arguments with an autograd.Function that computes nothing; newer ones have none.
_OF_CHECKPOINT = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)


def record_exported(model: nn.Module, example: Example, refused: Untraceable, prefix: str) -> Recording:
    """Records a forward through `torch.export`, in the mode in which the model is.

    Args:
        model: Is left as it is, except for what its own forward changes (buffers).
        example: What to call it with.
        refused: Why the first door did not do; raised again if this one does not either.
        prefix: Of the names of constants.

    Raises:
        Untraceable: torch.export cannot record it either.
    """
    bound = dict(bound_arguments(model.forward, example))
    leaves, inputs = pytree.tree_flatten(bound)
    fixed = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    try:
        with as_they_were(model), _nothing_lost(model), unrepeated(model) as check:
            shapes = pytree.tree_map(_any_size, bound)
            program = torch.export.export(
                model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
            )
            check("")
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        return _as_recording(model, module, leaves, inputs, fixed, prefix)
    except Exception as error:  # whatever torch.export raises: the list is long, and differs between versions
        reason = f"{refused.reason} (and torch.export: {reason_of(error)})"
        raise Untraceable(refused.path, refused.where, reason) from error


def _any_size(value: Any) -> Any:
    return {dim: torch.export.Dim.AUTO for dim in range(value.dim())} if isinstance(value, Tensor) else None


def _as_recording(
    model: nn.Module, module: fx.GraphModule, leaves: list[Any], inputs: Any, fixed: dict[int, Any], prefix: str
) -> Recording:
    replay = _Replay(model, module, prefix)
    given = iter(leaves)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            replay.argument(node, next(given))
        elif node.op == "output":
            results = pytree.tree_leaves(node.args[0])
        else:
            replay.add(node)
    replay.graph.output(tuple(replay.copied[r] for r in results if isinstance(r, fx.Node)))
    literals = {i: r for i, r in enumerate(results) if not isinstance(r, fx.Node)}
    constants, spec = replay.constants, cast(pytree.TreeSpec, module._out_spec)
    changed = replay.changed
    return Recording(
        replay.graph, replay.values, changed, constants, inputs, fixed, spec, literals, frozenset(), outside()
    )


@contextmanager
def _nothing_lost(model: nn.Module) -> Iterator[None]:
    """Inside, what torch.export would drop without a word is an error: backward hooks, and backwards of one's own."""
    if hooked := [n for n, m in model.named_modules() if vars(m)["_backward_hooks"] or vars(m)["_backward_pre_hooks"]]:
        raise TraceError(f"{hooked[0]} has backward hooks")

    def stopped(*_: Any, **__: Any) -> Any:
        raise TraceError("the forward registers hooks on tensors, or calls a torch.autograd.Function")

    def applied(function: type, *args: Any, **kwargs: Any) -> Any:
        if function is not _OF_CHECKPOINT:
            stopped()
        return apply.__get__(None, function)(*args, **kwargs)

    register, apply = torch.Tensor.register_hook, vars(torch.autograd.Function)["apply"]
    try:
        torch.Tensor.register_hook = stopped  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(applied)
        with watched(model, lambda: False, tensors=False):
            yield
    finally:
        torch.Tensor.register_hook = register  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply


@final
class _Replay:
    """Copies an exported graph node by node and runs it on the way, for the values and for what changes in place."""

    def __init__(self, model: nn.Module, module: fx.GraphModule, prefix: str) -> None:
        self._module, self._model, self._prefix = module, model, prefix
        self._tensors = dict(tensors_of(model))
        self.graph, self.copied = fx.Graph(), dict[fx.Node, Any]()
        self.values, self.constants = dict[fx.Node, Any](), dict[str, Any]()
        self.changed = dict[fx.Node, tuple[fx.Node, ...]]()
        self._depth = 0  # of torch.func's transforms, inside of which no operation stands alone

    def argument(self, node: fx.Node, value: Any) -> None:
        """An argument of the forward; what is no tensor is not used in the graph."""
        if isinstance(value, Tensor):
            self._keep(node, self.graph.placeholder(f"input_{len(self.values)}"), value.detach().clone())

    def add(self, node: fx.Node) -> None:
        """Any other node but the output."""
        if node.op == "get_attr":
            self._keep(node, *self._attribute(str(node.target)))
            return
        args: Any = fx.node.map_arg(node.args, self.copied.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.copied.__getitem__)
        if node.op == "call_module":  # the checks of what the example has fixed
            check, _ = self._attribute(str(node.target))
            made = self.graph.call_function(check_holds, (check, *args), kwargs)
        else:
            made = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        before = {n: versions(self.values[n]) for n in made.all_input_nodes}
        with torch.no_grad():
            value = run_node(self._model, made, *arguments_of(made, self.values))
        if touched := tuple(n for n, old in before.items() if versions(self.values[n]) != old):
            self.changed[made] = touched
        self._keep(node, made, value)

    def _keep(self, node: fx.Node, made: fx.Node, value: Any) -> None:
        name = str(node.target)
        self._depth -= "decrement_nesting" in name
        made.meta.update(stack=(("", 0),), where="torch.export", inside=self._depth > 0)
        self._depth += "increment_nesting" in name
        self.copied[node], self.values[made] = made, value

    def _attribute(self, name: str) -> tuple[fx.Node, Any]:
        """A parameter or buffer under its own name, or something that torch.export keeps beside the model."""
        if name in self._tensors:
            made, value = self.graph.get_attr(name), self._tensors[name]
        else:
            value = operator.attrgetter(name)(self._module)
            name = f"_constants.{self._prefix}{len(self.constants)}"
            self.constants[name], made = value, self.graph.get_attr(name)
        self.values[made] = value
        return made, value
