"""The modules of one stage, as an object of the user's own class.

A part is a shallow copy of the containers (`LlamaForCausalLM`, `LlamaModel`) around the model's own layers: it costs no
memory, its `state_dict` has the names of the whole model, and training it trains the model. What it does not hold is
None, as in every other module that was built without a piece; `part.model.layers` is a `ModuleDict` with the original
indices as keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from torchdistpackage.split.decoder.layout import DecoderLayout
from torchdistpackage.split.decoder.stage_forward import STAGE, Stage, stage_forward

__all__ = ["HELD", "filled_in", "make_part", "shallow_copy", "unwrapped"]

HELD = "_torchdistpackage_held_stage"
"""Where a module that stands for a stage, and shares its modules, keeps it."""


def make_part(
    model: nn.Module, layout: DecoderLayout, twin: nn.Module, start: int, stop: int, *, first: bool, last: bool
) -> nn.Module:
    """The part of a model that holds row[start:stop].

    Args:
        model: The whole model; it stays as it is and shares its layers with the part.
        layout: Its layout.
        twin: Its twin.
        start: First place.
        stop: After the last place.
        first: Whether it holds the prologue.
        last: Whether it gives the logits.
    """
    stage = Stage(layout, twin, start, stop, first=first, last=last)
    held = {*layout.row[start:stop], *(layout.prologue if first else ()), *(layout.idle if last else ())}
    part = _pruned(model, layout, held)
    part.__class__ = _part_class(type(model))
    vars(part)[STAGE] = stage
    return part


def _pruned(model: nn.Module, layout: DecoderLayout, held: set[str]) -> nn.Module:
    skeleton = layout.skeleton
    elsewhere = {*layout.row, *layout.prologue, *layout.idle} - held
    root = shallow_copy(model)
    for container in skeleton.containers[1:]:
        parent, _, name = container.rpartition(".")
        owner = root.get_submodule(parent)
        owner._modules[name] = shallow_copy(model.get_submodule(container))
    for container in skeleton.containers:
        owner = root.get_submodule(container)
        for name, child in list(owner._modules.items()):
            full = f"{container}.{name}".lstrip(".")
            if full in skeleton.containers:
                continue
            if child is not None and (full == skeleton.layers or (isinstance(child, nn.ModuleList) and len(child))):
                kept = {
                    n: each for n, each in child._modules.items() if each is not None and f"{full}.{n}" not in elsewhere
                }
                owner._modules[name] = nn.ModuleDict(kept)
            elif full in elsewhere:
                owner._modules[name] = None
    return root


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class with the same children, tensors and hooks, in dictionaries of its own."""
    made: nn.Module = object.__new__(type(module))  # fully_shard gives a class a __new__ that builds another object
    vars(made).update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in vars(module).items()})
    return made


@contextmanager
def filled_in(part: nn.Module, module: nn.Module) -> Iterator[None]:
    """Shows a container its layers in a list, and what it lacks without weights, to code that makes first values.

    Args:
        part: A stage.
        module: A module in it; what is no container stays as it is.
    """
    stage: Stage = vars(part)[STAGE]
    names = [name for name in stage.layout.skeleton.containers if part.get_submodule(name) is module]
    found: dict[str, Any] = {}
    for name, child in module._modules.items() if names else ():
        full = f"{names[0]}.{name}".lstrip(".")
        if full == stage.layout.skeleton.layers and isinstance(stage.twin.get_submodule(full), nn.ModuleDict):
            continue
        if isinstance(child, nn.ModuleDict) and all(key.isdigit() for key in child):
            found[name] = list(child.values())
        elif child is None:
            found[name] = stage.twin.get_submodule(full)
    vars(module).update(found)
    try:
        yield
    finally:
        for name in found:
            del vars(module)[name]


def unwrapped(part: nn.Module) -> nn.Module:
    """The part inside of DistributedDataParallel, torch.compile, or a Bottom, Trunk or Top; anything else as it is."""
    while STAGE not in vars(part):
        inner = vars(part).get(HELD) or getattr(part, "module", None) or getattr(part, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return part
        part = inner
    return part


_classes: WeakValueDictionary[type[nn.Module], type[nn.Module]] = WeakValueDictionary()


def _part_class(of: type[nn.Module]) -> type[nn.Module]:
    """The user's class with another forward, under the user's name: tools that look at names see what they know."""
    known = _classes.get(of)
    if known is not None:
        return known
    space = {
        "forward": stage_forward,
        "is_first_stage": property(lambda part: vars(part)[STAGE].first),
        "is_last_stage": property(lambda part: vars(part)[STAGE].last),
        "__module__": of.__module__,
        "__qualname__": of.__qualname__,
        "__doc__": of.__doc__,
    }
    made = type(of.__name__, (of,), space)
    made._whole_forward = of.forward  # type: ignore[attr-defined]
    _classes[of] = made
    return made
