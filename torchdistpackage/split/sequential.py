"""A model as a row of layers, and one stage's slice of it.

The user lists the layers in the order in which they run; `flatten_model` looks them up, checks that the list covers the
model, and notes where each comes from (`names.py`). A partition cuts the row at the points that `boundaries.py` finds
and returns the layers of one stage::

    layer_list   'conv1'  'layer1'          lambda       'fc'
    row           conv1 | layer1.0 layer1.1 | lambda       fc        flatten_model
    stages       [  0  ] [        1        ] [      2       ]        uniform_partition(row, 3, stage)

Nothing here knows ranks: `parallel/pipeline_helper.py` has the same functions for "the stage of this rank".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.boundaries import balanced_boundaries, uniform_boundaries
from torchdistpackage.split.cost import CostName, layer_costs
from torchdistpackage.split.names import record_names
from torchdistpackage.split.signature import Example
from torchdistpackage.split.ties import record_ties
from torchdistpackage.split.untraceable import refusals

__all__ = [
    "CallableModule",
    "LayerEntry",
    "balanced_partition",
    "flatten_model",
    "flatten_sequence",
    "uniform_partition",
]

LayerEntry: TypeAlias = str | nn.Module | Callable[..., Any] | Sequence["LayerEntry"]
"""A layer by attribute or dotted name, a module, a callable, or a nested list of these."""


class CallableModule(nn.Module):
    """A function as a layer without parameters, so that it fits into `nn.Sequential`.

    Parameters that the function uses are not its own: neither `parameters()` nor `.to()` finds them. A layer that needs
    parameters is a small `nn.Module` that holds them.

    Args:
        fn: What `forward` calls.

    Raises:
        SplitError: `fn` cannot be called.

    Example:
        >>> import torch
        >>> nn.Sequential(CallableModule(lambda x: x.flatten(1)), nn.Linear(12, 5))(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 5])
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(fn):
            raise SplitError(f"CallableModule wraps a function, got {fn!r} ({type(fn).__name__})")
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.fn(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.fn, "__qualname__", repr(self.fn))


@overload
def flatten_model(
    model: nn.Module,
    layer_list: Sequence[LayerEntry] | None = None,
    return_list: Literal[False] = False,
    *,
    levels: int | None = 1,
    allow_missing: bool = False,
    example_inputs: Any = None,
) -> nn.Sequential: ...


@overload
def flatten_model(
    model: nn.Module,
    layer_list: Sequence[LayerEntry] | None = None,
    *,
    return_list: Literal[True],
    levels: int | None = 1,
    allow_missing: bool = False,
    example_inputs: Any = None,
) -> list[nn.Module]: ...


@overload
def flatten_model(
    model: nn.Module,
    layer_list: Sequence[LayerEntry] | None,
    return_list: Literal[True],
    *,
    levels: int | None = 1,
    allow_missing: bool = False,
    example_inputs: Any = None,
) -> list[nn.Module]: ...


def flatten_model(
    model: nn.Module,
    layer_list: Sequence[LayerEntry] | None = None,
    return_list: bool = False,
    *,
    levels: int | None = 1,
    allow_missing: bool = False,
    example_inputs: Any = None,
) -> nn.Sequential | list[nn.Module]:
    """Turn a model into a row of layers that run one after the other.

    Entries of the list may be

    - an attribute name or a dotted name ("layer1", "layer1.0", also of a method);
    - a module, part of the model or not; the same one twice shares its weights;
    - a callable, which becomes a `CallableModule`;
    - a list or tuple of such entries.

    An entry that is an `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` is replaced by its members, unless its class
    has a `forward` of its own. Hooks on a container that is replaced do not run.

    Without a list the order of execution is found by tracing: containers that a forward only runs through are opened,
    functions in between become layers, and where several values are under way at once (a skip connection), everything
    up to where there is one again is one layer.

    Args:
        model: The whole model. Its modules are used, not copied.
        layer_list: The layers in the order of execution; None to have them found.
        return_list: Return a list instead of an `nn.Sequential`.
        levels: How deep containers within containers are replaced; 0 for not at all, None for as deep as they go.
        allow_missing: Accept a list that leaves out parameters or buffers of the model.
        example_inputs: What the model is called with, for tracing; only needed where its Python looks at sizes.

    Raises:
        SplitError: An entry is no layer, a name does not exist, parameters or buffers are left out, or there is no list
            and the model cannot be traced.

    Example:
        >>> from torchvision.models import resnet18
        >>> layer_list = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool",
        ...               lambda x: x.flatten(1), "fc"]
        >>> len(flatten_model(resnet18(), layer_list)), len(flatten_model(resnet18()))
        (15, 15)
    """
    if layer_list is None:
        return _found_layers(model, return_list, example_inputs)
    layers = list(_resolve(model, layer_list, "layer_list", levels))
    if not allow_missing:
        held = {id(tensor) for layer in layers for tensor in _tensors(layer)}
        if left_out := list(_left_out(model, "", held)):
            raise SplitError(
                f"layer_list leaves out {', '.join(left_out[:8])}{' and more' if len(left_out) > 8 else ''} of "
                f"{type(model).__name__}; add the layers that hold them (for parameters that a function uses, a small "
                "nn.Module that holds them and runs it), or pass allow_missing=True if they are not meant to be trained"
            )
    record_names(model, layers)
    return layers if return_list else nn.Sequential(*layers)


