"""The tensors of a model as they are on this rank: under whole-model names, without what wrappers put in between.

::

    module.layer1._orig_mod.0.weight     ->     layer1.0.weight           DDP( layer1 = torch.compile(...) )

Layers that `flatten_model` or another splitter made know their names (`names.py`); other modules are called as in
`model.state_dict()`. Neighbours above: averages and checkpoints, which must call one tensor by one name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.whole_state import whole_model_state_dict

__all__ = ["is_dtensor", "is_fully_sharded", "local_tensor", "named_tensors", "whole_tensor"]

# Class of a wrapper -> where it keeps the module. By name: to import torch._dynamo, say, takes a second.
_WRAPPERS = {
    "AveragedModel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "NaiveDDP": "module",
    "OptimizedModule": "_orig_mod",
}


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Does not load `torch.distributed.tensor` (0.4 s): whoever has one has loaded it.

    Example:
        >>> import torch
        >>> is_dtensor(torch.ones(2))
        False
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local_tensor(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself.

    Example:
        >>> import torch
        >>> local_tensor(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def whole_tensor(tensor: Any) -> Tensor:
    """A DTensor, gathered from all ranks that have a part of it, which all call this; any other tensor itself.

    Example:
        >>> import torch
        >>> whole_tensor(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether torch's `fully_shard` was applied to this very module.

    Example:
        >>> is_fully_sharded(nn.Linear(2, 2))
        False
    """
    loaded = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded a module has loaded it: 0.1 s for others
    kind = getattr(loaded, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the parameter or persistent buffer itself, in the order of the state dict; a tied one under each name.

    Modules of `fully_shard` let go of what they have gathered, so that their parameters are the shards.

    Raises:
        CheckpointError: It is wrapped in FullyShardedDataParallel, which fuses parameters.

    Example:
        >>> list(named_tensors(nn.DataParallel(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False)))))
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise CheckpointError(
                "FullyShardedDataParallel keeps no parameter as such; apply torch.distributed.fsdp.fully_shard instead"
            )
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]
    try:
        return whole_model_state_dict(model, keep_vars=True)
    except SplitError:
        return dict(_own_names(model))


def _own_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    inside: dict[str, str] = {}  # path of a module -> what the names of its tensors begin with
    wrapped: dict[str, str | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, attribute = path.rpartition(".")
        prefix = "" if not path else inside[parent] if wrapped[parent] == attribute else f"{inside[parent]}{attribute}."
        inside[path] = prefix
        found = (_WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS)
        wrapped[path] = next(found, None)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, parameter
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer
