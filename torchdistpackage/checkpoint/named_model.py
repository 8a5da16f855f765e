"""The parameters and buffers of this rank's stages, each once, with all the names that it has in the whole model.

::

    one module                     its own names, or whole-model names if a splitter made its layers
    several, {stage: module}       whole-model names; modules without such names are called after their stage
    wrapped (DDP, compile, ...)    seen through

A tied parameter is saved once, under its first name. The others are noted, and when a checkpoint is loaded any of them
will do: the tie may have been seen by the run that saved it, or by the one that loads it, by both or by none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import Tensor, nn

from torchdistpackage.checkpoint.parts import check_dense
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.model_tensors import named_tensors
from torchdistpackage.split.ties import ties_in
from torchdistpackage.topology.expert_replicas import spread_group

__all__ = ["Aliases", "Named", "Stages", "in_one_module", "named_model", "saved_name"]

Stages: TypeAlias = "nn.Module | Sequence[nn.Module] | Mapping[int, nn.Module]"
Aliases: TypeAlias = Mapping[str, Sequence[str]]  # first name -> all names


@final
@dataclass(frozen=True, eq=False)
class Named:
    """A parameter or persistent buffer.

    Attributes:
        names: All that are known, the one under which it is saved first.
        tensor: Itself.
        is_parameter: Or else a buffer.
        tied: Whether other stages have it, too.
        expert: Whether replicas leave it alone, because it is another one on each of them.
    """

    names: tuple[str, ...]
    tensor: Tensor
    is_parameter: bool
    tied: bool
    expert: bool = False

    @property
    def name(self) -> str:
        """Under which it is saved."""
        return self.names[0]


def in_one_module(stages: Stages) -> nn.Module:
    """This rank's modules in one container, which is not theirs: nothing is changed in them.

    Raises:
        CheckpointError: They are no modules.
    """
    given: Any = stages
    if isinstance(given, nn.Module):
        return given
    members = list(given.values()) if isinstance(given, Mapping) else list(given)
    wrong = [type(one).__name__ for one in members if not isinstance(one, nn.Module)]
    if wrong:
        raise CheckpointError(
            f"stages must be a module, a list of modules or {{stage: module}}, but it holds a {wrong[0]}; pass what "
            "partition_chunks, partition_causal_lm or local_stages returned, or nn.Sequential(*layers)"
        )
    if isinstance(given, Mapping):
        return nn.ModuleDict({str(stage): module for stage, module in given.items()})
    return members[0] if len(members) == 1 else nn.ModuleList(members)


def named_model(module: nn.Module) -> list[Named]:
    """All parameters and persistent buffers, in the order of the state dict.

    Args:
        module: Of `in_one_module`.

    Raises:
        CheckpointError: One has no values.

    Example:
        >>> [one.name for one in named_model(nn.Linear(2, 3))]
        ['weight', 'bias']
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in named_tensors(module).items():
        if nn.parameter.is_lazy(tensor):
            raise CheckpointError(f"{name} has no shape yet; run a first batch through lazy modules before")
        check_dense(name, tensor)
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    experts = _left_alone(module)
    ties = {id(tie.parameter): tie.names for tie in ties_in(module).values()}
    return [
        Named(
            tuple(dict.fromkeys([*ties.get(key, ()), *names[key]])),
            tensor,
            isinstance(tensor, nn.Parameter),
            key in ties,
            key in experts,
        )
        for key, tensor in tensors.items()
    ]


def _left_alone(root: nn.Module) -> set[int]:
    """The ids of the parameters that replicas of their module do not share."""
    found = {id(one) for one in root.parameters() if spread_group(one) is not None}
    for module in root.modules():
        names = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        found |= {id(one) for name, one in module.named_parameters() if name in names} if names else set()
    return found


def saved_name(names: Sequence[str], aliases: Aliases, keys: Collection[str]) -> str | None:
    """Under which name a checkpoint has what is called one of these names here; None if it has not.

    Args:
        names: All that are known here.
        aliases: Of the checkpoint.
        keys: The names that the checkpoint has tensors under.

    Example:
        >>> saved_name(["head.weight"], {"embed.weight": ["embed.weight", "head.weight"]}, {"embed.weight"})
        'embed.weight'
    """
    for name in names:
        if name in keys:
            return name
    mine = set(names)
    return next((first for first, others in aliases.items() if first in keys and mine.intersection(others)), None)