def _found_layers(model: nn.Module, return_list: bool, example_inputs: Any) -> nn.Sequential | list[nn.Module]:
    from torchdistpackage.split.execution_order import traced_layers  # here: most models come with a list

    example = None if example_inputs is None else Example.of(example_inputs)
    with refusals(model):
        layers = traced_layers(model, example)
    record_names(model, layers)
    return layers if return_list else nn.Sequential(*layers)


def flatten_sequence(sequence: Iterable[nn.Module | Callable[..., Any]], level: int = 1) -> list[nn.Module]:
    """The members of a sequence, with containers among them replaced by their members, `level` deep.

    Args:
        sequence: `nn.Sequential`, `nn.ModuleList`, or a list of modules and callables.
        level: 0 for the members as they are, 1 to open containers among them, 2 to open those inside, and so on.

    Raises:
        SplitError: An entry is no layer.

    Example:
        >>> blocks = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
        >>> len(flatten_sequence(blocks, 0)), len(flatten_sequence(blocks))
        (2, 3)
    """
    if isinstance(sequence, nn.Module):
        layers = list(_members(sequence, "sequence", level + 1))
        record_names(sequence, layers, keep=True)  # a row that flatten_model made has better names already
        return layers
    if not isinstance(sequence, Iterable):
        raise SplitError(f"sequence is {sequence!r} ({type(sequence).__name__}), not a sequence of layers")
    for number, entry in enumerate(entries := list(sequence)):
        if isinstance(entry, str):
            raise SplitError(f"sequence[{number}] is the name {entry!r}; only flatten_model(model, ...) can look it up")
    return list(_resolve(nn.Module(), entries, "sequence", level))


def uniform_partition(
    layers: Iterable[nn.Module | Callable[..., Any]], num_stages: int, stage: int, extra_len: int = 0
) -> list[nn.Module]:
    """One stage's layers when every stage gets as many as the others, give or take one.

    Args:
        layers: The whole row, a list or an `nn.Sequential`.
        num_stages: Stages that the row is cut into.
        stage: The stage to return, from 0.
        extra_len: Work of the last stage that is not in the row (the loss, a head that is kept apart), counted in
            layers: as many layers less on the last stage, but at least one. See `boundaries.uniform_sizes`.

    Raises:
        SplitError: There are fewer layers than stages, or there is no such stage.

    Example:
        >>> layers = [nn.ReLU() for _ in range(7)]
        >>> [len(uniform_partition(layers, 4, stage)) for stage in range(4)]
        [2, 2, 2, 1]
    """
    row = _as_row(layers)
    return _cut(row, uniform_boundaries(len(row), num_stages, extra_len=extra_len), stage)


def balanced_partition(
    layers: Iterable[nn.Module | Callable[..., Any]],
    num_stages: int,
    stage: int,
    *,
    costs: CostName | Sequence[float] | None = None,
    example_input: Any = None,
) -> list[nn.Module]:
    """One stage's layers when the most expensive stage is as cheap as it can be.

    Args:
        layers: The whole row, a list or an `nn.Sequential`.
        num_stages: Stages that the row is cut into.
        stage: The stage to return, from 0.
        costs: One number a layer, or what to count: "parameters" (the default), "flops" or "time". Measured times
            differ from process to process: processes that cut by time must agree on one's numbers.
        example_input: Input of the first layer, for "flops" and "time".

    Raises:
        SplitError: There are fewer layers than stages, no such stage, or costs do not fit the layers.

    Example:
        >>> layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 80)]
        >>> [len(balanced_partition(layers, 2, stage)) for stage in range(2)]
        [2, 1]
    """
    row = _as_row(layers)
    numbers = layer_costs(row, "parameters" if costs is None else costs, example_input)
    return _cut(row, balanced_boundaries(numbers, num_stages), stage)


