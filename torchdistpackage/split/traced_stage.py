"""One stage of a traced model: an ordinary module with the model's own submodules, parameters and names.

::

    Model                                  stage 1
      stem   layers                          layers
               0  1  2  3                      2  3          the same objects, under the same names

What it computes is Python code that was generated once for training and once for evaluation (the same object, where the
two do not differ): nothing interprets a graph at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType, SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.schedule.routing import Routed
from torchdistpackage.split.graph import CutRow
from torchdistpackage.split.operations import device_of, run_inside
from torchdistpackage.split.recording import Recording
from torchdistpackage.split.signature import Calling, Returning

__all__ = ["Code", "TracedStage", "assemble", "make_code", "put"]


@final
class Function:
    """Generated code that can be copied and pickled."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self._names = source, names
        space = dict(names)
        exec(compile(source, f"<stage at {id(self):#x}>", "exec"), space)
        self.call: Callable[..., Any] = space["forward"]

    def __reduce__(self) -> Any:
        modules = {name: value.__name__ for name, value in self._names.items() if isinstance(value, ModuleType)}
        rest = {name: value for name, value in self._names.items() if name not in modules}
        return _unpickled, (self.source, rest, modules)

    def __deepcopy__(self, memo: Any) -> Function:
        return self


def _unpickled(source: str, names: dict[str, Any], modules: dict[str, str]) -> Function:
    return Function(source, {**names, **{name: importlib.import_module(module) for name, module in modules.items()}})


@dataclass(frozen=True)
class Code:
    """What one stage does in one mode.

    Attributes:
        function: Takes the stage and the values that come in, returns a tuple of those that go out.
        takes: What comes in, for people: name of the value and the stage that sends it; empty on the first stage.
        wraps: Places among `takes` whose value may itself be a list or tuple.
        gives: Stage -> the places in the function's result of what it gets; empty on the last stage.
        skips: The table of the whole pipeline, see `Routed`.
        calling: On the first stage, the model's arguments.
        returning: On the last stage, what the model returns.
        bare: Whether the one value that goes out is a tensor, which needs no tuple around it.
        modules: Names of the model's modules that it calls.
        tensors: Names of the parameters and buffers that it reads itself.
    """

    function: Function
    takes: tuple[tuple[str, int], ...]
    wraps: frozenset[int]
    gives: Mapping[int, tuple[int, ...]]
    skips: tuple[tuple[int, int], ...]
    calling: Calling | None
    returning: Returning | None
    bare: bool
    modules: frozenset[str]
    tensors: frozenset[str]


