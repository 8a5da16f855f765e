"""Running stages -> one directory of safetensors files, in which each rank has written files of its own.

::

    rank 0   wte h.0 h.1    ->  model-00001-of-00004.safetensors
    rank 1   h.2 h.3 wte    ->  model-00002-of-00004.safetensors     a tie is written once
    rank 2   wte h.0 h.1    ->  model-00003-of-00004.safetensors     replicas share the work: each tensor has one writer
    rank 3   h.2 h.3 wte    ->  model-00004-of-00004.safetensors
    rank 0                  ->  model.safetensors.index.json, last

Every rank knows the names, types and shapes of all, and so makes the same plan. A sharded tensor is gathered when its
turn has come, on all ranks that have a part of it, one after the other. Neighbours: `export.py` does the same with a
checkpoint, in one process; `parallel/pretrained.py` for language models of transformers, whose files are different.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from torchdistpackage.checkpoint.job import config_text
from torchdistpackage.checkpoint.named_model import Named, Stages, in_one_module, named_model
from torchdistpackage.checkpoint.ranks import Ranks
from torchdistpackage.checkpoint.safetensors_directory import (
    ExportReport,
    begin_directory,
    check_target,
    finish_directory,
    unfinished_directory,
)
from torchdistpackage.checkpoint.safetensors_ranks import all_ranks
from torchdistpackage.checkpoint.safetensors_writing import (
    ShardWriter,
    TensorLayout,
    float_type,
    natural_order,
    number_of_bytes,
    plan_shards,
    shard_names,
)
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.needed_tensors import dtype_in_files, torch_dtype
from torchdistpackage.split.decoder.safetensors_header import TensorEntry
from torchdistpackage.split.model_tensors import whole_tensor

__all__ = ["save_safetensors"]


@final
@dataclass(frozen=True)
class _Shards:
    """Who writes what.

    Attributes:
        files: File -> names of its tensors.
        rank_of: File -> the rank that writes it.
        layouts: Name -> type and shape.
    """

    files: Mapping[str, tuple[str, ...]]
    rank_of: Mapping[str, int]
    layouts: Mapping[str, TensorLayout]


@final
@dataclass(frozen=True)
class _Options:
    """Bytes of a file; the floating type, if it is to be another; what becomes config.json."""

    most: int
    dtype: torch.dtype | None
    config: Any


def save_safetensors(
    stages: Stages,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    config: Any = None,
) -> ExportReport:
    """Writes the weights of running stages as one directory of safetensors files. Collective over all ranks.

    Tensors have the names of the whole model: `load_safetensors` reads them into any layout, `model.load_state_dict`
    into the plain model. The directory appears at one moment, whole. For language models of transformers use
    `save_causal_lm`, which writes what `from_pretrained` reads.

    Args:
        stages: This rank's: a module, several, or {stage: module}; plain, wrapped or sharded. Works in one process
            without process groups as well.
        directory: The same on every rank, on a file system that all of them see; absent, empty, or an earlier export.
        max_shard_size: Of the tensors of a file, in bytes or as "5GB"; a larger tensor has a file of its own.
        dtype: To convert floating tensors to, such as "bfloat16"; None leaves them.
        config: A dict that JSON can say, or a configuration of transformers: becomes config.json.

    Raises:
        CheckpointError: The directory holds something else, ranks disagree on a tensor, or writing failed, here or on
            another rank. What was in the directory is as it was.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from safetensors.torch import load_file
        >>> home = tempfile.TemporaryDirectory()
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> save_safetensors(model, f"{home.name}/trained", dtype="bfloat16").files
        ('model.safetensors',)
        >>> {name: tuple(value.shape) for name, value in load_file(f"{home.name}/trained/model.safetensors").items()}
        {'0.bias': (4,), '0.weight': (4, 2), '2.bias': (1,), '2.weight': (1, 4)}
    """
    options = _Options(number_of_bytes(max_shard_size), float_type(dtype), config)
    return _save(stages, Path(directory), options, all_ranks())


def _save(stages: Stages, directory: Path, options: _Options, ranks: Ranks) -> ExportReport:
    mine: list[Named] = []

    def look() -> list[Any]:
        if ranks.rank == 0:
            check_target(directory)
        config_text(options.config)  # raises before anything is written
        mine.extend(named_model(in_one_module(stages)))
        return [_fact(named, options.dtype, ranks.place) for named in mine]

    what = f"{directory} cannot be written"
    shards = _plan(ranks.together(what, look), options.most)
    folder = unfinished_directory(directory)
    ranks.together(what, lambda: str(begin_directory(directory)) if ranks.rank == 0 else None)
    try:
        ranks.together(what, lambda: _see(folder))
        ranks.together(what, lambda: _write(mine, shards, folder, ranks.rank))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    report = ExportReport(
        directory, tuple(shards.files), len(shards.layouts), sum(one.num_bytes for one in shards.layouts.values())
    )

    def finish() -> None:
        if ranks.rank == 0:
            if (text := config_text(options.config)) is not None:
                (folder / "config.json").write_text(text, encoding="utf-8")
            finish_directory(folder, directory, shards.files, {"dtype": _type_name(options.dtype)})

    ranks.together(what, finish)
    return report


def _fact(named: Named, dtype: torch.dtype | None, place: tuple[int, int]) -> list[Any]:
    """What the others are told of a tensor; an expert's place is also that among the ranks that share out experts."""
    layout = TensorLayout(named.tensor.dtype, tuple(named.tensor.shape)).cast(dtype)
    alone = named.is_parameter and not named.tied
    where = [place[0], place[1] if named.expert else 0] if alone else None
    return [named.name, dtype_in_files(layout.dtype, named.name), list(layout.shape), where]