def _cut(row: list[nn.Module], boundaries: tuple[int, ...], stage: int) -> list[nn.Module]:
    num_stages = len(boundaries) - 1
    if not 0 <= stage < num_stages:
        raise SplitError(f"there is no stage {stage}: {num_stages} stages are numbered from 0 to {num_stages - 1}")
    record_ties(row, boundaries)
    return row[boundaries[stage] : boundaries[stage + 1]]


def _as_row(layers: Iterable[nn.Module | Callable[..., Any]]) -> list[nn.Module]:
    return flatten_sequence(layers, 0)


def _resolve(model: nn.Module, entry: LayerEntry, where: str, levels: int | None) -> Iterator[nn.Module]:
    """The layers that one entry stands for."""
    if isinstance(entry, str):
        found = _lookup(model, entry, where)
        if isinstance(found, str) or not (isinstance(found, nn.Module) or callable(found)):
            raise SplitError(f"{where}: {entry!r} is a {type(found).__name__} of the model, not a layer")
        yield from _resolve(model, found, where, levels)
    elif isinstance(entry, nn.Module):
        yield from _opened(entry, where, levels)
    elif isinstance(entry, (list, tuple)):
        for number, member in enumerate(entry):
            yield from _resolve(model, member, f"{where}[{number}]", levels)
    elif isinstance(entry, type) and issubclass(entry, nn.Module):
        raise SplitError(f"{where} is the class {entry.__name__}; a layer is an object: {entry.__name__}(...)")
    elif callable(entry):
        yield CallableModule(entry)
    else:
        raise SplitError(
            f"{where} is {entry!r} ({type(entry).__name__}); an entry is a name, a module, a callable, "
            "or a list of these"
        )


def _opened(module: nn.Module, where: str, levels: int | None) -> Iterator[nn.Module]:
    """The module itself, or its members when it is a container to be replaced."""
    can_run = type(module).forward is not nn.Module.forward or "forward" in vars(module)
    if _is_container(module) and levels != 0:
        yield from _members(module, where, levels)
    elif can_run:
        yield module
    else:
        raise SplitError(
            f"{where} is a {type(module).__name__}, which cannot be called; list its members or raise levels"
        )


def _members(module: nn.Module, where: str, levels: int | None) -> Iterator[nn.Module]:
    if not _is_container(module):
        raise SplitError(f"{where} is a {type(module).__name__}, not a sequence of layers; use flatten_model for it")
    for name, member in module._modules.items():  # named_children() would leave out a member that comes twice
        if member is not None:
            yield from _opened(member, f"{where}.{name}", None if levels is None else levels - 1)


def _is_container(module: nn.Module) -> bool:
    """Whether running the members in turn is all that the module does."""
    bases: Mapping[type[nn.Module], Any] = {
        nn.Sequential: nn.Sequential.forward,
        nn.ModuleList: nn.Module.forward,
        nn.ModuleDict: nn.Module.forward,
    }
    own = "forward" in vars(module)  # patched on the object
    return not own and any(isinstance(module, base) and type(module).forward is run for base, run in bases.items())


def _lookup(model: nn.Module, name: str, where: str) -> Any:
    """The attribute with a dotted name."""
    found: Any = model
    done: list[str] = []
    for part in name.split("."):
        if not hasattr(found, part):
            children = [child for child, _ in found.named_children()] if isinstance(found, nn.Module) else []
            close = difflib.get_close_matches(part, children, n=1, cutoff=0.5)
            guess = f"; did you mean {'.'.join([*done, close[0]])!r}?" if close else "."
            place = f"{'.'.join(done)} ({type(found).__name__})" if done else type(found).__name__
            raise SplitError(
                f"{where}: there is no {name!r}{guess} {place} has {', '.join(children) if children else 'no layers'}"
            )
        found = getattr(found, part)
        done.append(part)
    return found


def _tensors(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()


def _left_out(module: nn.Module, name: str, held: set[int]) -> Iterator[str]:
    """Names of what is not held; a module of which nothing is held is named once, with its number of tensors."""
    everything = {id(tensor) for tensor in _tensors(module)}
    if name and everything and not everything & held:
        yield f"{name} ({len(everything)} tensors)"
        return
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    yield from (f"{name}.{attribute}".lstrip(".") for attribute, tensor in own if id(tensor) not in held)
    for attribute, child in module.named_children():
        yield from _left_out(child, f"{name}.{attribute}".lstrip("."), held)
