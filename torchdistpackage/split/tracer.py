"""Records a model's forward as a graph of whole modules, with the example's real values beside the symbols.

`torch.fx` calls the forward with symbols; a symbol here also carries the value that it has on the example, so that
Python that looks at it (`if height % 7`, `for f in features`, `isinstance(x, list)`) takes the branch that the example
takes. What was looked at is checked in every later run, so that another input never computes the wrong branch in
silence. Sizes are symbols as well: neither the batch size nor the length of a sequence is burnt in.

::

    opened       model.forward   stem(x)   layers[0](x)   layers[1](x)   x.mean(1)   head(x)
    nodes        placeholder     stem      layers.0       layers.1       mean        head       in order

Only the model and the containers that have to be cut through are opened. Every other module stays a node: its type,
names, hooks, training flag and whatever control flow it has inside. Neighbours: `graph.py` looks at what came out,
`traced.py` decides what to open.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from torchdistpackage.split.operations import Ambient, arguments_of, call_object, check_same, outside, run_node
from torchdistpackage.split.signature import UNKNOWN, Example, bound_arguments, call_arguments, opened_dataclasses
from torchdistpackage.split.symbols import (
    LooksAtNumbers,
    Stale,
    Symbol,
    depends_on_numbers,
    line_of_model,
    line_raised,
    opaque_functions,
    recorded_factories,
    replace_stale,
)
from torchdistpackage.split.untraceable import Untraceable, reason_of

__all__ = ["Recording", "has_hooks", "is_plain_sequence", "pipe_split", "record", "versions"]


@dataclass(frozen=True)
class Recording:
    """A forward as a graph, in the order of execution.

    Attributes:
        graph: `node.meta` has `stack` (the opened modules whose forwards made it, each with the number of that call),
            `where` (file and line) and, where it is not the usual one, `ambient` (a context to run in). The output's
            argument is a flat tuple.
        values: What every node gave on the example; empty without one.
        changed: Node -> the nodes whose tensors it changed in place.
        constants: What else the forward uses, by the names of the nodes: tensors that are neither parameters nor
            buffers, and objects that cannot be written down in code.
        inputs: Structure of the bound arguments; leaves that are no tensors are in `fixed`.
        fixed: Place among the leaves of `inputs` -> the value that the recording holds for.
        output: Structure of what the forward returns.
        literals: Place among the leaves of `output` -> a value that is the same in each run.
        hidden_marks: Names of modules that are nodes and have called `pipe_split` inside.
        usual: The contexts around the forward.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    changed: dict[fx.Node, tuple[fx.Node, ...]]
    constants: dict[str, Any]
    inputs: pytree.TreeSpec
    fixed: dict[int, Any]
    output: pytree.TreeSpec
    literals: dict[int, Any]
    hidden_marks: frozenset[str]
    usual: Ambient


def pipe_split() -> None:
    """Marks a place in a forward where a stage ends; does nothing when the model runs.

    `pipeline(module, example)` cuts at the marks, at whatever depth they stand.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         x = x + 1
        ...         pipe_split()
        ...         return x * 2
        >>> Model()(torch.ones(1))
        tensor([4.])
    """
    if _recorders:
        _recorders[-1].mark()


_recorders: list[_Recorder] = []  # the one that records now


def record(
    model: nn.Module,
    example: Example | None,
    *,
    opened: Collection[str] = (),
    closed: Collection[str] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
    marks_at: Mapping[str, str] | None = None,
    prefix: str = "t",
) -> Recording:
    """Records one forward, in the mode in which the model is.

    Args:
        model: Is left as it is, except for what its own forward changes (buffers).
        example: What to call it with; without one every argument that has no default is a symbol without a value.
        opened: Names of modules whose forward is to be recorded, too; those around them are opened as well.
        closed: Names of modules that stay nodes even if they are plain `nn.Sequential`s.
        leaf_functions: Python functions that stay nodes.
        marks_at: Name of a module -> "beginning" or "end": where marks are put, as `pipe_split` would.
        prefix: Of the names of constants.

    Raises:
        Untraceable: The model's forward, or that of an opened module, cannot be recorded.
    """
    tracer = _Recorder(model, example, opened, closed, leaf_functions, marks_at or {}, prefix)
    return tracer.run()


