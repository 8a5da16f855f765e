"""What a part on disk says of itself: the JSON file beside its tensors.

::

    bottom.safetensors      tensors, no word about where they belong
    bottom_metadata.json    which layers of which model, its configuration, and a hash of each tensor

The party that gets the two files has nothing else: no other part, no checkpoint. So the file must be enough to build
the part, and to tell a damaged, foreign or mixed-up file before anything is built; every field is checked on reading.
It is written last, and at once, so a part without one is not finished. Plain Python: no torch is needed to look at it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from math import inf, isfinite
from pathlib import Path
from typing import Any, final

from torchdistpackage.errors import CheckpointError

__all__ = ["COMPONENTS", "FORMAT_VERSION", "PartMetadata", "metadata", "metadata_path", "weights_path"]

COMPONENTS = ("bottom", "trunk", "top")
FORMAT_VERSION = 1
_VERSION: str = importlib.import_module(__name__.partition(".")[0]).__version__  # of the root, which imports no room


@final
@dataclass(frozen=True)
class PartMetadata:
    """Everything that is known of a part without its tensors.

    Attributes:
        model_type: As in the configuration, such as "llama".
        component: "bottom", "trunk" or "top".
        start_layer: Its first layer, counted in the whole model.
        end_layer: The layer after its last one.
        total_layers: Of the whole model.
        num_parameters: Of the part: what it trains, in numbers.
        memory_mb: Bytes of its tensors / 2**20.
        dtype: Of its floating tensors, such as "bfloat16".
        config: The whole configuration of the model, as JSON.
        saved_at: When it was written: ISO 8601, UTC.
        sha256: Tensor -> hash of its bytes in the file, 64 hexadecimal digits.
        source: Base name of the directory that it was cut from; "" if there was none.
        names: "checkpoint" when the tensors are named and laid out as in the checkpoint, so that a loader has to
            translate them.
        model_class: Name of the class that reads it; "" for that of the model type.
        library_version: What wrote it.
        format_version: Of this file.
        extra: Keys that this version does not know, or that only one writer needs.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(model_type="llama", to_dict=lambda: {"model_type": "llama"})
        >>> part = metadata("trunk", 2, 10, 12, config, num_parameters=2**20, num_bytes=2**21, dtype="bfloat16")
        >>> part.num_layers, part.memory_mb
        (8, 2.0)
        >>> PartMetadata.from_json(part.to_json()) == part
        True
    """

    model_type: str
    component: str
    start_layer: int
    end_layer: int
    total_layers: int
    num_parameters: int
    memory_mb: float
    dtype: str
    config: Mapping[str, Any]
    saved_at: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    names: str = "checkpoint"
    model_class: str = ""
    library_version: str = _VERSION
    format_version: int = FORMAT_VERSION
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Of this part."""
        return self.end_layer - self.start_layer

    def to_json(self) -> str:
        """The content of the file; keys of `extra` stand beside the others."""
        known = {key: getattr(self, key) for key in _RULES} | {"config": _encoded(self.config)}
        more = {key: value for key, value in self.extra.items() if key not in known}
        return json.dumps(known | more, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file at once: whoever reads it meanwhile sees the old one or the new one, never half of it.

        Args:
            path: Of the JSON file; see `metadata_path`.
        """
        unfinished = Path(f"{os.fspath(path)}.unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    @classmethod
    def from_json(cls, text: str, name: str = "the metadata") -> PartMetadata:
        """Reads the content of a file.

        Args:
            text: As `to_json` made it.
            name: What to call it in errors.

        Raises:
            CheckpointError: It is no JSON object, of a later format, or a field is missing or impossible; the message
                names all such fields.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is no JSON ({error}); get the file again from whoever wrote it") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} holds {type(found).__name__}, not the fields of a part")
        version = found.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{name} has format {version}, written by torchdistpackage {found.get('library_version')}; this is "
                f"{_VERSION}, which reads up to format {FORMAT_VERSION}: install a later one"
            )
        if wrong := _mistakes(found):
            raise CheckpointError(f"{name} does not describe a part: {'; '.join(wrong)}")
        extra = {key: value for key, value in found.items() if key not in _RULES}
        known = {key: found[key] for key in _RULES if key in found and key != "num_layers"}
        return cls(**known | {"config": _decoded(found["config"])}, extra=extra)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PartMetadata:
        """Reads a file.

        Args:
            path: Of the JSON file.

        Raises:
            CheckpointError: It is not there, cannot be read, or see `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(
                f"{os.fspath(path)} is not there: the part was not finished, or only its tensors were sent"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{os.fspath(path)} cannot be read: {error}") from error
        return cls.from_json(text, os.fspath(path))


def metadata(
    component: str,
    start_layer: int,
    end_layer: int,
    total_layers: int,
    config: Any,
    *,
    num_parameters: int,
    num_bytes: int,
    dtype: str,
    sha256: Mapping[str, str] | None = None,
    source: str | os.PathLike[str] = "",
    names: str = "checkpoint",
    model_class: str = "",
    extra: Mapping[str, Any] | None = None,
) -> PartMetadata:
    """Describes a part that is being written now.

    Args:
        component: "bottom", "trunk" or "top".
        start_layer: Its first layer, counted in the whole model.
        end_layer: The layer after its last one.
        total_layers: Of the whole model.
        config: The configuration, of transformers; or anything with `to_dict()`.
        num_parameters: Of the part: what it trains, in numbers.
        num_bytes: Of its tensors.
        dtype: Of its floating tensors, "bfloat16" or "torch.bfloat16".
        sha256: Tensor -> hash of its bytes.
        source: Where it was cut from; only the last piece of the path is kept, because the file leaves this machine.
        names: See `PartMetadata`.
        model_class: See `PartMetadata`.
        extra: More keys for the file.

    Raises:
        CheckpointError: A value is impossible, or the configuration cannot be written as JSON.

    Example: see `PartMetadata`.
    """
    as_text = getattr(config, "to_json_string", None)  # of transformers: it turns types into names, too
    try:
        whole = json.loads(as_text(use_diff=False) if as_text else json.dumps(config.to_dict()))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{type(config).__name__} cannot be written as JSON: {error}") from error
    whole.pop("_name_or_path", None)  # a path of this machine
    part = PartMetadata(
        model_type=str(whole.get("model_type") or getattr(config, "model_type", "")),
        component=component,
        start_layer=start_layer,
        end_layer=end_layer,
        total_layers=total_layers,
        num_parameters=num_parameters,
        memory_mb=num_bytes / 2**20,
        dtype=dtype.removeprefix("torch."),
        config=whole,
        saved_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sha256=dict(sha256 or {}),
        source=Path(os.path.abspath(source)).name if os.fspath(source) else "",
        names=names,
        model_class=model_class,
        extra=dict(extra or {}),
    )
    return PartMetadata.from_json(part.to_json())


def weights_path(directory: str | os.PathLike[str], component: str) -> Path:
    """Where the tensors of a part are.

    Args:
        directory: That of the parts.
        component: "bottom", "trunk" or "top".

    Example:
        >>> weights_path("parts", "top").name
        'top.safetensors'
    """
    return Path(directory, f"{component}.safetensors")


def metadata_path(weights: str | os.PathLike[str]) -> Path:
    """The JSON file beside a part's tensors.

    Args:
        weights: Path of the tensors.

    Example:
        >>> metadata_path("parts/top.safetensors").name
        'top_metadata.json'
    """
    path = Path(weights)
    return path.with_name(f"{path.name.removesuffix('.safetensors')}_metadata.json")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < inf


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        return False
    return True


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in value.values()
    )


def _encoded(value: Any) -> Any:
    """A value in which infinities are written as transformers writes them: JSON has no word for them."""
    if isinstance(value, float) and not isfinite(value):
        return {"__float__": {inf: "Infinity", -inf: "-Infinity"}.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {key: _encoded(each) for key, each in value.items()}
    return [_encoded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format_version": (lambda value: value == FORMAT_VERSION and _is_count(value), str(FORMAT_VERSION)),
    "library_version": (_is_text, "a text"),
    "model_type": (_is_text, "a text"),
    "component": (lambda value: value in COMPONENTS, "bottom, trunk or top"),
    "start_layer": (_is_count, "a number of layers"),
    "end_layer": (_is_count, "a number of layers"),
    "num_layers": (_is_count, "a number of layers"),
    "total_layers": (_is_count, "a number of layers"),
    "num_parameters": (_is_count, "a whole number"),
    "memory_mb": (_is_size, "a number, in units of 2**20 bytes"),
    "dtype": (_is_text, "a text such as bfloat16"),
    "config": (lambda value: isinstance(value, dict), "the fields of the configuration"),
    "saved_at": (_is_time, "a time such as 2025-01-31T12:00:00+00:00"),
    "sha256": (_are_hashes, "64 hexadecimal digits for each tensor"),
    "source": (lambda value: isinstance(value, str), "a text"),
    "names": (_is_text, "a text"),
    "model_class": (lambda value: isinstance(value, str), "a text"),
}
_OPTIONAL = ("model_class",)


def _mistakes(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields, each in a few words."""
    missing = [key for key in _RULES if key not in found and key not in _OPTIONAL]
    wrong = [f"{', '.join(missing)} missing"] if missing else []
    for key, (holds, wanted) in _RULES.items():
        if key in found and not holds(found[key]):
            shown = repr(found[key])
            wrong.append(f"{key} is {shown if len(shown) < 60 else shown[:57] + '...'}, not {wanted}")
    if wrong:
        return wrong
    start, end, count, total = (found[key] for key in ("start_layer", "end_layer", "num_layers", "total_layers"))
    if not start <= end <= total or count != end - start:
        wrong.append(f"layers {start} to {end} of {total} are not {count} layers")
    edges = {"bottom": (start, 0, "begins"), "top": (end, total, "ends")}
    there, expected, verb = edges.get(found["component"], (0, 0, ""))
    if there != expected:
        wrong.append(f"the {found['component']} {verb} at layer {there}, not at {expected}")
    return wrong
