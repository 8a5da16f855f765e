"""`manifest.json`: what is in a checkpoint, and by which bytes one knows that it is whole.

Plain JSON, so that a checkpoint can be listed, checked and described without torch, ranks or unpickling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, final

from torchdistpackage.errors import CheckpointError

__all__ = ["FORMAT", "MANIFEST", "VERSION", "FileFacts", "Manifest", "TensorFacts", "manifest_text", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT = "torchdistpackage checkpoint"
VERSION = 1


@final
@dataclass(frozen=True)
class FileFacts:
    """One file.

    Attributes:
        nbytes: Its size.
        sha256: In hexadecimal digits.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer, inspect_checkpoint
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3), config={"width": 2}).save(1)
        >>> files = inspect_checkpoint(f"{run.name}/step-00000001").files
        >>> files["config.json"].nbytes, len(files["config.json"].sha256)
        (16, 64)
    """

    nbytes: int
    sha256: str


@final
@dataclass(frozen=True)
class TensorFacts:
    """One tensor.

    Attributes:
        dtype: As "float32".
        shape: Of the whole tensor.
        nbytes: Of the whole tensor.

    Example:
        >>> TensorFacts("bfloat16", (3, 2), 12).numel
        6
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@final
@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint.

    Attributes:
        step: Its number.
        time: When it was written, in seconds since 1970.
        layout: The ranks that wrote it, in words.
        torch: Version.
        files: By name, without the manifest.
        tensors: By key.
        aliases: Name of a parameter that has several -> all of its names.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer, inspect_checkpoint
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3)).save(120)
        >>> manifest = inspect_checkpoint(f"{run.name}/step-00000120")
        >>> manifest.step, manifest.layout, manifest.parameters, manifest.tensors["model.weight"]
        (120, '1 process', 9, TensorFacts(dtype='float32', shape=(3, 2), nbytes=24))
    """

    step: int
    time: float
    layout: str
    torch: str
    files: Mapping[str, FileFacts]
    tensors: Mapping[str, TensorFacts]
    aliases: Mapping[str, tuple[str, ...]]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def parameters(self) -> int:
        """Elements of the model, its buffers included."""
        return sum(one.numel for key, one in self.tensors.items() if key.startswith("model."))


def manifest_text(manifest: Manifest) -> str:
    """As JSON."""
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": manifest.step,
            "time": manifest.time,
            "layout": manifest.layout,
            "torch": manifest.torch,
            "totals": {
                "tensors": len(manifest.tensors),
                "parameters": manifest.parameters,
                "bytes": manifest.nbytes,
            },
            "files": {name: {"bytes": one.nbytes, "sha256": one.sha256} for name, one in manifest.files.items()},
            "aliases": {name: list(names) for name, names in manifest.aliases.items()},
            "tensors": {key: [one.dtype, list(one.shape), one.nbytes] for key, one in manifest.tensors.items()},
        },
        indent=1,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or it is not of this library, or of another version of the format.
    """
    try:
        found: Any = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST}, so it was not finished") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{MANIFEST} is not of a checkpoint of this library")
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"it has version {found.get('version')!r} of the format, and this library reads version {VERSION}; load it "
            "with the version of torchdistpackage that has written it"
        )
    try:
        return Manifest(
            step=int(found["step"]),
            time=float(found["time"]),
            layout=str(found["layout"]),
            torch=str(found["torch"]),
            files={name: FileFacts(int(one["bytes"]), str(one["sha256"])) for name, one in found["files"].items()},
            tensors={
                key: TensorFacts(str(dtype), tuple(shape), int(nbytes))
                for key, (dtype, shape, nbytes) in found["tensors"].items()
            },
            aliases={name: tuple(names) for name, names in found["aliases"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error
