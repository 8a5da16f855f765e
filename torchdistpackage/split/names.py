"""A stage remembers where its layers come from: whole-model names, and the parameters it shares with other stages.

In a stage the first layer is called "0", whatever it was called in the model. A checkpoint must not depend on where the
model was cut, so `sequential.flatten_model` leaves in every module the dotted name that it had, and `checkpoint/` and
`parallel/` ask here for the way back::

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
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import CheckpointError, SplitError

__all__ = [
    "TiedParameter",
    "load_whole_model_state_dict",
    "record_ends",
    "record_names",
    "record_ties",
    "shared_parameters",
    "ties_in",
    "ties_of",
    "whole_model_names",
    "whole_model_state_dict",
]

_ORIGIN = "_torchdistpackage_origin"  # in a module: its _Origin
_TIES = "_torchdistpackage_ties"  # in a module: attribute -> _Tie, for its own parameters


@dataclass(frozen=True)
class TiedParameter:
    """One parameter that lives on more than one stage; its gradients must be summed over those stages.

    Attributes:
        name: Whole-model name by which it is called, the first of `names`.
        names: All of its whole-model names.
        stages: The stages that hold it, ascending.
        parameter: The parameter itself; not part of equality.
    """

    name: str
    names: tuple[str, ...]
    stages: tuple[int, ...]
    parameter: nn.Parameter = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Origin:
    """Where a module comes from: its dotted names in the model, and the names of tensors that it borrows from there."""

    names: tuple[str, ...]
    borrowed: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Tie:
    """A TiedParameter without the parameter: a weak table whose values held their keys would never be freed."""

    names: tuple[str, ...]
    stages: tuple[int, ...]


@dataclass(frozen=True)
class _Slot:
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
    for name, tensor in _named_tensors(model, recurse=True):
        tensors[id(tensor)] = (*tensors.get(id(tensor), ()), name)
    done: set[int] = set()
    for number, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if id(module) in done or (keep and _ORIGIN in vars(module)):
                continue
            done.add(id(module))
            borrowed: dict[str, tuple[str, ...]] = {}
            if id(module) not in modules:
                own = _named_tensors(module, recurse=False)
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
    return {slot.local_name: slot.names[0] for slot in _named_slots(stage)}


def whole_model_state_dict(stage: nn.Module, *, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a stage under whole-model names; the union over all stages is that of the model.

    Tensors are the stage's own, detached, not copies; buffers that are not persistent are left out; a layer with
    several names in the model appears under each. State dict hooks and extra state of modules are not part of it.

    Args:
        stage: Layers of one stage, as for `whole_model_names`.
        keep_vars: As for `state_dict` of torch: the parameters themselves, which are not detached.

    Raises:
        SplitError: A layer that holds tensors was not made by `flatten_model` or `flatten_sequence`.

    Example:
        >>> from torchdistpackage.split import flatten_sequence, uniform_partition
        >>> layers = flatten_sequence(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        >>> list(whole_model_state_dict(nn.Sequential(*uniform_partition(layers, 2, 1))))
        ['1.weight', '1.bias']
    """
    slots = [slot for slot in _named_slots(stage) if slot.persistent]
    return {name: slot.tensor if keep_vars else slot.tensor.detach() for slot in slots for name in slot.names}


