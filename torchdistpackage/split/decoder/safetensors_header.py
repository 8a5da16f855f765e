"""The header of a safetensors file: read and checked without the tensors, and written without them.

::

    | 8 bytes | n bytes: JSON, padded with spaces | data                        |
    |    n    | {"wte": {"dtype": "BF16", "shape": [32, 4], "data_offsets": [0, 256]}, ...}
                                                     0        256       file size - 8 - n

The safetensors library gives tensors, by mapping the file, and writes a file only when all its tensors are in memory.
Whoever moves bytes from file to file (`parts/safetensors_copy.py`) needs neither, but where the bytes are. The rules
are those of the library, so that what passes here opens there: the tensors fill the data without gaps or overlaps.
Plain Python; `needed_tensors.py` makes tensors of it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torchdistpackage.errors import CheckpointError

__all__ = ["SafetensorsHeader", "TensorEntry", "make_header", "read_header"]

_LONGEST = 100_000_000  # bytes of JSON, as in the library: a larger number is garbage
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
_ORDER = {dtype: place for place, dtype in enumerate(_BITS)}


@final
@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is.

    Attributes:
        dtype: As safetensors spells it, such as "BF16".
        shape: Sizes.
        start: Its first byte, counted from the beginning of the file.
        num_bytes: Length.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@final
@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file says of itself.

    Attributes:
        tensors: Name -> where it is, in the order of the bytes.
        num_bytes: Of the whole file.
        text: The header's own bytes, with the length in front.
    """

    tensors: Mapping[str, TensorEntry]
    num_bytes: int
    text: bytes

    @property
    def num_tensor_bytes(self) -> int:
        """Of the tensors alone."""
        return self.num_bytes - len(self.text)


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Reads and checks the header of a file.

    Args:
        path: Of the file.

    Raises:
        CheckpointError: It is not there, is no safetensors file, or is not whole; the message has the numbers, and the
            tensors that are wrong.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> home = tempfile.TemporaryDirectory()
        >>> save_file({"head": torch.zeros(3, 2), "bias": torch.zeros(3)}, f"{home.name}/model.safetensors")
        >>> header = read_header(f"{home.name}/model.safetensors")
        >>> header.tensors["head"].shape, header.tensors["head"].num_bytes, header.num_tensor_bytes
        ((3, 2), 24, 36)
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = _text(file, size, name)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror}); fetch the file again") from error
    tensors = _tensors(text, name)
    end = max((entry.start + entry.num_bytes for entry in tensors.values()), default=len(text))
    if size < end:
        cut = [key for key, entry in tensors.items() if entry.start + entry.num_bytes > size]
        raise CheckpointError(
            f"{name} is cut short: it has {size} bytes, and its header speaks of {end}; {len(cut)} of {len(tensors)} "
            f"tensors are not whole, the first is {cut[0]}: fetch the file again"
        )
    if size > end:
        raise CheckpointError(f"{name} has {size} bytes, but its tensors end at {end}; fetch the file again")
    return SafetensorsHeader(tensors, size, text)


def make_header(tensors: Mapping[str, TensorEntry]) -> SafetensorsHeader:
    """The header of a new file, byte for byte that of the safetensors library.

    Args:
        tensors: Name -> dtype, shape and length; where they start now does not matter.

    Returns:
        With the places in the new file: the widest types first, so that each tensor is aligned.

    Example:
        >>> made = make_header({"b": TensorEntry("U8", (3,), 0, 3), "a": TensorEntry("F32", (2,), 90, 8)})
        >>> len(made.text) % 8, {name: entry.start - len(made.text) for name, entry in made.tensors.items()}
        (0, {'a': 0, 'b': 8})
    """
    order = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name.encode()))
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        entry = tensors[name]
        offsets = [at, at + entry.num_bytes]
        found[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.num_bytes
    body = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    text = struct.pack("<Q", len(body)) + body
    placed = {
        name: TensorEntry(
            tensors[name].dtype,
            tensors[name].shape,
            len(text) + found[name]["data_offsets"][0],
            tensors[name].num_bytes,
        )
        for name in order
    }
    return SafetensorsHeader(placed, len(text) + at, text)


def _text(file: Any, size: int, name: str) -> bytes:
    """The bytes before the data."""
    first: bytes = file.read(8)
    if len(first) < 8:
        raise CheckpointError(f"{name} is no safetensors file: it has {size} bytes, fewer than any; fetch it again")
    (length,) = struct.unpack("<Q", first)
    if length > min(_LONGEST, size - 8):
        raise CheckpointError(
            f"{name} is no whole safetensors file: its first 8 bytes announce a header of {length} bytes, and "
            f"{size - 8} bytes follow; fetch the file again (a file of git-lfs holds only a pointer until git lfs pull)"
        )
    return first + bytes(file.read(length))


def _tensors(text: bytes, name: str) -> dict[str, TensorEntry]:
    """The tensors of a header in the order of their bytes, checked."""
    try:
        found = json.loads(text[8:].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no safetensors file: its header is no JSON; fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is no safetensors file: its header is {type(found).__name__}; fetch it again")
    entries: dict[str, TensorEntry] = {}
    for key, value in found.items():
        if key != "__metadata__":
            entries[key] = _entry(key, value, len(text), name)
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    expected, before = len(text), ""
    for key, entry in ordered.items():
        if entry.start != expected:
            what = f"overlaps {before}" if entry.start < expected else f"leaves a gap behind {before or 'the header'}"
            raise CheckpointError(
                f"{name} is damaged: {key} {what}, it begins at byte {entry.start} and not at {expected}; fetch the "
                "file again"
            )
        expected, before = entry.start + entry.num_bytes, key
    return ordered


def _entry(key: str, value: Any, data: int, name: str) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, begin, end]
        sound = all(type(number) is int and number >= 0 for number in numbers) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{name} is damaged: its header describes {key} as {str(value)[:80]}; fetch it again")
    if dtype not in _BITS:
        raise CheckpointError(f"{name} has {key} as {dtype}, a type that is not known here: {', '.join(_BITS)} are")
    wanted = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != wanted:
        raise CheckpointError(
            f"{name} is damaged: {key} is {dtype} of shape {shape}, {wanted / 8:g} bytes, and has the bytes {begin} to "
            f"{end}; fetch the file again"
        )
    return TensorEntry(dtype, shape, data + begin, end - begin)
