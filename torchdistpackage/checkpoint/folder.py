"""Checkpoints as folders: whole or not there at all, whenever the processes that write them are killed.

::

    run/step-00000120.unfinished/      while it is written
        ...                            every file flushed to the disk
        manifest.json                  last: bytes and SHA-256 of every other file
    run/step-00000120/                 the same, renamed
    run/step-00000120.replaced/        an earlier one of that step, for the moment between two renames

A folder counts if it has a manifest of ours and every file has the size, and where that is asked the hash, that stand
there. Nothing else is believed. This file knows files only: no tensors and no ranks; `manifest.py` is what it reads and
writes, and `inspection.py` what users ask.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from torchdistpackage.checkpoint.manifest import MANIFEST, FileFacts, read_manifest
from torchdistpackage.errors import CheckpointError

__all__ = [
    "candidates",
    "fault_of",
    "file_facts",
    "find_unfinished",
    "prepare",
    "publish",
    "remove_old",
    "step_folder",
    "step_of",
    "sync_folder",
    "unfinished",
    "what_it_is",
    "write_file",
]

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"
_BLOCK = 1 << 22  # bytes that are hashed at a time
_logger = logging.getLogger(__name__)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies.

    Example:
        >>> step_folder(Path("run"), 120).name
        'step-00000120'
    """
    return run / f"step-{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where it lies while it is written."""
    return folder.with_name(folder.name + _UNFINISHED)


def step_of(folder: Path) -> int | None:
    """The number in a folder's name; None for what is not a checkpoint, or not finished.

    Example:
        >>> step_of(Path("run/step-00000120")), step_of(Path("run/step-00000120.unfinished"))
        (120, None)
    """
    found = re.fullmatch(rf"step-(\d{{8,}})(?:{re.escape(_REPLACED)})?", folder.name)
    return int(found[1]) if found else None


def candidates(run: Path) -> list[Path]:
    """The folders of a run that may be checkpoints, the newest first.

    Of a step that was being replaced when the run was killed, the old one counts where the new one is not there yet.
    """
    found = [path for path in run.glob("step-*") if step_of(path) is not None and path.is_dir()]
    names = {path.name for path in found}
    found = [path for path in found if path.name.removesuffix(_REPLACED) == path.name or _plain(path) not in names]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def find_unfinished(run: Path) -> list[Path]:
    """What killed runs, or one that still writes, have left; the newest first."""
    found = [path for path in run.glob(f"step-*{_UNFINISHED}") if _step_unfinished(path) is not None]
    return sorted(found, key=lambda path: _step_unfinished(path) or 0, reverse=True)


def _step_unfinished(path: Path) -> int | None:
    return step_of(path.with_name(path.name.removesuffix(_UNFINISHED)))


def _plain(path: Path) -> str:
    return path.name.removesuffix(_REPLACED)


def fault_of(folder: Path, *, hashes: bool = True, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None if nothing.

    Args:
        folder: Of one checkpoint.
        hashes: Compare contents, not only sizes: as long as reading all of it.
        names: The files to look at; None for all.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name in manifest.files if names is None else names:
        expected = manifest.files[name]
        try:
            size = os.stat(folder / name).st_size
            if size != expected.nbytes:
                return f"{name} has {size:,} bytes instead of {expected.nbytes:,}"
            if hashes and file_facts(folder / name).sha256 != expected.sha256:
                return f"{name} has another SHA-256 than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def what_it_is(path: Path) -> str | None:
    """What a path that is no checkpoint of ours seems to be, in words; None for one of ours."""
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return "it is a file; a checkpoint is a folder"
    names = {entry.name for entry in path.iterdir()}
    if path.name.endswith(_UNFINISHED):
        return "it was not finished: the run that wrote it was killed, or still writes"
    if MANIFEST in names:
        return None
    if ".metadata" in names:
        return f"it has no {MANIFEST}: a folder of torch.distributed.checkpoint that this library has not written"
    if "model.safetensors" in names or any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    ):
        return f"it has no {MANIFEST}: a directory of safetensors, as Hugging Face has them; use load_safetensors"
    if any(name.startswith("step-") for name in names):
        return "it is the folder of a run; give one of the checkpoints in it"
    return f"it has no {MANIFEST}, so it was not finished or is no checkpoint of this library"


# ---- writing ----


def prepare(folder: Path) -> Path:
    """Makes the empty folder in which a checkpoint is written, in place of what failed saves up to its step have left.

    They go first: on a disk that was full, what they hold may be the room that this one needs.

    Raises:
        CheckpointError: Something is in the way.
    """
    target, step = unfinished(folder), step_of(folder) or 0
    for left in find_unfinished(folder.parent):
        if left != target and (_step_unfinished(left) or 0) < step:
            _remove(left)
    try:
        if target.exists():
            (target / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(target)
        target.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error}; choose another folder or free this one") from error
    sync_folder(target.parent)
    return target


def write_file(path: Path, content: bytes) -> None:
    """Writes a file; it is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def file_facts(path: Path) -> FileFacts:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)  # lets other threads run
            size += len(block)
    return FileFacts(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk: a file whose name is lost is lost, however well it was written."""
    if os.name == "nt":
        return  # there a folder cannot be opened, and names are written with their files
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path) -> None:
    """Gives a checkpoint that is all on the disk its name, in place of an earlier one of that step.

    At no moment is there neither: until the second rename the earlier one counts under its second name.
    """
    written, earlier = unfinished(folder), folder.with_name(folder.name + _REPLACED)
    sync_folder(written)
    if folder.exists():
        if earlier.exists():
            shutil.rmtree(earlier)
        os.rename(folder, earlier)
    os.rename(written, folder)
    sync_folder(folder.parent)
    _remove(earlier)


def remove_old(run: Path, step: int, keep: int | None) -> None:
    """Deletes what is older than the newest `keep` checkpoints up to this step, and what is older and torn.

    Newer ones are left alone: somebody has gone back on purpose. What resists is tried again the next time.

    Args:
        run: The folder of the run.
        step: That was just written; it stays.
        keep: How many stay; None: all that are whole.
    """
    older = [path for path in candidates(run) if (step_of(path) or 0) < step]
    whole = [path for path in older if fault_of(path, hashes=False) is None]
    kept = whole if keep is None else whole[: keep - 1]
    torn = [path for path in find_unfinished(run) if (_step_unfinished(path) or 0) <= step]
    rest = [path for path in run.glob(f"step-*{_REPLACED}") if path not in older and (step_of(path) or 0) < step]
    for path in [*older, *torn, *rest]:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    if not path.exists():
        return
    try:
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not look like a checkpoint
        shutil.rmtree(path)
    except OSError as error:
        _logger.warning("%s could not be deleted (%s); it is tried again after the next checkpoint", path, error)
