"""Stages to a Hugging Face directory, in two steps, so that a save that is cut short is not taken for a checkpoint.

::

    stage 0    directory/stage-0-of-2.unfinished/   config.json, its shards     save_stage, each process its own
    stage 1    directory/stage-1-of-2.unfinished/   config.json, its shards
                          |
                          |  moved, when all are there                         write_index, one process
                          v
    directory/    config.json, generation_config.json
                  model-stage0-00001-of-00001.safetensors
                  model-stage1-00001-of-00001.safetensors
                  model.safetensors.index.json                               last

The shards are written by transformers' own `save_pretrained`, which turns names and layouts back into those of the
files. Neighbour: `pretrained.py` is the way in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.part import shallow_copy, unwrapped
from torchdistpackage.split.decoder.safetensors_header import read_header
from torchdistpackage.split.decoder.weight_files import INDEX, SINGLE, listed, need_transformers
from torchdistpackage.split.model_tensors import whole_tensor
from torchdistpackage.split.ties import ties_in

__all__ = ["StageFiles", "save_stage", "write_index"]


@dataclass(frozen=True)
class StageFiles:
    """What `save_stage` wrote; it can be pickled and sent to the process that calls `write_index`.

    Attributes:
        stage: Global index of the stage.
        num_stages: Of the pipeline.
        folder: Where the files are until `write_index` puts them in place, below the directory.
        weight_map: Name of each tensor on disk -> its file.
        total_size: Bytes of all tensors.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> from torchdistpackage.split import split_causal_lm
        >>> piece = save_stage(split_causal_lm(model, 2, [1])[1], home.name, 1, 2)
        >>> piece.folder, piece.weight_map["transformer.ln_f.bias"], piece.total_size
        ('stage-1-of-2.unfinished', 'model-stage1-00001-of-00001.safetensors', 7040)
    """

    stage: int
    num_stages: int
    folder: str
    weight_map: Mapping[str, str]
    total_size: int


def save_stage(
    part: nn.Module,
    directory: str | os.PathLike[str],
    stage: int,
    num_stages: int,
    *,
    max_shard_size: int | str = "5GB",
    writes: bool = True,
) -> StageFiles | None:
    """Writes the weights of one stage, under the names of the whole model, next to a directory's present content.

    What the directory holds stays as it is, and whole, until `write_index` is called.

    Args:
        part: Made by `split_causal_lm` or `load_stages`, also wrapped in DistributedDataParallel.
        directory: The same for all stages, on a file system that all processes see.
        stage: Its global index.
        num_stages: Of the pipeline.
        max_shard_size: Of a file, in bytes or as "5GB".
        writes: False on the other replicas of a stage, where only the weights that it holds for the first one (those
            of `fully_shard`) are wanted.

    Returns:
        What `write_index` needs of every stage; None if it does not write.

    Raises:
        CheckpointError: The part is not a model of transformers, or the directory is a file.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> from torchdistpackage.split import split_causal_lm
        >>> parts = split_causal_lm(model, 2)  # in training each process has its own stages only
        >>> pieces = [save_stage(part, home.name, stage, 2) for stage, part in parts.items()]
        >>> sorted(path.name for path in Path(home.name).iterdir())
        ['stage-0-of-2.unfinished', 'stage-1-of-2.unfinished']
    """
    need_transformers()
    model: Any = unwrapped(part)
    if not hasattr(model, "save_pretrained"):
        raise CheckpointError(f"{type(part).__name__} is not a part of a transformers model: it has no save_pretrained")
    if os.path.isfile(directory):
        raise CheckpointError(f"{os.fspath(directory)} is a file; give a directory")
    folder = Path(directory, f"stage-{stage}-of-{num_stages}.unfinished")
    elsewhere = {name for name, tie in ties_in(model).items() if stage != tie.stages[0]}
    state = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items() if name not in elsewhere}
    if not writes:
        return None
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
    saver: Any = shallow_copy(model)
    vars(saver)["should_save_on_this_rank"] = lambda *args, **kwargs: True  # else only the first process of all writes
    saver.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    files = _renamed(folder, stage, num_stages)
    if state and not files.weight_map:
        raise CheckpointError(f"stage {stage} has {len(state)} tensors, and transformers wrote none into {folder}")
    return files


def write_index(directory: str | os.PathLike[str], pieces: Sequence[StageFiles]) -> None:
    """Makes the files that `save_stage` wrote a checkpoint that `from_pretrained` loads; call it on one process.

    The index is written last: a save that was cut short leaves the earlier checkpoint, or no index, but never a mixture
    that loads.

    Args:
        directory: As for `save_stage`.
        pieces: What `save_stage` returned, of all stages in any order.

    Raises:
        CheckpointError: Stages are missing or there twice, or their files cannot be seen from here; then nothing was
            changed.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> from torchdistpackage.split import split_causal_lm
        >>> parts = split_causal_lm(model, 2)
        >>> write_index(home.name, [save_stage(part, home.name, stage, 2) for stage, part in parts.items()])
        >>> loaded = AutoModelForCausalLM.from_pretrained(home.name).state_dict()
        >>> all(bool((value == loaded[name]).all()) for name, value in model.state_dict().items())
        True
    """
    home = Path(directory)
    pieces = sorted(pieces, key=lambda piece: piece.stage)
    _check_pieces(home, pieces)
    before = {SINGLE, INDEX, *_files_of_index(home / INDEX)}
    (home / INDEX).unlink(missing_ok=True)
    (home / SINGLE).unlink(missing_ok=True)  # from_pretrained would take it for the whole
    weight_map: dict[str, str] = {}
    for piece in pieces:
        files = set(piece.weight_map.values())
        if piece.stage == 0:  # config.json, generation_config.json and the model's own code are the same in all
            files = {path.name for path in (home / piece.folder).iterdir() if path.is_file()}
        for file in files:
            os.replace(home / piece.folder / file, home / file)
        weight_map = {**piece.weight_map, **weight_map}
    index = {"metadata": {"total_size": sum(piece.total_size for piece in pieces)}, "weight_map": weight_map}
    unfinished = home / f"{INDEX}.unfinished"
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, home / INDEX)
    for file in before - {INDEX, *weight_map.values()}:
        (home / file).unlink(missing_ok=True)
    for piece in pieces:
        shutil.rmtree(home / piece.folder, ignore_errors=True)


def _renamed(folder: Path, stage: int, num_stages: int) -> StageFiles:
    """Gives the shards of a folder the stage's names; they match what `save_pretrained` clears away later."""
    shards = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-stage{stage}-{number:05d}-of-{len(shards):05d}.safetensors"
        header = read_header(shard)
        weight_map.update(dict.fromkeys(header.tensors, file))
        size += header.num_tensor_bytes
        shard.rename(folder / file)
    (folder / INDEX).unlink(missing_ok=True)
    return StageFiles(stage, num_stages, folder.name, weight_map, size)


def _check_pieces(home: Path, pieces: Sequence[StageFiles]) -> None:
    have = [piece.stage for piece in pieces]
    if {piece.num_stages for piece in pieces} != {len(pieces)} or have != list(range(len(pieces))):
        said = sorted({piece.num_stages for piece in pieces})
        raise CheckpointError(f"pieces of the stages {have} are not those of all {said} stages, each once")
    for piece in pieces:
        lost = {file for file in piece.weight_map.values() if not (home / piece.folder / file).is_file()}
        if lost:
            raise CheckpointError(
                f"stage {piece.stage} wrote {listed(lost)}, but {home / piece.folder} does not have it here; give all "
                "stages the same directory, on a file system that all machines share"
            )


def _files_of_index(path: Path) -> set[str]:
    """The files of an earlier checkpoint; of an index that cannot be read nothing is known."""
    try:
        return {Path(file).name for file in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
