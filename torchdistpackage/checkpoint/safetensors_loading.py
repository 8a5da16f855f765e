"""Safetensors files -> running stages: each rank reads its own tensors, and of a sharded one its own rows.

::

    model-00001-of-00002.safetensors   wte  h.0  h.1        rank 0: wte h.0 h.1         rank 1: h.2 h.3 ln_f
    model-00002-of-00002.safetensors   h.2  h.3  ln_f       fully_shard over 2: of each the first, or the second half

Names and shapes are checked on all ranks before anything is read; so a model is never filled by half because its files
were of another one. Neighbours: `parts.py` says which part of a tensor is here; `split/decoder/pretrained.py` is for
language models of transformers, whose files have other names and layouts than the modules.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from torchdistpackage.checkpoint.named_model import Named, Stages, in_one_module, named_model
from torchdistpackage.checkpoint.parts import parts_of
from torchdistpackage.checkpoint.ranks import Ranks
from torchdistpackage.checkpoint.safetensors_ranks import all_ranks
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.needed_tensors import torch_dtype
from torchdistpackage.split.decoder.safetensors_header import TensorEntry, read_header
from torchdistpackage.split.decoder.weight_files import WeightFiles, listed

__all__ = ["LoadedNames", "load_safetensors"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class _Match:
    """A tensor of this rank, and the name that it has in the files; None if it is not there."""

    files: WeightFiles
    named: Named
    name: str | None


@final
@dataclass(frozen=True)
class LoadedNames:
    """What did not meet.

    Attributes:
        missing: Names of this rank's tensors that no file has; they were left as they are. Empty if strict.
        unused: Names in the files that no rank has.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import save_safetensors
        >>> home = tempfile.TemporaryDirectory()
        >>> _ = save_safetensors(nn.Linear(2, 3, bias=False), f"{home.name}/trained")
        >>> load_safetensors(f"{home.name}/trained", nn.Linear(2, 3), strict=False)
        LoadedNames(missing=('bias',), unused=())
    """

    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_safetensors(source: str | os.PathLike[str], stages: Stages, *, strict: bool = True) -> LoadedNames:
    """Fills stages from safetensors files, by the names of the whole model. Collective over all ranks.

    Files of any layout will do: those of `export_safetensors` or `save_safetensors`, of a vision model on the hub, or
    of the plain model's state dict. Call it before you make an optimizer that keeps copies of the weights. For language
    models of transformers use `load_causal_lm`, which knows how their files differ from their modules.

    Args:
        source: A directory with model.safetensors or its index, or one safetensors or index file.
        stages: This rank's: a module, several, or {stage: module}; plain, wrapped or sharded. Works in one process
            without process groups as well.
        strict: Raise if a tensor is in no file; else it is left as it is, and named in what is returned. Names that
            only the files have are a warning in the log.

    Raises:
        CheckpointError: Names are missing, shapes differ, or files cannot be read, here or on another rank. If names or
            shapes are wrong, nothing was changed.
        ModuleNotFoundError: safetensors is not installed; the message names the extra.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage import flatten_model, partition_uniform
        >>> from torchdistpackage.checkpoint import save_safetensors
        >>> def layers():
        ...     model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        ...     return flatten_model(model, ["0", "1", "2"], return_list=True)
        >>> home, trained = tempfile.TemporaryDirectory(), layers()
        >>> _ = save_safetensors(trained, f"{home.name}/trained")
        >>> stages = {s: nn.Sequential(*partition_uniform(layers(), num_stages=2, stage=s)) for s in (0, 1)}
        >>> load_safetensors(f"{home.name}/trained", stages)
        LoadedNames(missing=(), unused=())
        >>> bool((stages[1][0].weight == trained[2].weight).all())
        True
    """
    _need_safetensors()
    return _load(Path(source), stages, strict, all_ranks())


def _load(source: Path, stages: Stages, strict: bool, ranks: Ranks) -> LoadedNames:
    matches: list[_Match] = []
    in_files: set[str] = set()

    def look() -> list[str]:
        files = _open(source)
        in_files.update(files.file_of)
        for named in named_model(in_one_module(stages)):
            name = next((name for name in named.names if name in files.file_of), None)
            matches.append(_Match(files, named, name))
        missing = [match.named.name for match in matches if match.name is None]
        if missing and strict:
            raise CheckpointError(
                f"{source} has {len(files.file_of)} tensors, but not {listed(missing)}; is it of this model? A "
                "language model of transformers is loaded by load_causal_lm; strict=False leaves what is missing"
            )
        _check_fit([match for match in matches if match.name is not None])
        return sorted({name for match in matches for name in match.named.names} & in_files)

    used = {name for names in ranks.together(f"{source} cannot be loaded", look) for name in names}
    ranks.together(f"{source} cannot be read", lambda: _read(matches))
    unused = tuple(sorted(in_files - used))
    if unused and ranks.rank == 0:
        _logger.warning("%s holds %d tensors that no stage has: %s", source, len(unused), listed(unused))
    return LoadedNames(tuple(match.named.name for match in matches if match.name is None), unused)


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "safetensors files need safetensors: pip install 'torchdistpackage[hf]'", name=error.name
        ) from None


def _open(source: Path) -> WeightFiles:
    if source.is_file():
        return WeightFiles(os.fspath(source.parent), source.name)
    if not source.is_dir():
        raise CheckpointError(f"{source} is neither a directory nor a file here; if it is on the hub, fetch it first")
    return WeightFiles(os.fspath(source))


def _check_fit(matches: Iterable[_Match]) -> None:
    """Raises unless all tensors can take what is in the files, of which only the headers are read."""
    headers: dict[str, Mapping[str, TensorEntry]] = {}
    wrong: list[str] = []
    for match in matches:
        name, tensor, file = match.name or "", match.named.tensor, match.files.file_of[match.name or ""]
        if file not in headers:
            headers[file] = read_header(Path(match.files.name, file)).tensors
        if name not in headers[file]:
            raise CheckpointError(f"the index says that {name} is in {file}, which does not have it; fetch both again")
        entry = headers[file][name]
        if entry.shape != tuple(tensor.shape):
            wrong.append(f"{name} is {entry.shape} in the files and {tuple(tensor.shape)} in the stage")
        elif torch_dtype(entry).is_floating_point != tensor.dtype.is_floating_point:
            wrong.append(f"{name} is {torch_dtype(entry)} in the files and {tensor.dtype} in the stage")
    if wrong:
        raise CheckpointError(f"it does not fit, nothing was loaded: {listed(wrong)}")


@torch.no_grad()
def _read(matches: Iterable[_Match]) -> None:
    """Copies what this rank has of each tensor out of its file; no other bytes are read."""
    for match in matches:
        for part in parts_of(match.name, match.named.tensor) if match.name is not None else ():
            if part.box.numel:
                rows = tuple(slice(a, a + n) for a, n in zip(part.box.offsets, part.box.sizes, strict=True))
                values = match.files.read(part.key, rows or ...)
                match.files.check()  # else what could not be read is empty
                part.tensor.copy_(values)