@final
class _Recorder(fx.Tracer):
    """Records and runs each operation as it comes."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        model: nn.Module,
        example: Example | None,
        opened: Collection[str],
        closed: Collection[str],
        leaf_functions: Sequence[Callable[..., Any]],
        marks_at: Mapping[str, str],
        prefix: str,
    ) -> None:
        super().__init__(autowrap_functions=(*leaf_functions, *opaque_functions(model)))
        self._model, self._example, self._marks_at, self._prefix = model, example, marks_at, prefix
        names = [*opened, *(name.rpartition(".")[0] for name in marks_at)]
        self._opened = {name.rsplit(".", up)[0] for name in names for up in range(name.count(".") + 1)}
        self._closed = set(closed) - self._opened
        self._by_name: dict[str, Any] = dict(_named_tensors(model))
        self._tensors = {id(tensor): name for name, tensor in reversed(self._by_name.items())}
        self._attributes: dict[str, Any] = {}
        self._thread = threading.get_ident()
        self._busy = False  # a value is being computed: everything runs as it is
        self._stack: list[tuple[str, int]] = [("", 0)]  # the forwards that run now, each with the number of its call
        self._calls = 0
        self._running = ""  # the module that is computing a value
        self._hidden_marks: set[str] = set()
        self._usual = outside()
        self._meta = any(tensor.is_meta for _, tensor in _named_tensors(model))
        self.values: dict[fx.Node, Any] = {}
        self.changed: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.constants: dict[str, Any] = {}

    def run(self) -> Recording:
        """Records."""
        kept = [(module, dict(vars(module))) for module in self._model.modules()]
        _recorders.append(self)
        try:
            with torch.enable_grad(), recorded_factories(self):
                self._usual = outside()
                graph = self.trace(self._model)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable("", line_raised(error), reason_of(error)) from error
        finally:
            _recorders.pop()
            for module, attributes in kept:  # a forward may leave symbols in its module
                vars(module).clear()
                vars(module).update(attributes)
        return Recording(
            graph,
            self.values,
            self.changed,
            self.constants,
            self._inputs,
            self._fixed,
            self._output,
            self._literals,
            frozenset(self._hidden_marks),
            self._usual,
        )

    @property
    def is_busy(self) -> bool:
        """Whether a value is being computed now, or somebody else's code runs: patches are seen by all threads."""
        return self._busy or threading.get_ident() != self._thread

    def mark(self) -> None:
        """`pipe_split` was called."""
        if self._busy:
            self._hidden_marks.add(self._running)
        else:
            self.create_proxy("call_function", pipe_split, (), {})

    def value_of(self, symbol: Any) -> Any:
        """What a symbol is on the example."""
        return self.values.get(symbol.node, UNKNOWN)

    def look(self, symbol: Symbol, kind: Callable[[Any], Any]) -> Any:
        """Python wants to know a number. Later runs check that it is the same."""
        value = self.value_of(symbol)
        where = line_of_model()
        if value is UNKNOWN:
            raise TraceError(f"{kind.__name__}() looks at a value that is not known without an example")
        if symbol.node.meta.get("of_numbers"):
            raise LooksAtNumbers(f"{kind.__name__}() looks at a size that depends on the numbers in a tensor")
        if isinstance(value, Tensor) and kind is not len:
            raise LooksAtNumbers(
                f"{kind.__name__}() looks at the numbers in a tensor, which differ from batch to batch"
            )
        found = kind(value)
        self.create_proxy("call_function", check_same, (symbol, kind.__name__, found, where), {})
        return found

    # --- what torch.fx asks -------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Symbols of our own kind."""
        return Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything is a leaf but what has to be cut through."""
        if has_hooks(m) or module_qualified_name in self._closed:
            return True
        return module_qualified_name not in self._opened and not is_plain_sequence(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A node, or the forward of an opened module."""
        if self.is_busy:
            return forward(*args, **kwargs)
        assert self.submodule_paths is not None
        path = self.submodule_paths.get(m)
        if path is None:  # made inside of a forward: part of that forward
            return forward(*args, **kwargs)
        at = self._marks_at.get(path)
        if at == "beginning":
            self.mark()
        if self.is_leaf_module(m, path):
            result: Any = self.create_proxy("call_module", path, args, kwargs)
        else:
            self._calls += 1
            self._stack.append((path, self._calls))
            try:
                result = forward(*args, **kwargs)
            except Untraceable:
                raise
            except Exception as error:
                raise Untraceable(path, line_raised(error), reason_of(error)) from error
            finally:
                self._stack.pop()
        if at == "end":
            self.mark()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer that an opened forward reads is a symbol."""
        if self.is_busy or not isinstance(attr_val, Tensor):
            return attr_val
        name = self._tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def create_arg(self, a: Any) -> Any:
        """Symbols by their type: they pretend to be what they stand for."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Stale):
            raise TraceError(f"a list is used whose entry {a.index} a module that it was given to has replaced")
        if isinstance(a, Tensor):
            name = self._tensors.get(id(a))
            return self._constant(a) if name is None else self._attribute(name)
        if isinstance(a, nn.Module) and self.submodule_paths is not None and a in self.submodule_paths:
            node = self.create_node("get_attr", self.submodule_paths[a], (), {})
            node.meta["module"], self.values[node] = True, a
            return node
        if isinstance(a, torch.Size):
            return tuple(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object of the user's, as it is
            if any(isinstance(value, fx.Proxy) for value in getattr(a, "__dict__", {}).values()):
                raise
            return self._constant(a)

    def _constant(self, value: Any) -> fx.Node:
        """Something that is neither a parameter nor a buffer nor written down in code: the stage keeps it."""
        name = next((name for name, other in self.constants.items() if other is value), None)
        if name is None:
            name = f"_constants.{self._prefix}{len(self.constants)}"
            self._by_name[name] = self.constants[name] = value
        return self._attribute(name)

    def _attribute(self, name: str) -> fx.Node:
        node = self.create_node("get_attr", name, (), {})
        self.values[node] = self._by_name[name]
        return node

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Notes where it comes from."""
        node = super().create_node(*args, **kwargs)
        node.meta["stack"], node.meta["where"] = tuple(self._stack), line_of_model()
        now = outside()
        if now != self._usual and node.op.startswith("call_"):
            node.meta["ambient"] = now
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Any:
        """Makes the node and computes its value. None is not a symbol: Python asks for it by identity."""
        if kind == "call_function" and not _has_name(target):
            name = getattr(target, "__name__", "")
            args, target, named = (target, *args), call_object, {"name": name if name.isidentifier() else "function"}
        symbol = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if kind == "placeholder" or target is pipe_split:
            return symbol
        node = symbol.node
        if self._example is not None:
            value = self._compute(node, (args, kwargs))
            self.values[node] = value
            if value is None:
                return None
        return symbol

    def _compute(self, node: fx.Node, given: Any) -> Any:
        if node.op == "get_attr":
            return self._by_name[str(node.target)]
        before = {n: versions(self.values[n]) for n in node.all_input_nodes}
        module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
        buffers = [] if module is None else list(module.buffers())
        node.meta["trains"] = module is not None and any(p.requires_grad for p in module.parameters())
        statistics = versions(buffers)
        args, kwargs = arguments_of(node, self.values)
        self._busy, self._running = True, str(node.target) if node.op == "call_module" else ""
        try:
            # Without a graph, which would hold the whole forward; what a meta model makes is on the meta device.
            with torch.no_grad(), torch.device("meta") if self._meta else nullcontext():
                value = run_node(self._model, node, args, kwargs)
        finally:
            self._busy = False
        replace_stale(given, (args, kwargs), arguments_of(node, self.values))
        changed = tuple(n for n, old in before.items() if versions(self.values[n]) != old)
        if changed:
            self.changed[node] = changed
        node.meta["stateful"] = versions(buffers) != statistics
        node.meta["of_numbers"] = depends_on_numbers(node, self.values)
        return value

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """A symbol for each tensor among the arguments; the rest is as in the example."""
        forward = self._model.forward
        leaves, self._inputs = pytree.tree_flatten(dict(bound_arguments(forward, self._example)))
        self._fixed, arguments = {}, []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) and leaf is not UNKNOWN:
                self._fixed[i] = leaf
                arguments.append(leaf)
                continue
            symbol = self.create_proxy("placeholder", f"input_{i}", (), {})
            if leaf is not UNKNOWN:
                self.values[symbol.node] = leaf.detach().to("meta") if self._meta else leaf.detach().clone()
            arguments.append(symbol)

        def root(*_: Any) -> tuple[Any, ...]:
            again = call_arguments(forward, pytree.tree_unflatten(arguments, self._inputs))
            returned, self._output = pytree.tree_flatten(opened_dataclasses(forward(*again.args, **again.kwargs)))
            self._literals = {i: leaf for i, leaf in enumerate(returned) if not isinstance(leaf, (fx.Proxy, Tensor))}
            return tuple(leaf for i, leaf in enumerate(returned) if i not in self._literals)

        return root, []


def _has_name(function: Any) -> bool:
    """Whether generated code can say what it calls; a local or compiled function is an object that it is given."""
    if isinstance(function, FunctionType):
        return getattr(sys.modules.get(function.__module__), function.__name__, None) is function
    return not isinstance(function, (torch.jit.ScriptFunction, MethodType, functools.partial))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be told when the module runs."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in hooks)


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether running its members in turn is all that the module does."""
    own = "forward" in vars(module)
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not own


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def versions(value: Any) -> list[int]:
    """How often each tensor of a value has been changed in place."""
    leaves = pytree.tree_leaves(value)
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
