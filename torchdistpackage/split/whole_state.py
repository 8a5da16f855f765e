"""State dicts of stages under whole-model names: of any number of stages, or of the plain model, into any other.

::

    stage 0   {"0.weight": ..}  --->  {"embed.weight": ..}  --.
                                                              |-->  the state dict of the model
    stage 1   {"0.weight": ..}  --->  {"head.weight": ..}   --'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.names import named_slots
from torchdistpackage.split.ties import ties_in

__all__ = ["load_whole_model_state_dict", "whole_model_state_dict"]


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
    slots = [slot for slot in named_slots(stage) if slot.persistent]
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
    slots = [slot for slot in named_slots(stage) if slot.persistent]
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


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
