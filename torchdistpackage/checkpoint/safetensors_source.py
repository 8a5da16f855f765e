"""The weights in a checkpoint, one tensor at a time, by whole-model name: without a model, a process group or a plan.

A checkpoint keeps a tensor in the pieces that its ranks had, and a parameter with several names once::

    __0_0.distcp   model.wte  model.h.0.weight rows 0:4  ..     StoredModel.read("h.0.weight")     rows 0:8
    __1_0.distcp   model.h.0.weight rows 4:8  optimizer. ..     StoredModel.name_of("lm_head")     "wte"

Neighbours: `tensor_files.py` reads the pieces; `export.py` is the user.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from torchdistpackage.checkpoint.boxes import whole_box
from torchdistpackage.checkpoint.folder import candidates, find_unfinished
from torchdistpackage.checkpoint.inspection import inspect_checkpoint, list_checkpoints, verify_checkpoint
from torchdistpackage.checkpoint.parts import Part
from torchdistpackage.checkpoint.safetensors_writing import TensorLayout, natural_order
from torchdistpackage.checkpoint.tensor_files import TensorFiles
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.weight_files import listed

__all__ = ["StoredModel", "is_run", "open_model"]

_PREFIX = "model."
_logger = logging.getLogger(__name__)


@final
class StoredModel:
    """The tensors of the model in a checkpoint.

    Args:
        folder: Of one checkpoint.

    Raises:
        CheckpointError: It is none, or holds no tensors of a model.

    Attributes:
        folder: The folder.
        layouts: Name -> type and shape, in the order of the names.
        aliases: Name -> the other names of the same tensor.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3)).save(120)
        >>> stored = StoredModel(Path(run.name, "step-00000120"))
        >>> stored.layouts["weight"], stored.read("bias").shape
        (TensorLayout(dtype=torch.float32, shape=(3, 2)), torch.Size([3]))
    """

    def __init__(self, folder: Path) -> None:
        manifest = inspect_checkpoint(folder)
        self.folder = folder
        self._files = TensorFiles(folder)
        names = [key.removeprefix(_PREFIX) for key in self._files.keys if key.startswith(_PREFIX)]
        if not names:
            kinds = {key.partition(".")[0] for key in self._files.keys}
            raise CheckpointError(f"{folder} holds no tensors of a model, only {listed(kinds) or 'nothing'}")
        self.layouts = {
            name: TensorLayout(self._files.dtype(_PREFIX + name), self._files.shape(_PREFIX + name))
            for name in sorted(names, key=natural_order)
        }
        self.aliases = {
            kept: tuple(name for name in all_names if name != kept)
            for kept, all_names in manifest.aliases.items()
            if kept in self.layouts
        }

    def name_of(self, name: str) -> str | None:
        """The name under which a tensor is kept, by any of its names; None if it is not there.

        Args:
            name: In the whole model.
        """
        if name in self.layouts:
            return name
        return next((kept for kept, others in self.aliases.items() if name in others), None)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor, on the CPU; takes the memory of it and of its largest piece.

        Args:
            name: One of `layouts`.
            dtype: To convert it to, if it is a floating one.

        Raises:
            CheckpointError: Its pieces cannot be read.
        """
        layout, key = self.layouts[name].cast(dtype), _PREFIX + name
        tensor = torch.empty(layout.shape, dtype=layout.dtype)
        try:
            self._files.read([(key, Part(key, layout.shape, whole_box(layout.shape), tensor))])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read from {self.folder}: {error}") from error
        return tensor


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run, with checkpoints in it.

    Example:
        >>> is_run(Path("no such folder"))
        False
    """
    return path.is_dir() and bool(candidates(path) or find_unfinished(path))


def open_model(checkpoint: str | os.PathLike[str], *, verify: bool) -> StoredModel:
    """The weights of a checkpoint, or of the newest whole one of a run.

    Args:
        checkpoint: Folder of either.
        verify: Compare the hashes of all its files; else their sizes.

    Raises:
        CheckpointError: There is none, or it is torn.

    Example: see `export_safetensors`.
    """
    folder = Path(checkpoint)
    if is_run(folder):
        torn: list[str] = []
        for info in list_checkpoints(folder):
            fault = info.fault or (verify_checkpoint(info.path) if verify else None)
            if fault is None:
                return StoredModel(info.path)
            _logger.warning("skipped %s: %s", info.path, fault)
            torn.append(f"{info.path.name}: {fault}")
        raise CheckpointError(f"{folder} has {len(torn)} checkpoints, of which none is whole: {'; '.join(torn)}")
    fault = verify_checkpoint(folder, hashes=verify)
    if fault is not None:
        raise CheckpointError(f"{folder} cannot be exported: {fault}")
    return StoredModel(folder)