def load_whole_model_state_dict(stage: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a stage's part of a whole-model state dict into it.

    A checkpoint that was written by another number of stages, or by the plain model, will do. Keys of other stages are
    passed over. A parameter with several names, within the stage or by a tie to another one, may have any of them.
    Nothing is copied when anything is wrong.

    Args:
        stage: Layers of one stage, as for `whole_model_names`.
        state: Whole-model name -> tensor, on any device.

    Raises:
        CheckpointError: Names are missing, shapes differ, or the stage is still on the meta device.
        SplitError: A layer that holds tensors was not made by `flatten_model` or `flatten_sequence`.

    Example:
        >>> from torchdistpackage.split import flatten_sequence, uniform_partition
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> stage = nn.Sequential(*uniform_partition(flatten_sequence(model), 2, 1))
        >>> load_whole_model_state_dict(stage, {"1.weight": torch.eye(2), "1.bias": torch.ones(2)})
        >>> model[1].bias.tolist()
        [1.0, 1.0]
    """
    slots = [slot for slot in _named_slots(stage) if slot.persistent]
    ties = ties_in(stage)
    known: dict[int, tuple[str, ...]] = {}
    for slot in slots:
        tie = ties.get(slot.local_name)
        known[id(slot.tensor)] = (*known.get(id(slot.tensor), ()), *slot.names, *(tie.names if tie else ()))
    found: dict[int, str | None] = {
        index: next((name for name in (*slot.names, *known[id(slot.tensor)]) if name in state), None)
        for index, slot in enumerate(slots)
    }
    missing = [slots[index].names[0] for index, name in found.items() if name is None]
    if missing:
        raise CheckpointError(
            f"the state has {len(state)} keys, but not {_listed(missing)}; merge the parts of all stages into one "
            "dict before loading, and check that the checkpoint is of this model"
        )
    pairs = [(slots[index].tensor, name, state[name]) for index, name in found.items() if name is not None]
    for tensor, name, value in pairs:
        if tensor.shape != value.shape:
            raise CheckpointError(f"{name} is {tuple(value.shape)} in the state and {tuple(tensor.shape)} in the stage")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device; call stage.to_empty(device=...) before loading")
    with torch.no_grad():
        for tensor, _, value in pairs:
            tensor.copy_(value)


def shared_parameters(layers: Sequence[nn.Module], boundaries: Sequence[int]) -> tuple[TiedParameter, ...]:
    """The parameters, by identity, that more than one stage holds.

    Args:
        layers: All layers of the model in order.
        boundaries: Cut points from 0 to the number of layers, as `balanced_boundaries` gives them.

    Returns:
        In the order of the layers; a layer without a whole-model name is called by its number in the list.

    Raises:
        SplitError: The boundaries do not belong to that many layers.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> shared_parameters([embed, nn.ReLU(), head], (0, 2, 3))
        (TiedParameter(name='0.weight', names=('0.weight', '2.weight'), stages=(0, 1)),)
    """
    if boundaries[0] != 0 or boundaries[-1] != len(layers):
        raise SplitError(f"boundaries {tuple(boundaries)} do not run from 0 to the number of layers, {len(layers)}")
    found: dict[int, TiedParameter] = {}
    for number, layer in enumerate(layers):
        stage = bisect_right(boundaries, number) - 1
        for slot in _slots(layer):
            if isinstance(slot.tensor, nn.Parameter):
                before = found.get(id(slot.tensor))
                names = (before.names if before else ()) + (slot.names or (f"{number}.{slot.local_name}",))
                stages = (before.stages if before else ()) + (stage,)
                unique = tuple(dict.fromkeys(names))
                found[id(slot.tensor)] = TiedParameter(unique[0], unique, tuple(sorted({*stages})), slot.tensor)
    return tuple(tied for tied in found.values() if len(tied.stages) > 1)


def record_ties(layers: Sequence[nn.Module], boundaries: Sequence[int]) -> None:
    """Note which parameters are on which stages, for `ties_of` and `ties_in`; what an earlier cut noted is forgotten.

    Every partition function calls it.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> record_ties([embed, nn.ReLU(), head], (0, 2, 3))
        >>> ties_of(head.weight).stages
        (0, 1)
    """
    ties = {id(tied.parameter): _Tie(tied.names, tied.stages) for tied in shared_parameters(layers, boundaries)}
    for layer in layers:
        for module in layer.modules():
            vars(module).pop(_TIES, None)
        for slot in _slots(layer):
            tie = ties.get(id(slot.tensor))
            if tie is None:
                _ties_of_tensors.pop(slot.tensor, None)
            else:
                _ties_of_tensors[slot.tensor] = tie
                vars(slot.module).setdefault(_TIES, {})[slot.attribute] = tie


def record_ends(stage: nn.Module) -> None:
    """Note that what a stage shares is on the first and on the last stage, however many there are going to be.

    For a stage that was cut without knowing the others.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> record_ties([embed, nn.ReLU(), head], (0, 2, 3))
        >>> record_ends(head)
        >>> ties_in(head)["weight"].stages
        (0, -1)
    """
    for module in stage.modules():
        noted: dict[str, _Tie] = vars(module).get(_TIES, {})
        noted.update({attribute: _Tie(tie.names, (0, -1)) for attribute, tie in noted.items()})


def ties_of(parameter: nn.Parameter) -> TiedParameter | None:
    """What the last partition noted about a parameter; None when it lives on one stage only.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> record_ties([embed, head], (0, 1, 2))
        >>> ties_of(embed.weight)
        TiedParameter(name='0.weight', names=('0.weight', '1.weight'), stages=(0, 1))
    """
    tie = _ties_of_tensors.get(parameter)
    return TiedParameter(tie.names[0], tie.names, tie.stages, parameter) if tie else None


def ties_in(stage: nn.Module) -> dict[str, TiedParameter]:
    """The parameters of a stage that also live on other stages.

    Unlike `ties_of` it also knows parameters that took the place of the ones that were cut: those of a deep copy, of
    `stage.to_empty(device=...)` after building on the meta device, or of `fully_shard`.

    Returns:
        Name in the stage -> the tie; a parameter with several names in the stage has several entries.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> record_ties([layer, nn.ReLU(), layer], (0, 1, 3))
        >>> ties_in(nn.Sequential(nn.ReLU(), layer))
        {'1.weight': TiedParameter(name='0.weight', names=('0.weight', '2.weight'), stages=(0, 1))}
    """
    result: dict[str, TiedParameter] = {}
    for slot in _slots(stage):
        tie = vars(slot.module).get(_TIES, {}).get(slot.attribute)
        if tie is not None and isinstance(slot.tensor, nn.Parameter):
            result[slot.local_name] = TiedParameter(tie.names[0], tie.names, tie.stages, slot.tensor)
    return result


_ties_of_tensors: MutableMapping[torch.Tensor, _Tie] = WeakTensorKeyDictionary()


def _slots(root: nn.Module) -> Iterator[_Slot]:
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
        for attribute, tensor in _named_tensors(module, recurse=False):
            whole = borrowed.get(attribute, tuple(_join(name, attribute) for name in names))
            persistent = attribute not in module._non_persistent_buffers_set
            yield _Slot(module, attribute, _join(path, attribute), whole, tensor, persistent)


def _named_slots(stage: nn.Module) -> Iterator[_Slot]:
    owners: dict[str, _Slot] = {}
    for slot in _slots(stage):
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


def _named_tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
