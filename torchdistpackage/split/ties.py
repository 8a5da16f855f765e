"""Parameters that live on more than one stage: found by identity, noted in the modules that hold them.

::

    model        embed.weight  =  head.weight          one tensor
                      |                |
    stages       stage 0           stage 3             the gradients of both are summed; the norm counts it once

A splitter calls `record_ties` when it cuts. What it notes is kept twice: with the parameter, as long as that lives, and
in the modules, so that parameters which took its place later (those of a copy, of `to_empty`, of `fully_shard`) are
known as well. Neighbours: `names.py`, by whose whole-model names a tie is called.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import SplitError
from torchdistpackage.split.names import slots_of

__all__ = [
    "TiedParameter",
    "places_of",
    "record_ends",
    "record_ties",
    "shared_parameters",
    "ties_in",
    "ties_of",
    "torn_tie",
]

_TIES = "_torchdistpackage_ties"  # in a module: attribute -> _Tie, for its own parameters


@dataclass(frozen=True)
class TiedParameter:
    """One parameter that lives on more than one stage; its gradients must be summed over those stages.

    Attributes:
        name: Whole-model name by which it is called, the first of `names`.
        names: All of its whole-model names.
        stages: The stages that hold it, ascending.
        parameter: The parameter itself; not part of equality.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> tie, = shared_parameters([embed, nn.ReLU(), head], (0, 2, 3))
        >>> tie.names, tie.stages, tie.parameter is embed.weight
        (('0.weight', '2.weight'), (0, 1), True)
    """

    name: str
    names: tuple[str, ...]
    stages: tuple[int, ...]
    parameter: nn.Parameter = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Tie:
    """A TiedParameter without the parameter: a weak table whose values held their keys would never be freed."""

    names: tuple[str, ...]
    stages: tuple[int, ...]


_ties_of_tensors: MutableMapping[torch.Tensor, _Tie] = WeakTensorKeyDictionary()


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
        for slot in slots_of(layer):
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
        for slot in slots_of(layer):
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
    for slot in slots_of(stage):
        tie = vars(slot.module).get(_TIES, {}).get(slot.attribute)
        if tie is not None and isinstance(slot.tensor, nn.Parameter):
            result[slot.local_name] = TiedParameter(tie.names[0], tie.names, tie.stages, slot.tensor)
    return result


def places_of(parameter: nn.Parameter, layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Where a parameter sits: the module, and its attribute.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> list(places_of(layer.bias, [nn.Sequential(layer)]))
        [(Linear(in_features=2, out_features=2, bias=True), 'bias')]
    """
    for layer in layers:
        for slot in slots_of(layer):
            if slot.tensor is parameter:
                yield slot.module, slot.attribute


def torn_tie(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """The names of a parameter that was one tensor in these modules when the model was cut, and is several now.

    Returns:
        Its whole-model names; none if every one is still whole.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> record_ties([embed, head], (0, 1, 2))
        >>> torn_tie([embed, head])
        ()
        >>> head.weight = nn.Parameter(head.weight.detach().clone())
        >>> torn_tie([embed, head])
        ('0.weight', '1.weight')
    """
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        noted: dict[str, _Tie] = vars(module).get(_TIES, {})
        for attribute, tie in noted.items():
            parameter = module._parameters.get(attribute)
            if parameter is not None and found.setdefault(id(tie), parameter) is not parameter:
                return tie.names
    return ()
