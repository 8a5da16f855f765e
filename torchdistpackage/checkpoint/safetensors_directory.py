"""A directory that `from_pretrained` and safetensors know, put in its place at one moment.

::

    out.unfinished/   config.json  model-00001-of-00002.safetensors  model-00002-of-00002.safetensors   while it is made
         |            model.safetensors.index.json  export.json                                           last
         |  renamed
         v
    out/              whole; what an earlier export left there is gone, and what is not an export's was never touched

`export.json` says where the weights come from, and lists the files, so that the next export knows what it may replace:
a directory with anything else in it is somebody's. Neighbours: `export.py` and `safetensors_saving.py`, which fill it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torchdistpackage.checkpoint.folder import sync_folder, write_file
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.safetensors_header import read_header
from torchdistpackage.split.decoder.weight_files import INDEX, listed

__all__ = ["RECORD", "ExportReport", "begin_directory", "check_target", "finish_directory", "unfinished_directory"]

RECORD = "export.json"
_FORMAT = "torchdistpackage export"


@final
@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        directory: Where.
        files: The safetensors files, by name.
        num_tensors: Tensors in them.
        num_bytes: Bytes of these tensors.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import save_safetensors
        >>> home = tempfile.TemporaryDirectory()
        >>> report = save_safetensors(nn.Linear(2, 3), f"{home.name}/trained", max_shard_size=24)
        >>> report.files, report.num_tensors, report.num_bytes
        (('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'), 2, 36)
    """

    directory: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int


def check_target(directory: str | os.PathLike[str]) -> Path:
    """The directory, if it is absent, empty, or an earlier export with nothing else in it.

    Raises:
        CheckpointError: It is a file, or holds what no export wrote.

    Example:
        >>> check_target("new_directory").name
        'new_directory'
    """
    target = Path(directory)
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a directory, which will be made")
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    foreign = there - _written_earlier(target)
    if foreign:
        raise CheckpointError(
            f"{target} holds {len(foreign)} {'entry' if len(foreign) == 1 else 'entries'} that no export wrote "
            f"({listed(foreign)}), which will not be replaced: give a new directory, or move them away"
        )
    return target


def unfinished_directory(target: Path) -> Path:
    """The folder in which the files are made, beside the directory."""
    home = target.resolve()
    return home.with_name(f"{home.name}.unfinished")


def begin_directory(target: Path) -> Path:
    """Makes that folder, empty; what an attempt that failed has left is removed.

    Raises:
        CheckpointError: It cannot be made.
    """
    folder = unfinished_directory(target)
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}; is its parent writable?") from error
    return folder


def finish_directory(
    folder: Path, target: Path, files: Mapping[str, Sequence[str]], source: Mapping[str, Any]
) -> ExportReport:
    """Writes the index and the record, last, and puts the folder in place of the directory.

    Args:
        folder: From `begin_directory`, with all safetensors files on the disk.
        target: From `check_target`.
        files: Safetensors file -> names of its tensors.
        source: Where the weights come from, for the record.

    Raises:
        CheckpointError: The directory was filled by somebody meanwhile, or cannot be replaced.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    try:
        num_bytes = sum(read_header(folder / file).num_tensor_bytes for file in files)
        if len(files) != 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            _write_json(folder / INDEX, index, sort_keys=True)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        _write_json(folder / RECORD, {"format": _FORMAT, "version": 1, **source, "files": sizes})
        sync_folder(folder)
        _put_in_place(folder, check_target(target))
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be put in place: {error.strerror}; all is in {folder}, which may be renamed by hand"
        ) from error
    return ExportReport(target, tuple(files), len(weight_map), num_bytes)


def _put_in_place(folder: Path, target: Path) -> None:
    """Renames; of an earlier export the whole is there until the new one is."""
    home = target.resolve()
    earlier = home.with_name(f"{home.name}.replaced")
    if earlier.is_dir():
        shutil.rmtree(earlier)
    if home.is_dir() and any(home.iterdir()):
        os.replace(home, earlier)
    os.replace(folder, home)
    sync_folder(home.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _written_earlier(target: Path) -> set[str]:
    """The files that an earlier export says it wrote; none where there is no record of one."""
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        return {RECORD, *record["files"]} if record["format"] == _FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    write_file(path, (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode())