def _plan(facts: Sequence[Sequence[Any]], most: int) -> _Shards:
    """Each tensor to the rank that has it and the fewest bytes so far, and to one of its files. The same on all."""
    found = _layouts(facts)
    load = [0] * len(facts)
    names_of: list[list[str]] = [[] for _ in facts]
    for name in sorted(found, key=natural_order):
        layout, holders = found[name]
        writer = min(holders, key=lambda rank: (load[rank], rank))
        load[writer] += layout.num_bytes
        names_of[writer].append(name)
    shards = [
        (rank, shard)
        for rank, names in enumerate(names_of)
        for shard in plan_shards({name: found[name][0] for name in names}, most)
    ]
    if not shards:
        raise CheckpointError("the stages of all ranks have no tensors, so there is nothing to save")
    files = shard_names(len(shards))
    return _Shards(
        {file: names for file, (_, names) in zip(files, shards, strict=True)},
        {file: rank for file, (rank, _) in zip(files, shards, strict=True)},
        {name: layout for name, (layout, _) in found.items()},
    )


def _layouts(facts: Sequence[Sequence[Any]]) -> dict[str, tuple[TensorLayout, list[int]]]:
    """Name -> what it is, and the ranks that have it; of a buffer, which replicas may differ in, the first one."""
    found: dict[str, tuple[TensorLayout, list[int]]] = {}
    place_of: dict[str, Any] = {}
    for rank, theirs in enumerate(facts):
        for name, dtype, shape, place in theirs:
            layout = TensorLayout(torch_dtype(TensorEntry(dtype, (), 0, 0)), tuple(shape))
            before, holders = found.setdefault(name, (layout, []))
            if before != layout:
                raise CheckpointError(
                    f"{name} is {layout.dtype} {layout.shape} on rank {rank}, and {before.dtype} {before.shape} on "
                    f"rank {holders[0]}: are the stages of one model?"
                )
            if place_of.setdefault(name, place) != place:
                raise CheckpointError(
                    f"{name} is a parameter on rank {holders[0]} (place {place_of[name]}) and on rank {rank} "
                    f"(place {place}), but no tie of the two is known: make stages with a splitter, such as "
                    "flatten_model and partition_chunks, so that layers keep their names in the model"
                )
            if not holders or place is not None:
                holders.append(rank)
    return found


def _see(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}, which rank 0 has made, cannot be seen from here: give a directory on a file system that all "
            "machines share"
        )


def _write(mine: Sequence[Named], shards: _Shards, folder: Path, rank: int) -> None:
    """Writes this rank's files, and takes part in gathering what others write; also when its own files fail."""
    file_of = {name: file for file, names in shards.files.items() if shards.rank_of[file] == rank for name in names}
    cause: Exception | None = None
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as open_files:
        for named in mine:
            whole = whole_tensor(named.tensor.detach())
            file = file_of.get(named.name)
            if file is None or cause is not None:
                continue
            try:
                if file not in writers:
                    layouts = {name: shards.layouts[name] for name in shards.files[file]}
                    writers[file] = ShardWriter(folder / file, layouts)
                    open_files.callback(writers[file].close)
                writers[file].write(named.name, whole)
            except Exception as error:
                cause = error
        if cause is not None:
            raise cause
        for writer in writers.values():
            writer.finish()


def _type_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
