"""A stage remembers where its layers come from: the names that they have in the whole model.

In a stage the first layer is called "0", whatever it was called in the model. A checkpoint must not depend on where the
model was cut, so `sequential.flatten_model` leaves in every module the dotted name that it had, and here is the way
back::

    model        layer3.0.conv1.weight      layer3.1.conv1.weight
                         |                          |             flatten_model, uniform_partition
    stage 1      0.conv1.weight             1.conv1.weight
                         |                          |             whole_model_names
                 layer3.0.conv1.weight      layer3.1.conv1.weight

The name is one private attribute of the module object, outside its state dict and its repr. Unlike a table of weak
references it survives `copy.deepcopy` and pickling, so an averaged copy of a stage has names as well. A wrapper
(DistributedDataParallel, torch.compile) is seen through because names belong to modules, not to paths; modules that
were put into a named one later (adapters) are named after it. The name is lost where the module object is: a copy by
its own `__deepcopy__`, `torch.jit.script`, or a wrapper that fuses parameters (FullyShardedDataParallel version 1).

Neighbours: `ties.py` knows what several stages share, `whole_state.py` makes state dicts under these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchdistpackage.errors import SplitError

__all__ = ["Slot", "named_slots", "record_names", "slots_of", "tensors_of", "whole_model_names"]

_ORIGIN = "_torchdistpackage_origin"  # in a module: its _Origin


@dataclass(frozen=True)
class _Origin:
    """Where a module comes from: its dotted names in the model, and the names of tensors that it borrows from there."""

    names: tuple[str, ...]
    borrowed: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Slot:
    """One place where a module holds a tensor; a shared tensor has several."""

    module: nn.Module
    attribute: str
    local_name: str
    names: tuple[str, ...]  # empty when nothing was recorded
    tensor: torch.Tensor
    persistent: bool


def record_names(model: nn.Module, layers: Sequence[nn.Module], *, keep: bool = False) -> None:
    """Leave in every module of the layers the name that it has in the model.

    A layer that is not part of the model is called `added_layers.<its number in the list>`; tensors of the model that
    it holds keep their names in the model.

    Args:
        model: The whole model.
        layers: Its layers in the order of execution.
        keep: Leave modules alone that have a name already.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> record_names(model, list(model))
        >>> whole_model_names(nn.Sequential(model[2]))
        {'0.weight': '2.weight', '0.bias': '2.bias'}
    """
    modules: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = (*modules.get(id(module), ()), name)
    tensors: dict[int, tuple[str, ...]] = {}
    for name, tensor in tensors_of(model):
        tensors[id(tensor)] = (*tensors.get(id(tensor), ()), name)
    done: set[int] = set()
    for number, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if id(module) in done or (keep and _ORIGIN in vars(module)):
                continue
            done.add(id(module))
            borrowed: dict[str, tuple[str, ...]] = {}
            if id(module) not in modules:
                own = tensors_of(module, recurse=False)
                borrowed = {attribute: tensors[id(tensor)] for attribute, tensor in own if id(tensor) in tensors}
            names = modules.get(id(module), (_join(f"added_layers.{number}", path),))
            vars(module)[_ORIGIN] = _Origin(names, borrowed)  # not setattr: a module's own __setattr__ may object


def whole_model_names(stage: nn.Module) -> dict[str, str]:
    """The whole-model name of every parameter and buffer of a stage.

    Args:
        stage: Layers of one stage in any container, also wrapped in DistributedDataParallel or torch.compile.

    Returns:
        Name in the stage, as `stage.named_parameters()` and `stage.named_buffers()` say it -> name in the model. A
        tensor with several names in the stage has several entries.

    Raises:
        SplitError: A layer that holds tensors was not made by `flatten_model` or `flatten_sequence`.

    Example:
        >>> from torchdistpackage.split import flatten_model, uniform_partition
        >>> model = nn.Sequential()
        >>> model.body, model.norm = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.LayerNorm(2)
        >>> stage = nn.Sequential(*uniform_partition(flatten_model(model, ["body", "norm"]), 3, 2))
        >>> whole_model_names(stage)
        {'0.weight': 'norm.weight', '0.bias': 'norm.bias'}
    """
    return {slot.local_name: slot.names[0] for slot in named_slots(stage)}


def tensors_of(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, under all their names.

    Args:
        module: Any.
        recurse: Also those of the modules inside it.
    """
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def slots_of(root: nn.Module) -> Iterator[Slot]:
    """Every place where a tensor sits, with its names in the model.

    A module without a name of its own is named after the one around it, if that has one. In a wrapper nothing sits, so
    what a wrapper would be called does not matter: the module inside brings its own name.
    """
    names_at: dict[str, tuple[str, ...]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        origin: _Origin | None = vars(module).get(_ORIGIN)
        parent, _, attribute = path.rpartition(".")
        around = names_at[parent] if path else ()
        names = names_at[path] = origin.names if origin else tuple(_join(name, attribute) for name in around)
        borrowed = origin.borrowed if origin else {}
        for attribute, tensor in tensors_of(module, recurse=False):
            whole = borrowed.get(attribute, tuple(_join(name, attribute) for name in names))
            persistent = attribute not in module._non_persistent_buffers_set
            yield Slot(module, attribute, _join(path, attribute), whole, tensor, persistent)


def named_slots(stage: nn.Module) -> Iterator[Slot]:
    """The same, where each must have a name, and each name one tensor.

    Raises:
        SplitError: A layer that holds tensors was not made by `flatten_model` or `flatten_sequence`, or two tensors are
            called alike.
    """
    owners: dict[str, Slot] = {}
    for slot in slots_of(stage):
        if not slot.names:
            raise SplitError(
                f"{slot.local_name} ({type(slot.module).__name__}) has no whole-model name; make the layers of the "
                "stage with flatten_model(model, layer_list) or flatten_sequence(sequential)"
            )
        for name in slot.names:
            if (other := owners.setdefault(name, slot)).tensor is not slot.tensor:
                raise SplitError(
                    f"{other.local_name} and {slot.local_name} are both {name} of the model; a copy of a layer that "
                    "flatten_model made is still called after it: pass the new model through flatten_model"
                )
        yield slot


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
