"""A checkpoint as a state dict that reads a tensor from its file when it is asked for, and keeps none.

So a family's `from_pretrained_split` is the same code for a model in memory and for a directory of files, and takes the
memory of what it keeps. Names are those of the model's modules where the files' can be turned into them by looking at
the names alone: a missing prefix, a tied weight that is there once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from torchdistpackage.split.decoder.weight_files import WeightFiles

__all__ = ["CheckpointTensors"]


@final
class CheckpointTensors(Mapping[str, Tensor]):
    """Name -> tensor, read anew at each access.

    Args:
        files: Where they are.
        whole: The model on the meta device, for its names; without it the files' are taken.
        of_whole: Whether they are those of a whole model, whose configuration says of what type they are to be.

    Attributes:
        files: Where they are.
        of_whole: As given.

    Raises:
        CheckpointError: At an access: the file of the tensor is missing or broken.
    """

    def __init__(self, files: WeightFiles, whole: nn.Module | None = None, *, of_whole: bool = True) -> None:
        self.files = files
        self.of_whole = of_whole
        self._names = _module_names(files.file_of, whole)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files.read(self._names[name])
        self.files.check()
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor has in its file."""
        return self.files.dtype(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _module_names(names: Mapping[str, Any], whole: nn.Module | None) -> dict[str, str]:
    """Name in the model -> name in the files."""
    if whole is None:
        return {name: name for name in names}
    expected, prefix = set(whole.state_dict()), f"{getattr(whole, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in names:
        full = f"{prefix}{name}"
        found[full if name not in expected and full in expected else name] = name
    ties: Mapping[str, str] = getattr(whole, "all_tied_weights_keys", {})
    for one, other in ties.items():
        if one not in found and other in found:
            found[one] = found[other]
        elif other not in found and one in found:
            found[other] = found[one]
    return found
