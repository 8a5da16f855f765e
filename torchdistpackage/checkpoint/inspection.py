"""What is on the disk: which checkpoints a run has, whether they are whole, and what is in them.

One process, no process groups, nothing unpickled; the command line asks here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torchdistpackage.checkpoint.folder import candidates, fault_of, find_unfinished, step_of, what_it_is
from torchdistpackage.checkpoint.manifest import Manifest, read_manifest
from torchdistpackage.errors import CheckpointError

__all__ = [
    "CheckpointInfo",
    "inspect_checkpoint",
    "list_checkpoints",
    "newest_checkpoint",
    "verify_checkpoint",
]


@final
@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a run's folder.

    Attributes:
        path: Its folder.
        step: Its number; None for one that was not finished.
        time: When it was written, in seconds since 1970; None if it does not say.
        nbytes: Of its files; 0 if it does not say.
        fault: Why it is not whole, in words; None if it is.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 2)).save(120)
        >>> (Path(run.name) / "step-00000120" / "shared.pt").unlink()
        >>> info, = list_checkpoints(run.name)
        >>> info.step, info.path.name, info.fault
        (120, 'step-00000120', 'shared.pt is missing')
    """

    path: Path
    step: int | None
    time: float | None
    nbytes: int
    fault: str | None


def list_checkpoints(run: str | os.PathLike[str], *, hashes: bool = False) -> list[CheckpointInfo]:
    """All checkpoints of a run, whole or not, the newest first.

    Args:
        run: The folder that was given to `Checkpointer`.
        hashes: Compare the contents of all files, not only their sizes.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> for step in (5, 10):
        ...     Checkpointer(run.name, nn.Linear(2, 2)).save(step)
        >>> [info.step for info in list_checkpoints(run.name)], list_checkpoints("no such folder")
        ([10, 5], [])
    """
    folder = Path(run)
    found = []
    for path in candidates(folder):
        fault = fault_of(path, hashes=hashes)
        manifest = _manifest(path)
        time, size = (manifest.time, manifest.nbytes) if manifest else (None, 0)
        found.append(CheckpointInfo(path, step_of(path), time, size, fault))
    torn = [CheckpointInfo(path, None, None, 0, what_it_is(path)) for path in find_unfinished(folder)]
    return sorted([*found, *torn], key=_order, reverse=True)


def newest_checkpoint(run: str | os.PathLike[str], *, hashes: bool = False) -> Path | None:
    """The folder of the newest checkpoint that is whole; None if there is none.

    Args:
        run: The folder that was given to `Checkpointer`.
        hashes: Compare the contents of all files, not only their sizes.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> for step in (5, 10):
        ...     Checkpointer(run.name, nn.Linear(2, 2)).save(step)
        >>> newest_checkpoint(run.name).name, newest_checkpoint("no such folder")
        ('step-00000010', None)
    """
    return next((info.path for info in list_checkpoints(run, hashes=hashes) if info.fault is None), None)


def verify_checkpoint(path: str | os.PathLike[str], *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    Args:
        path: Of one checkpoint.
        hashes: Compare the contents of all files, not only their sizes.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 2)).save(5)
        >>> verify_checkpoint(f"{run.name}/step-00000005"), verify_checkpoint("no such folder")
        (None, 'there is no such folder')
    """
    return what_it_is(Path(path)) or fault_of(Path(path), hashes=hashes)


def inspect_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """What is in a checkpoint: step, time, layout, files, tensors.

    Args:
        path: Of one checkpoint.

    Raises:
        CheckpointError: It is none.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3)).save(120)
        >>> manifest = inspect_checkpoint(newest_checkpoint(run.name))
        >>> manifest.parameters, [key for key in manifest.tensors if key.startswith("model.")]
        (9, ['model.weight', 'model.bias'])
    """
    if (problem := what_it_is(Path(path))) is not None:
        raise CheckpointError(f"{path} cannot be inspected: {problem}")
    try:
        return read_manifest(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be inspected: {error}") from error


def _order(info: CheckpointInfo) -> tuple[int, str]:
    return int(re.sub(r"\D", "", info.path.name)), info.path.name


def _manifest(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None