@final
class Part(nn.Module):
    """Stands where the model has a module of which this stage has only some members."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def _get_name(self) -> str:
        return f"part of {self._kind}"


@final
class TracedStage(nn.Module):
    """A stage of a model that was cut by tracing; made by `Pipe`.

    Call it with what the previous stage returned: one value, several, or a list of them. The first stage takes what the
    model takes, the last one returns what the model returns.

    Args:
        index: Global index of the stage.
        num_stages: How many there are.
        kind: Name of the model's class.

    Example:
        >>> from torchdistpackage.split import split
        >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(3, 4)
        >>> pipe = split(model, x, 2, costs="flops")
        >>> first, last = pipe.get_stage_module(0), pipe.get_stage_module(1)
        >>> torch.equal(last(first(x)), model(x)), list(last.state_dict()), last.get_submodule("2") is model[2]
        (True, ['2.weight', '2.bias'], True)
        >>> first.is_first_stage, first.is_last_stage
        (True, False)
    """

    def __init__(self, index: int, num_stages: int, kind: str) -> None:
        super().__init__()
        self._at, self._kind = f"stage {index} of {num_stages}", kind
        self._is_first_stage, self._is_last_stage = index == 0, index == num_stages - 1
        self._codes: dict[bool, Code | str] = {}
        self._constants = SimpleNamespace()

    @property
    def is_first_stage(self) -> bool:
        """Whether the model's input enters here."""
        return self._is_first_stage

    @property
    def is_last_stage(self) -> bool:
        """Whether the model's output, and with it the loss, comes from here."""
        return self._is_last_stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the stage.

        Raises:
            SplitError: Other values come in than this stage takes, or the model's Python would go another way than when
                it was split.
        """
        code = self._codes[self.training]
        if isinstance(code, str):
            raise SplitError(code)
        if code.calling is not None:
            values: Sequence[Any] = _of_model(code.calling, args, kwargs)
        else:
            values = args if len(args) == len(code.takes) != 1 else self._spread(code, args)
        found = code.function.call(self, *values)
        return self._passed_on(code, found)

    def _passed_on(self, code: Code, found: tuple[Any, ...]) -> Any:
        if code.returning is not None:
            return code.returning.build(found)
        if code.skips:
            return Routed(
                {stage: tuple(found[place] for place in places) for stage, places in code.gives.items()}, code.skips
            )
        return found[0] if code.bare else found

    def _spread(self, code: Code, args: tuple[Any, ...]) -> Sequence[Any]:
        count = len(code.takes)
        if len(args) == 1 and type(args[0]) in (list, tuple) and len(args[0]) == count:
            # One value that is a list itself comes as it is, or, from x[:-1], in a list of one.
            if count != 1 or not code.wraps or isinstance(args[0][0], (list, tuple)):
                return list(args[0])
        if len(args) != count:
            got = len(args[0]) if len(args) == 1 and type(args[0]) in (list, tuple) else len(args)
            wanted = ", ".join(f"{name} (of stage {stage})" for name, stage in code.takes) or "nothing"
            raise SplitError(
                f"{self._at} takes {count} value(s), {wanted}, and got {got}. Call it with what came from the "
                "stages before: stage(x), and stage(x[:-1]) where fwd_fn's list ends with one input of its own"
            )
        return args

    def extra_repr(self) -> str:
        """Which stage of what."""
        return f"{self._at} of {self._kind}"

    def generated_code(self) -> str:
        """The Python code that runs in the present mode, for training or for evaluation."""
        code = self._codes[self.training]
        return code if isinstance(code, str) else code.function.source


def _of_model(calling: Calling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The tensors of a call of the first stage; a list or dict of all arguments is spread, as fwd_fn gets them."""
    if len(args) == 1 and not kwargs:
        if isinstance(args[0], dict) and calling.takes_by_name(args[0]):
            return calling.tensors((), args[0])
        if type(args[0]) in (list, tuple) and calling.takes_several(args[0]):
            return calling.tensors(args[0], {})
    return calling.tensors(args, kwargs)


def make_code(cut_row: CutRow, stage: int, calling: Calling, returning: Returning, constants: dict[str, Any]) -> Code:
    """Generates the code of one stage.

    Args:
        cut_row: The row, cut.
        stage: Which one.
        calling: How the model is called.
        returning: What it returns.
        constants: Gets the objects that the code uses and that are neither modules nor parameters.
    """
    recording, last = cut_row.row.recording, stage == cut_row.num_stages - 1
    graph, made = fx.Graph(), {}
    arriving = [flow for flow in cut_row.flows if flow.target == stage]
    if stage == 0:
        incoming = [node for node in recording.graph.nodes if node.op == "placeholder"]
    else:
        incoming = [flow.value for flow in arriving]
    for value in incoming:
        made[value] = graph.placeholder(value.name)
    copier = _Copier(graph, made, recording, constants)
    for node in cut_row.nodes_of(stage):
        copier.copy(node)
    gives: dict[int, tuple[int, ...]] = {}
    if last:
        out = [copier.argument(value) for value in cut_row.row.results]
    else:
        leaving = [flow for flow in cut_row.flows if flow.source == stage]
        unique = list(dict.fromkeys(flow.value for flow in leaving))
        out = [made[value] for value in unique]
        targets = sorted({flow.target for flow in leaving} | {stage + 1})
        gives = {t: tuple(unique.index(flow.value) for flow in leaving if flow.target == t) for t in targets}
    graph.output(tuple(out))
    code = graph.python_code("self")
    source = _with_quick_calls(code.src, copier.modules)
    values = recording.values
    return Code(
        Function(source, dict(code.globals)),
        tuple((flow.value.name, flow.source) for flow in arriving),
        frozenset(i for i, flow in enumerate(arriving) if isinstance(values.get(flow.value), (list, tuple))),
        gives,
        cut_row.skips,
        calling if stage == 0 else None,
        returning if last else None,
        not last and len(out) == 1 and isinstance(values.get(unique[0], torch.empty(0)), Tensor),
        frozenset(copier.modules),
        frozenset(copier.tensors),
    )


