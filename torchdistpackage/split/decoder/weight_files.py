"""The tensors of a Hugging Face directory, each read from its file when it is asked for, and not before.

::

    config.json                         what the model is
    model.safetensors                   all tensors, or
    model.safetensors.index.json        tensor -> file
    model-00001-of-00003.safetensors    a file is opened when the first of its tensors is read,
    model-00002-of-00003.safetensors    so files that hold nothing for this stage may be absent
    model-00003-of-00003.safetensors

The loader of transformers is handed a `LazyTensor` for each name: it renames and converts by name, and reads what it
needs by `tensor[...]`, as it does with safetensors' own slices. What cannot be read is remembered here with its file,
because the loader would stop at the first, with a stack trace. `pretrained.py` is the user.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch

from torchdistpackage.errors import CheckpointError

__all__ = ["INDEX", "SINGLE", "LazyTensor", "WeightFiles", "find", "has_pickled_weights", "listed", "need_transformers"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@final
class WeightFiles:
    """The safetensors files of a directory or of a model on the hub; a context manager that closes them.

    Args:
        source: The directory, or a name that transformers knows.
        explicit: Name of the weight or index file where the configuration gives one (`transformers_weights`).

    Raises:
        CheckpointError: There are no safetensors files, or the index or the single file cannot be read.
    """

    def __init__(self, source: str, explicit: str | None = None) -> None:
        self.name = source
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()  # the loader reads in several threads
        self._failed: dict[str, tuple[str, set[str]]] = {}  # file -> why, and the tensors that were wanted of it
        self.file_of = self._map(explicit)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()

    def tensors(self) -> dict[str, LazyTensor]:
        """Name in the files -> what reads it by `[...]`."""
        return {name: LazyTensor(self, name) for name in self.file_of}

    def are_one(self, name: str, other: str) -> bool:
        """Whether two names are known to be of one tensor: files hold a tensor under one name."""
        return False

    def generation_config(self) -> Any:
        """That of the directory, or None."""
        from transformers import GenerationConfig

        there = find(self.name, "generation_config.json") is not None
        return GenerationConfig.from_pretrained(self.name) if there else None

    def read(self, name: str, part: Any = ...) -> torch.Tensor:
        """A tensor or a slice of it, on the CPU; only these bytes are read. What fails is said by `check`."""
        file = self.file_of[name]
        try:
            tensor: torch.Tensor = self._handle(file).get_slice(name)[part]
        except Exception as error:  # safetensors' own error has no public name in some versions
            with self._lock:
                self._failed.setdefault(file, (str(error), set()))[1].add(name)
            return torch.empty(0)  # the loader goes on, so that all failures are found
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor has in its file."""
        has_rows = bool(self._handle(self.file_of[name]).get_slice(name).get_shape())
        return self.read(name, slice(0, 0) if has_rows else ...).dtype  # of rows no bytes are read

    def float_dtype(self) -> torch.dtype:
        """The type of the first floating tensor of the first file that is there; float32 where there is none."""
        for name, file in sorted(self.file_of.items(), key=lambda item: item[1]):
            if find(self.name, file) is not None:
                dtype = self.dtype(name)
                if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                    return dtype
        return torch.float32

    def check(self) -> None:
        """Raises what went wrong while reading, if anything did.

        Raises:
            CheckpointError: Names the files, the tensors that were wanted of each, and why it failed.
        """
        failed = [f"{file} ({why}), wanted for {listed(names)}" for file, (why, names) in self._failed.items()]
        if failed:
            raise CheckpointError(f"{self.name} cannot be loaded: {'; '.join(failed)}")

    def _map(self, explicit: str | None) -> Mapping[str, str]:
        candidates = [explicit] if explicit else [SINGLE, INDEX]
        for file in candidates:
            path = find(self.name, file)
            if path is not None and file.endswith(".index.json"):
                return _weight_map(path)
            if path is not None:
                try:
                    return dict.fromkeys(self._handle(file).keys(), file)
                except Exception as error:
                    raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
        if any(find(self.name, file) for file in _PICKLED):
            raise CheckpointError(
                f"{self.name} has its weights in pytorch_model.bin, of which no part can be read without the rest; "
                "convert it once: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)"
            )
        raise CheckpointError(f"{self.name} has no weights: neither {' nor '.join(candidates)} is there")

    def _handle(self, file: str) -> Any:
        from safetensors import safe_open

        with self._lock:
            if file not in self._open:
                path = find(self.name, file)
                if path is None:
                    raise FileNotFoundError("the file is not there")
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            return self._open[file]


@final
class LazyTensor:
    """A tensor that is in a file: `tensor[...]` reads it."""

    def __init__(self, files: WeightFiles, name: str) -> None:
        self._files = files
        self._name = name

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self._files.read(self._name, part)


def need_transformers() -> None:
    """Says what to install where transformers or safetensors is not there, or too old.

    Raises:
        ModuleNotFoundError: One is not installed; the message names the extra.
        CheckpointError: transformers is older than version 5.
    """
    try:
        import safetensors  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Hugging Face directories need transformers and safetensors: pip install 'torchdistpackage[hf]'",
            name=error.name,
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load a part of a model; install transformers 5 or later"
        )


def find(source: str, file: str) -> str | None:
    """Path of a file of a directory, or of a model on the hub or in its cache; None when it is not there.

    Raises:
        CheckpointError: The source is neither a directory nor a model that can be had.
    """
    if os.path.isdir(source):
        path = os.path.join(source, file)
        return path if os.path.isfile(path) else None
    from transformers.utils.hub import cached_file

    try:
        found: str | None = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is not a directory, and no model of that name can be had: {error}") from error
    return found


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a sentence."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _weight_map(path: str) -> dict[str, str]:
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files ({type(error).__name__}: {error})") from error


def has_pickled_weights(source: str) -> bool:
    """Whether the weights of a model are in pickled files alone, which cannot be read in parts."""
    return not any(find(source, file) for file in (SINGLE, INDEX)) and any(find(source, file) for file in _PICKLED)
