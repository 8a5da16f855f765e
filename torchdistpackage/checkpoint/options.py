"""The options of an optimizer's parameter groups (lr, betas, weight decay, ...), by the names of their parameters.

Groups are cut with the model: a group of a run on four stages may be a part of a group of a run on one. So options are
saved with the names that they hold for, those of all ranks together, and a present group takes the options of its own
names. What only says how a step is computed (`foreach`, `fused`, `capturable`) stays as the present optimizer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdistpackage.checkpoint.named_model import Named
from torchdistpackage.checkpoint.optimizer_parts import parameters_of
from torchdistpackage.errors import CheckpointError

__all__ = ["apply_options", "equal_options", "group_names", "merged_options", "options_of"]

_HOW = ("foreach", "fused", "capturable")
_WHICH = ("params", "param_names")


def options_of(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    """The options of all groups of this rank's optimizers, with the optimizer's class.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> options_of([torch.optim.SGD(layer.parameters(), lr=0.5)])[0]["lr"]
        0.5
    """
    found = []
    for optimizer in optimizers:
        kind = _class_of(optimizer)
        for group in optimizer.param_groups:
            kept = {key: _copied(value) for key, value in group.items() if key not in _WHICH}
            found.append({"optimizer": kind, **kept})
    return found


def group_names(optimizers: Sequence[Any], model: Sequence[Named]) -> list[list[str]]:
    """The names of the parameters of the same groups."""
    names = {id(one.tensor): one.name for one in model}
    return [[names[id(one)] for one in group] for optimizer in optimizers for group in parameters_of(optimizer)]


def merged_options(options: Sequence[Sequence[Any]], names: Sequence[Sequence[Sequence[str]]]) -> list[dict[str, Any]]:
    """The groups of all ranks; those with equal options are one.

    Args:
        options: Of every rank, as of `options_of`.
        names: Of every rank, as of `group_names`.
    """
    merged: list[dict[str, Any]] = []
    for mine, groups in zip(options, names, strict=True):
        for one, members in zip(mine, groups, strict=True):
            same = next((entry for entry in merged if equal_options(entry["options"], one)), None)
            if same is None:
                same = {"options": one, "names": {}}
                merged.append(same)
            same["names"].update(dict.fromkeys(members))  # a dict: a set that keeps the order
    return [{"options": entry["options"], "names": list(entry["names"])} for entry in merged]


def apply_options(
    optimizers: Sequence[Any],
    model: Sequence[Named],
    saved: Sequence[Mapping[str, Any]],
    find: Callable[[Named, Mapping[str, Any]], str | None],
    *,
    strict: bool,
) -> list[Callable[[], None]]:
    """Finds each group's options.

    Args:
        optimizers: This rank's.
        model: This rank's parameters.
        saved: Of `merged_options`.
        find: A parameter's name in a dict of the checkpoint's names; None if it is not there.
        strict: Raise for parameters without options.

    Returns:
        What writes them into the groups: nothing is changed before all ranks have found theirs.

    Raises:
        CheckpointError: Two parameters of a group have had different options, or another kind of optimizer.
    """
    of_name = {name: entry["options"] for entry in saved for name in entry["names"]}
    known = {id(one.tensor): one for one in model}
    writes: list[Callable[[], None]] = []
    for optimizer in optimizers:
        kind = _class_of(optimizer)
        for group, parameters in zip(optimizer.param_groups, parameters_of(optimizer), strict=True):
            first: tuple[str, Mapping[str, Any]] | None = None
            for parameter in parameters:
                named = known[id(parameter)]
                name = find(named, of_name)
                if name is None and strict:
                    raise _absent(named.name, kind)
                if name is None:
                    continue
                options = of_name[name]
                first = first or (named.name, options)
                _check_alike(first, (named.name, options), kind)
            if first is not None:
                writes.append(_writer(group, first[1]))
    return writes


def _writer(group: dict[str, Any], options: Mapping[str, Any]) -> Callable[[], None]:
    def write() -> None:
        for key, value in options.items():
            if key == "optimizer" or (key in _HOW and key in group):
                continue
            present = group.get(key)
            if isinstance(present, Tensor):
                present.fill_(value) if not isinstance(value, Tensor) else present.copy_(value)
            elif isinstance(value, Tensor) and isinstance(present, int | float):
                group[key] = value.item()
            else:
                group[key] = value

    return write


def _check_alike(first: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]], kind: str) -> None:
    saved = other[1].get("optimizer")
    if saved != kind:
        raise CheckpointError(
            f"{other[0]} was trained by {saved} when the checkpoint was saved, and is in {kind} here; make the same "
            "optimizer, or load the model only, with Checkpointer(run, stages) without an optimizer"
        )
    if not equal_options(first[1], other[1]):
        differ = [key for key in first[1] if not equal_options(first[1].get(key), other[1].get(key))]
        raise CheckpointError(
            f"{first[0]} and {other[0]} are in one group here, but were saved with different options ("
            + ", ".join(f"{key} {first[1].get(key)} and {other[1].get(key)}" for key in differ[:4])
            + "); make the groups that the optimizer had when it was saved"
        )


def _absent(name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is in {kind} here, but was in no optimizer when the checkpoint was saved; leave it out of the "
        "optimizer, or load(strict=False) to give it the options and the state of a new one"
    )


def _class_of(optimizer: Any) -> str:
    """Its class; of one that shards another, that one's."""
    return type(getattr(optimizer, "optim", optimizer)).__name__


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def equal_options(one: Any, other: Any) -> bool:
    """Whether two options, or dicts of them, are the same.

    Example:
        >>> equal_options({"lr": torch.tensor(0.5)}, {"lr": 0.5})
        True
    """
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal_options(one[key], other[key]) for key in one)
    return bool(one == other)