def assemble(
    model: nn.Module, index: int, num_stages: int, codes: dict[bool, Code | str], constants: Any
) -> TracedStage:
    """Makes the module of one stage out of the model's own modules and parameters.

    Args:
        model: Whose parts are taken; it stays as it is.
        index: Which stage.
        num_stages: Of how many.
        codes: For training and for evaluation, or why there is none.
        constants: What else the codes use.
    """
    stage = TracedStage(index, num_stages, type(model).__name__)
    vars(stage)["_codes"], vars(stage)["_constants"] = codes, SimpleNamespace(**constants)
    found = [code for code in codes.values() if isinstance(code, Code)]
    whole: set[str] = set()
    for path in sorted({path for code in found for path in code.modules}):  # a module comes before its members
        if not any(path.startswith(f"{other}.") for other in whole):
            put(stage, model, path, model.get_submodule(path))
            whole.add(path)
    for path in sorted({path for code in found for path in code.tensors}):
        if not any(path.startswith(f"{other}.") for other in whole):
            put(stage, model, path, attrgetter(path)(model))
    stage.training = model.training
    return stage


def put(stage: TracedStage, model: nn.Module, path: str, what: nn.Module | Tensor) -> None:
    """Gives a stage a module, parameter or buffer of the model under the name that it has there."""
    parent, _, name = path.rpartition(".")
    part, owner = _part(stage, model, parent), model.get_submodule(parent)
    if isinstance(what, nn.Module):
        part.add_module(name, what)
    elif isinstance(what, nn.Parameter):
        part.register_parameter(name, what)
    else:
        part.register_buffer(name, what, persistent=name not in owner._non_persistent_buffers_set)


def _part(stage: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """The module of a stage that stands for one of the model's of which it has some members."""
    here, whole = stage, model
    for name in path.split(".") if path else ():
        whole = getattr(whole, name)
        if name not in here._modules:
            here.add_module(name, Part(type(whole).__name__))
            here._modules[name].training = whole.training  # type: ignore[union-attr]
        here = getattr(here, name)
    return here


def _with_quick_calls(source: str, modules: Collection[str]) -> str:
    """Looks submodules up in their dictionaries: an attribute of a module is found by Python code, at 1 us a time."""
    for path in sorted(modules, key=len, reverse=True):
        slow, quick = "self", "self"
        for name in path.split("."):
            slow = f"{slow}.{name}" if name.isidentifier() else f'getattr({slow}, "{name}")'  # as torch.fx writes it
            quick = f'{quick}._modules["{name}"]'
        source = source.replace(f" = {slow}(", f" = {quick}(")
    return source


@final
class _Copier:
    """Copies nodes into a stage's graph, with the parameters and contexts that they need."""

    def __init__(
        self, graph: fx.Graph, made: dict[fx.Node, fx.Node], recording: Recording, constants: dict[str, Any]
    ) -> None:
        self._graph, self._made, self._recording, self._constants = graph, made, recording, constants
        self.modules: set[str] = set()
        self.tensors: set[str] = set()

    def copy(self, node: fx.Node) -> None:
        """Adds one node."""
        args = fx.node.map_arg(node.args, self.argument)
        kwargs = fx.node.map_arg(node.kwargs, self.argument)
        ambient = node.meta.get("ambient")
        if node.op == "call_module":
            self.modules.add(str(node.target))
        if ambient is None:
            self._made[node] = self._graph.create_node(node.op, node.target, args, kwargs, node.name)
            return
        callee: Any = node.target
        if node.op == "call_module":
            callee = self._graph.get_attr(str(node.target))
        elif callable(callee):  # a built-in function has no name that could be written as an argument
            callee = self._constant(callee)
        inside, usual = self._constant(ambient), self._constant(self._recording.usual)
        self._made[node] = self._graph.call_function(run_inside, (inside, usual, callee, *args), kwargs)

    def argument(self, node: fx.Node) -> Any:
        """A value as this stage has it."""
        if node not in self._made:
            if node.op == "get_attr":
                name = str(node.target)
                if name in self._recording.constants:
                    self._constants[name.partition(".")[2]] = self._recording.constants[name]
                else:
                    (self.modules if node.meta.get("module") else self.tensors).add(name)
                self._made[node] = self._graph.get_attr(name)
            else:  # a device that an earlier stage has read: here it is another one
                known = [n for n in self._made.values() if n.op == "placeholder"]
                self._made[node] = self._graph.call_function(device_of, tuple(known))
        return self._made[node]

    def _constant(self, value: Any) -> fx.Node:
        names = [name for name, other in self._constants.items() if other is value]
        name = names[0] if names else f"context{len(self._constants)}"
        self._constants[name] = value
        return self._graph.get_attr(f"_constants.{name}")
