"""CHECKPOINTS that fit any layout: sharded, written beside the steps, whole or not there at all.

===================  =================================================================================
`checkpointer.py`    the face: `Checkpointer`
`contents.py`        what this rank brings: `named_model.py`, `optimizer_parts.py`, `options.py`
`boxes.py`           the arithmetic; `local_boxes.py` of DTensors, `parts.py` with tensors
`plan.py`            who writes what
`job.py`             writes it; `background.py` in a thread, `ranks.py` what ranks tell each other, `plain.py` values
                     that are no tensors
`tensor_writing.py`  boxes to files, in the format of torch.distributed.checkpoint; `tensor_files.py` reads
`folder.py`          folders that count or do not; `manifest.py`, `choosing.py`, `inspection.py`
`restore.py`         into the objects of another layout; `companions.py` what has no tensors of the model;
                     `schedulers.py` learning rates of this rank's parameter groups, `random_states.py` generators
`data_position.py`   a place in the data that fits any number of replicas: `ResumableSampler`
`export.py`          a checkpoint to a Hugging Face directory; `safetensors_*.py` from and to running stages
===================  =================================================================================

Loaded on first use (PEP 562): to list and to check checkpoints takes no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.checkpoint.checkpointer import Checkpointer, Loaded
    from torchdistpackage.checkpoint.data_position import ResumableSampler
    from torchdistpackage.checkpoint.export import export_safetensors
    from torchdistpackage.checkpoint.inspection import (
        CheckpointInfo,
        inspect_checkpoint,
        list_checkpoints,
        newest_checkpoint,
        verify_checkpoint,
    )
    from torchdistpackage.checkpoint.manifest import FileFacts, Manifest, TensorFacts
    from torchdistpackage.checkpoint.safetensors_directory import ExportReport
    from torchdistpackage.checkpoint.safetensors_loading import LoadedNames, load_safetensors
    from torchdistpackage.checkpoint.safetensors_saving import save_safetensors
    from torchdistpackage.checkpoint.tensor_files import TensorFiles

_LATER = {
    "checkpointer": "Checkpointer Loaded",
    "data_position": "ResumableSampler",
    "export": "export_safetensors",
    "inspection": "CheckpointInfo inspect_checkpoint list_checkpoints newest_checkpoint verify_checkpoint",
    "manifest": "FileFacts Manifest TensorFacts",
    "safetensors_directory": "ExportReport",
    "safetensors_loading": "LoadedNames load_safetensors",
    "safetensors_saving": "save_safetensors",
    "tensor_files": "TensorFiles",
}
_FILE = {name: file for file, names in _LATER.items() for name in names.split()}

__all__ = [
    "CheckpointInfo",
    "Checkpointer",
    "ExportReport",
    "FileFacts",
    "Loaded",
    "LoadedNames",
    "Manifest",
    "ResumableSampler",
    "TensorFacts",
    "TensorFiles",
    "export_safetensors",
    "inspect_checkpoint",
    "list_checkpoints",
    "load_safetensors",
    "newest_checkpoint",
    "save_safetensors",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
