"""A checkpoint as a state dict that reads a tensor from its file when it is asked for, and keeps none.

So a family's `from_pretrained_split` is the same code for a model in memory and for a directory of files, and takes the
memory of what it keeps. Names are those of the model's modules where the files' can be turned into them by looking at
the names alone: a missing prefix, a tied weight that is there once.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.decoder.weight_files import WeightFiles, find

__all__ = ["CheckpointTensors", "PickledTensors", "float_type"]


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


@final
class PickledTensors(Mapping[str, Tensor]):
    """Name -> tensor, of pickled files: all are in memory, or mapped into it where the files allow that.

    Args:
        source: The directory, or a name that transformers knows.
        whole: The model on the meta device, for its names; without it the files' are taken.

    Attributes:
        name: The source.

    Raises:
        CheckpointError: A file is missing or broken.
    """

    def __init__(self, source: str, whole: nn.Module | None = None) -> None:
        self.name = source
        self._tensors: dict[str, Tensor] = {}
        for file in _pickled_files(source):
            self._tensors.update(_unpickled(source, file))
        self._names = _module_names(self._tensors, whole)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _pickled_files(source: str) -> list[str]:
    if find(source, "pytorch_model.bin") is not None:
        return ["pytorch_model.bin"]
    index = find(source, "pytorch_model.bin.index.json")
    try:
        return sorted({*json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of pickled files ({type(error).__name__}: {error})") from error


def _unpickled(source: str, file: str) -> dict[str, Tensor]:
    path = find(source, file)
    if path is None:
        raise CheckpointError(f"{source} cannot be loaded: {file}, which its index names, is not there")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # whatever a broken pickle makes of itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a whole file of pickled tensors: {reason}") from error


def float_type(value: torch.dtype | str | None) -> torch.dtype | None:
    """The type that an argument `dtype` means; None where the checkpoint says it.

    Args:
        value: A type, its name, or "auto".

    Raises:
        SplitError: It is no floating type.

    Example:
        >>> float_type("bfloat16"), float_type("auto")
        (torch.bfloat16, None)
    """
    if value is None or value == "auto":
        return None
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SplitError(f"dtype must be a floating type such as torch.bfloat16, its name or 'auto', got {value!r}")
    return found


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
