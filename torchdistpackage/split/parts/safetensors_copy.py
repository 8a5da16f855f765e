"""Tensors from safetensors files into a new one, as ranges of bytes: a few MiB of memory, whatever their size.

The safetensors library writes what is wholly in memory, and reads by mapping files, whose pages count as memory of the
process; a part of a large model is neither. So bytes are copied from file to file, through one small buffer::

    model-00001.safetensors   header | wte ........ | h.0 .. |
    model-00002.safetensors   header | h.1 .. | h.2 .. | ln_f |
                                          |
    bottom.safetensors        header | h.0 .. | h.1 .. | wte ........ |     in the library's own order

A copy that was cut short is gone on with. What is there already is kept as far as it is, byte for byte, what the source
has; so it does not matter who began it, and when, and from which files. Everything that was written is read again.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import final

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.safetensors_header import SafetensorsHeader, TensorEntry, make_header
from torchdistpackage.split.decoder.weight_files import listed

__all__ = ["CopiedTensors", "Piece", "copy_tensors", "hash_of", "header_of"]

_CHUNK = 4 << 20  # bytes; larger ones are not faster

Advance = Callable[[int], None]
"""Is told of bytes that are done, as they are."""


@final
@dataclass(frozen=True)
class Piece:
    """A tensor in a file.

    Attributes:
        path: Of the file.
        entry: Where in it.
    """

    path: Path
    entry: TensorEntry


@final
@dataclass(frozen=True)
class CopiedTensors:
    """What `copy_tensors` did.

    Attributes:
        sha256: Tensor -> hash of its bytes.
        resumed_bytes: Of tensors that were there, and right.
    """

    sha256: Mapping[str, str]
    resumed_bytes: int


def header_of(pieces: Mapping[str, Piece]) -> SafetensorsHeader:
    """The header of the file that these tensors make.

    Args:
        pieces: Name -> where it is now.

    Example: see `make_header`.
    """
    return make_header({name: piece.entry for name, piece in pieces.items()})


def copy_tensors(pieces: Mapping[str, Piece], target: Path, advance: Advance) -> CopiedTensors:
    """Makes a safetensors file of tensors that are in other files, and reads it again to be sure.

    Args:
        pieces: Name -> where it is.
        target: The new file. If it is there it is gone on with where its header is the same, and else begun anew.
        advance: Is called with the bytes that were copied, and with those that were read again: with each byte twice.

    Raises:
        CheckpointError: A source cannot be read any further, the disk is full, or does not give back what was written.

    Example: see `split_checkpoint`.
    """
    header = header_of(pieces)
    kept = _kept(target, header, pieces, advance)
    try:
        fresh = _append(target, header, pieces, kept, advance)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error
        raise CheckpointError(
            f"no space left for {target}, which will have {header.num_bytes} bytes: make room, and run the same "
            "command again; it goes on from here"
        ) from error
    written = {name: Piece(target, header.tensors[name]) for name in fresh}
    if damaged := [name for name, piece in written.items() if hash_of(name, piece, advance) != fresh[name]]:
        raise CheckpointError(
            f"{target} does not give back the bytes that were written, of {listed(damaged)}: check the disk, and run "
            "the same command again"
        )
    return CopiedTensors({**kept, **fresh}, sum(header.tensors[name].num_bytes for name in kept))


def hash_of(name: str, piece: Piece, advance: Advance = lambda count: None) -> str:
    """SHA-256 of a tensor's bytes, as hexadecimal digits.

    Args:
        name: Of the tensor, for errors.
        piece: Where it is.
        advance: Is called with the bytes that were read.

    Raises:
        CheckpointError: The file cannot be read, or ends before the tensor does.

    Example: see `verify_part`.
    """
    digest = hashlib.sha256()
    for chunk in _chunks(name, piece):
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _chunks(name: str, piece: Piece) -> Iterator[memoryview]:
    """The bytes of a tensor, in one buffer that is used again and again."""
    left = piece.entry.num_bytes
    buffer = memoryview(bytearray(min(_CHUNK, left)))
    try:
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.entry.start)
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise CheckpointError(
                        f"{piece.path} has become shorter: {left} bytes of {name} are missing; is it being written? "
                        "Run the same command again when it is whole"
                    )
                yield buffer[:count]
                left -= count
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read from {piece.path}: {error.strerror}") from error


def _kept(target: Path, header: SafetensorsHeader, pieces: Mapping[str, Piece], advance: Advance) -> dict[str, str]:
    """The first tensors of a file that was begun, as far as the source has the same; and their hashes."""
    kept: dict[str, str] = {}
    if not target.is_file():
        return kept
    size = target.stat().st_size
    with target.open("rb") as file:
        if file.read(len(header.text)) != header.text:
            return kept
    for name, entry in header.tensors.items():
        if entry.start + entry.num_bytes > size:
            break
        digest = hash_of(name, pieces[name])
        if hash_of(name, Piece(target, entry)) != digest:
            break
        kept[name] = digest
        advance(2 * entry.num_bytes)
    return kept


def _append(
    target: Path, header: SafetensorsHeader, pieces: Mapping[str, Piece], kept: Mapping[str, str], advance: Advance
) -> dict[str, str]:
    """Writes the tensors behind those that are kept; name -> hash of what was read."""
    fresh: dict[str, str] = {}
    with target.open("r+b" if kept else "wb", buffering=0) as file:
        if kept:
            last = header.tensors[list(kept)[-1]]
            file.seek(last.start + last.num_bytes)
            file.truncate()
        else:
            _write(file, memoryview(header.text))
        for name in header.tensors:
            if name not in kept:
                digest = hashlib.sha256()
                for chunk in _chunks(name, pieces[name]):
                    _write(file, chunk)
                    digest.update(chunk)
                    advance(len(chunk))
                fresh[name] = digest.hexdigest()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read again comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return fresh


def _write(file: RawIOBase, content: memoryview) -> None:
    while content:  # an unbuffered write may take only a part
        content = content[file.write(content) :]
