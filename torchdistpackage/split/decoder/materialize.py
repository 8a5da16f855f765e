"""Memory for stages that were cut on the meta device, filled as the model's authors would.

`module.to_empty` alone loses two things without a word: that two names are one tensor, and buffers that no checkpoint
has (rotary frequencies, embedding scales).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.part import filled_in, unwrapped
from torchdistpackage.split.decoder.stage_forward import STAGE, Stage

__all__ = ["materialize_stages"]


def materialize_stages(parts: Mapping[int, nn.Module], device: torch.device | str | None = None) -> None:
    """Gives stages on the meta device memory and first values, in place; what is not on the meta device stays.

    Parameters that stages of this process share stay one. Weights are drawn from torch's generator, so they depend on
    which stages are made: load weights, or seed, where ranks and layouts must agree.

    Args:
        parts: This process's stages, from `split_causal_lm` or `partition_causal_lm`.
        device: Where to; the CPU when None.

    Raises:
        SplitError: Nobody knows how to fill some module: it has neither the `_init_weights` of a transformers model
            around it, nor `reset_parameters`. Nothing was changed.

    Example:
        >>> part = nn.Linear(2, 3, device="meta")
        >>> materialize_stages({0: part})
        >>> part.weight.shape, part.weight.device.type
        (torch.Size([3, 2]), 'cpu')
    """
    owners: dict[int, Any] = {}
    for part in parts.values():
        _find_owners(unwrapped(part), None, owners)
    empty = [module for part in parts.values() for module in part.modules() if _on_meta(module)]
    around = [(part, module) for part in map(unwrapped, parts.values()) for module in _empty_containers(part)]
    nobody = [type(module).__name__ for module in empty if _filler(module, owners) is None]
    if nobody:
        raise SplitError(
            f"nobody knows how to fill {', '.join(dict.fromkeys(nobody))}: give these modules reset_parameters(), or "
            "cut the model with its weights"
        )
    made: dict[int, Tensor] = {}
    for module in empty:
        slots: tuple[Any, Any] = (module._parameters, module._buffers)
        for tensors in slots:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = made.setdefault(id(tensor), _memory(tensor, device or "cpu"))
    with torch.no_grad():
        for module in {id(module): module for module in empty}.values():
            fill = _filler(module, owners)
            assert fill is not None
            fill()
        for part, module in around:  # inwards out, as transformers does: they may change what their children made
            fill = _filler(module, owners)
            if fill is not None:
                with filled_in(part, module):
                    fill()


def _find_owners(module: nn.Module, owner: Any, owners: dict[int, Any]) -> None:
    """For each module the model of transformers around it, which knows how to fill it."""
    owner = module if hasattr(module, "_init_weights") else owner
    owners[id(module)] = owner
    vars(module).pop("_is_hf_initialized", None)  # it was, on the meta device
    for child in module.children():
        _find_owners(child, owner, owners)


def _filler(module: nn.Module, owners: dict[int, Any]) -> Any:
    owner = owners.get(id(module))
    if owner is not None:
        return lambda: owner._init_weights(module)
    return getattr(module, "reset_parameters", None)


def _empty_containers(part: nn.Module) -> list[nn.Module]:
    """The containers of a stage, the inner one first, that have no tensor of their own, and none with values."""
    stage: Stage | None = vars(part).get(STAGE)
    names = () if stage is None else stage.layout.skeleton.containers
    found = [part.get_submodule(name) for name in reversed(names)]
    return [
        module
        for module in found
        if not _on_meta(module) and all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    ]


def _on_meta(module: nn.Module) -> bool:
    return any(
        tensor is not None and tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def _memory(tensor: Tensor, device: torch.device | str) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
