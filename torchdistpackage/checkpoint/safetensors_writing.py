"""Safetensors files, written tensor by tensor: which tensor goes to which file, and where in it, is known beforehand.

The safetensors library writes a file when all its tensors are in memory. Names, types and shapes are known before any
tensor is read, and they are all that a header needs; so the header is written first, and each tensor to its place, in
whatever order the tensors come::

    names, types, shapes  --->  plan_shards  --->  model-00001-of-00002.safetensors   | header | wte ........ | h.0 |
                                                   model-00002-of-00002.safetensors   | header | h.1 | ln_f |
    a tensor at a time    --->  ShardWriter.write ---------------------------------------------^

Neighbours: `export.py` reads the tensors of a checkpoint, `safetensors_saving.py` those of running stages;
`safetensors_directory.py` puts the files in their place.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.needed_tensors import dtype_in_files
from torchdistpackage.split.decoder.safetensors_header import TensorEntry, make_header
from torchdistpackage.split.decoder.weight_files import SINGLE, listed

__all__ = [
    "ShardWriter",
    "TensorLayout",
    "float_type",
    "natural_order",
    "number_of_bytes",
    "plan_shards",
    "shard_names",
]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@final
@dataclass(frozen=True)
class TensorLayout:
    """What is known of a tensor without its values.

    Attributes:
        dtype: Of the elements.
        shape: Sizes; those of the whole tensor, however it is spread.

    Example:
        >>> TensorLayout(torch.bfloat16, (3, 2)).num_bytes
        12
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Length of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def cast(self, dtype: torch.dtype | None) -> TensorLayout:
        """With another floating type, if it is a floating tensor and one is given."""
        return self if dtype is None or not self.dtype.is_floating_point else TensorLayout(dtype, self.shape)


def number_of_bytes(size: int | str) -> int:
    """A size in bytes, from a number or from "5GB" (decimal, as Hugging Face counts) or "5GiB" (binary).

    Raises:
        CheckpointError: It is neither, or less than one byte.

    Example:
        >>> number_of_bytes("1.5GB"), number_of_bytes("2 KiB"), number_of_bytes(7)
        (1500000000, 2048, 7)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", str(size).upper())
    unit = _UNITS.get(found[2] if found and found[2] != "B" else "") if found else None
    number = int(float(found[1]) * unit) if found and unit else 0
    if number < 1:
        raise CheckpointError(f"{size!r} is no size of a file; write it in bytes, or as '5GB', '500MB' or '2GiB'")
    return number


def float_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating type, from itself or its name.

    Raises:
        CheckpointError: It is no floating type.

    Example:
        >>> float_type("bfloat16")
        torch.bfloat16
    """
    found: Any = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"{dtype!r} is no floating type; write 'float32', 'bfloat16' or 'float16'")
    return found


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """The key that sorts names with their numbers as numbers, so that files do not depend on who wrote what first.

    Example:
        >>> sorted(["h.10.w", "h.9.w", "h.b"], key=natural_order)
        ['h.9.w', 'h.10.w', 'h.b']
    """
    pieces = re.split(r"(\d+)", name)
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces if piece)


def plan_shards(layouts: Mapping[str, TensorLayout], most: int) -> list[tuple[str, ...]]:
    """Which tensors share a file: in their order, as many as fit; one that is larger has a file of its own.

    Args:
        layouts: Name -> type and shape.
        most: Bytes of the tensors of a file.

    Example:
        >>> sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
        >>> plan_shards({name: TensorLayout(torch.uint8, (size,)) for name, size in sizes.items()}, 7)
        [('a', 'b'), ('c',), ('d',)]
    """
    shards: list[tuple[str, ...]] = []
    room = -1
    for name, layout in layouts.items():
        if layout.num_bytes > room:
            shards.append(())
            room = most
        shards[-1] = (*shards[-1], name)
        room -= layout.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """What transformers calls the files of a directory.

    Example:
        >>> shard_names(1), shard_names(2)[1]
        (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


@final
class ShardWriter:
    """One safetensors file in the making; a context manager that puts it on the disk.

    Args:
        path: Of the new file.
        layouts: Name -> type and shape of all tensors that it will hold.

    Raises:
        CheckpointError: It cannot be written, or the format has no such type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     with ShardWriter(path, {"w": TensorLayout(torch.float32, (2,))}) as file:
        ...         file.write("w", torch.ones(2))
        ...     path.stat().st_size
        104
    """

    def __init__(self, path: Path, layouts: Mapping[str, TensorLayout]) -> None:
        self.path = path
        entries = {
            name: TensorEntry(dtype_in_files(layout.dtype, name), layout.shape, 0, layout.num_bytes)
            for name, layout in layouts.items()
        }
        self._layouts, self._header, self._missing = layouts, make_header(entries), set(layouts)
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
        self._put(0, memoryview(self._header.text))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the file, finished or not."""
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor in its place; in any order, each once.

        Args:
            name: One of the file's.
            tensor: Of the shape that was announced, on any device; another type is converted.

        Raises:
            CheckpointError: It has another shape, or the file cannot be written.
        """
        layout = self._layouts[name]
        if tuple(tensor.shape) != layout.shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)}, and was announced as {layout.shape}")
        values = tensor.detach().to("cpu", layout.dtype).contiguous()
        self._put(self._header.tensors[name].start, values.reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def finish(self) -> None:
        """Puts the file on the disk, and closes it.

        Raises:
            CheckpointError: Tensors were not written, or the disk refuses.
        """
        if self._missing:
            raise CheckpointError(f"{self.path} was to hold {listed(self._missing)}, which nobody wrote")
        try:
            self._file.truncate(self._header.num_bytes)  # tensors without elements may be its last
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._refused(error) from error

    def _put(self, start: int, content: memoryview) -> None:
        try:
            self._file.seek(start)
            while content:  # an unbuffered write may take only a part
                content = content[self._file.write(content) :]
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CheckpointError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(
                f"no space left for {self.path}, which will have {self._header.num_bytes} bytes: make room, and try "
                "again"
            )
        return CheckpointError(f"{self.path} cannot be written: {error.strerror}")
