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

import operator
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from torchdistpackage.split.marks import listening, pipe_split
from torchdistpackage.split.names import tensors_of
from torchdistpackage.split.operations import arguments_of, call_object, check_same, outside, run_node, same
from torchdistpackage.split.patches import opaque_functions, recorded_factories
from torchdistpackage.split.recordable import (
    asks_for_gradients,
    check_recordable,
    has_hooks,
    has_name,
    is_plain_sequence,
    may_write,
    same_objects,
    versions,
)
from torchdistpackage.split.recording import Recording
from torchdistpackage.split.signature import UNKNOWN, Example, bound_arguments, call_arguments, opened_dataclasses
from torchdistpackage.split.symbols import (
    BY_IDENTITY,
    LooksAtNumbers,
    Stale,
    Symbol,
    contents_of,
    depends_on_numbers,
    line_of_model,
    line_raised,
    replace_stale,
    written_global,
)
from torchdistpackage.split.type_answers import answering_types
from torchdistpackage.split.unrepeatable import (
    RecordedParameters,
    Unrepeatable,
    as_they_were,
    check_held,
    random_as_it_was,
    unrepeated,
    watched,
)
from torchdistpackage.split.untraceable import Untraceable, reason_of

__all__ = ["record"]


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
        closed: Names of modules that stay nodes even if they are plain `nn.Sequential` modules.
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
        self._by_name: dict[str, Any] = dict(tensors_of(model))
        self._tensors = {id(tensor): name for name, tensor in reversed(self._by_name.items())}
        self._attributes: dict[str, Any] = {}
        self._thread = threading.get_ident()
        self._busy = False  # a value is being computed: everything runs as it is
        self._stack: list[tuple[str, int]] = [("", 0)]  # the forwards that run now, each with the number of its call
        self._calls = 0
        self._running = ""  # the module that is computing a value
        self._hidden_marks: set[str] = set()
        self._check: Callable[[str], None]
        self._failed: Exception | None = None  # of an operation
        self._contents: dict[int, tuple[nn.Parameter, Tensor]] = {}  # of parameters that the forward writes into
        self._usual = outside()
        self._meta = any(tensor.is_meta for _, tensor in tensors_of(model))
        self.values: dict[fx.Node, Any] = {}
        self.changed: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.constants: dict[str, Any] = {}

    def run(self) -> Recording:
        """Records; raises `Untraceable`."""
        check_recordable(self._model)
        try:
            with (
                as_they_were(self._model),  # a forward may leave symbols in its module
                listening(self.mark),
                random_as_it_was(),
                watched(self._model, lambda: self._busy, value_of=self._value),
                unrepeated(self._model) as self._check,
                torch.enable_grad(),
                recorded_factories(self),
                answering_types(self._model, self._value),
                RecordedParameters(lambda value: self.getattr("", value, {}), lambda: self._busy),
            ):
                self._usual = outside()
                graph = self.trace(self._model)
                self._forward_done("", self._model.forward)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable("", line_raised(error, self._model.forward), reason_of(error)) from error
        finally:
            with torch.no_grad():
                for parameter, content in self._contents.values():
                    parameter.copy_(content)
        structure, marks = (self._inputs, self._fixed, self._output, self._literals), frozenset(self._hidden_marks)
        return Recording(graph, self.values, self.changed, self.constants, *structure, marks, self._usual)

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

    def _forward_done(self, path: str, forward: Any) -> None:
        """Looks whether the forward of an opened module has done what a recording does not hold."""
        self._check(path)
        if self._failed is not None:
            raise Unrepeatable(f"the forward catches an error, and goes on: {reason_of(self._failed)}")
        if name := written_global(forward):
            raise Unrepeatable(f"the forward sets the global {name}, and no stage would do that")

    def _value(self, value: Any) -> Any:
        """What a symbol stands for; any other value as it is."""
        return self.values.get(value.node, UNKNOWN) if isinstance(value, fx.Proxy) else value

    def look(self, symbol: Symbol, kind: Callable[[Any], Any]) -> Any:
        """Python wants to know a number. Later runs check that it is the same.

        Raises:
            TraceError: It is not known without an example.
            LooksAtNumbers: It depends on the numbers in a tensor.
        """
        value = self.value_of(symbol)
        where = line_of_model()
        if value is UNKNOWN:
            raise TraceError(f"{kind.__name__}() looks at a value that is not known without an example")
        if symbol.node.meta.get("of_numbers"):
            raise LooksAtNumbers(f"{kind.__name__}() looks at a size that depends on the numbers in a tensor")
        if isinstance(value, Tensor) and kind is not len:
            raise LooksAtNumbers(f"{kind.__name__}() looks at the numbers in a tensor, new ones in each batch")
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
                self._forward_done(path, forward)
            except Untraceable:
                raise
            except Exception as error:
                raise Untraceable(path, line_raised(error, m.forward), reason_of(error)) from error
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
        if isinstance(a, torch.Generator):
            raise Unrepeatable("the forward draws from a torch.Generator, of which each stage would have its own")
        try:
            return super().create_arg(a)
        except NotImplementedError:  # an object of the user's, as it is
            return self._constant(a)

    def _constant(self, value: Any) -> fx.Node:
        """Something that is neither a parameter nor a buffer nor written down in code: the stage keeps it."""
        name = next((name for name, other in self.constants.items() if other is value), None)
        if name is None:
            check_held(value, self._model)
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
        if kind == "call_function" and not has_name(target):
            name = getattr(target, "__name__", "")
            args, target, named = (target, *args), call_object, {"name": name if name.isidentifier() else "function"}
        symbol = super().create_proxy(kind, target, args, kwargs, *more, **named)
        if kind == "placeholder" or target is pipe_split:
            return symbol
        node = symbol.node
        if self._example is not None:
            self._busy = True
            try:
                value = self._compute(node, (args, kwargs))
            except Exception as error:
                self._failed = error
                raise
            finally:
                self._busy = False
            self.values[node] = value
            if value is None:
                return None
            picked = kind == "call_module" or target is operator.getitem
            if picked and isinstance(value, (*BY_IDENTITY, str)):  # Python asks `is`, or takes it for a key
                return self.look(symbol, same)  # type: ignore[arg-type]
        return symbol

    def _compute(self, node: fx.Node, given: Any) -> Any:
        if node.op == "get_attr":
            return self._by_name[str(node.target)]
        before = {n: versions(self.values[n]) for n in node.all_input_nodes}
        contents = [contents_of(self.values[n]) for n in before]
        module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
        buffers = [] if module is None else list(module.buffers())
        held = [] if module is None else [(dict(vars(m)), dict(m._buffers)) for m in module.modules()]
        node.meta["tensors"] = {id(tensor) for _, tensor in tensors_of(module)} if module is not None else ()
        node.meta["trains"] = module is not None and any(p.requires_grad for p in module.parameters())
        statistics = versions(buffers)
        args, kwargs = arguments_of(node, self.values)
        self._running = str(node.target) if node.op == "call_module" else ""
        self._keep_parameters(node)
        # Without a graph, which would hold the whole forward; what a meta model makes is on the meta device.
        with torch.no_grad(), random_as_it_was(), torch.device("meta") if self._meta else nullcontext():
            value = None if asks_for_gradients(node, args) else run_node(self._model, node, args, kwargs)
        replace_stale(given, (args, kwargs), arguments_of(node, self.values))
        if [contents_of(self.values[n]) for n in before] != contents:
            raise TraceError(f"{node.target} writes into a list or dict that another module has returned")
        changed = tuple(n for n, old in before.items() if versions(self.values[n]) != old)
        if changed:
            self.changed[node] = changed
        now = [] if module is None else [(vars(m), m._buffers) for m in module.modules()]
        kept = all(same_objects(a, c) and same_objects(b, d) for (a, b), (c, d) in zip(held, now, strict=True))
        node.meta["stateful"] = versions(buffers) != statistics or not kept
        node.meta["of_numbers"] = depends_on_numbers(node, self.values)
        return value

    def _keep_parameters(self, node: fx.Node) -> None:
        """Notes what is in a parameter before an operation that may write into it."""
        for value in [self.values[n] for n in node.all_input_nodes] if may_write(node) else ():
            if isinstance(value, nn.Parameter) and id(value) not in self._contents:
                self._contents[id(value)] = (value, value.detach().clone())

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
