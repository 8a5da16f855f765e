"""Weights of a checkpoint -> the files of a language model of transformers, a few layers at a time.

What `from_pretrained` reads is not always what the modules hold: experts are single in the files and stacked in the
model, fused projections are apart. transformers' `save_pretrained` knows the way back, for a model that is in memory.
So the model is made on the meta device and cut into stages as large as a file, and one is filled at a time::

    config.json  -->  meta model  -->  | layers 0-3 | 4-7 | 8-11, head |      plan_shards over the layers
                                             |
                  StoredModel.read  -->  filled  -->  save_stage  -->  model-00001-of-00003.safetensors
                                             |
                                          emptied, next

The memory that is needed is that of one stage, and more where transformers converts what is in it. Neighbours:
`export.py` decides; `split/decoder/pretrained_saving.py` writes the same stages from a pipeline that runs.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.checkpoint.safetensors_source import StoredModel
from torchdistpackage.checkpoint.safetensors_writing import TensorLayout, plan_shards, shard_names
from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.find import find_layout
from torchdistpackage.split.decoder.needed_tensors import quiet
from torchdistpackage.split.decoder.pretrained import read_config, without_weights
from torchdistpackage.split.decoder.pretrained_saving import StageFiles, save_stage
from torchdistpackage.split.decoder.weight_files import listed, need_transformers
from torchdistpackage.split.ties import ties_in

__all__ = ["causal_lm_of", "write_causal_lm"]

_logger = logging.getLogger(__name__)


def causal_lm_of(stored: StoredModel) -> Any:
    """The model on the meta device, if the checkpoint is one of a causal language model of transformers; else None.

    Its configuration says which class, and the names of the tensors must be the names of that class: a model with
    another head, or with adapters, keeps its own names.

    Args:
        stored: The weights.

    Raises:
        ModuleNotFoundError: The configuration is one of transformers, which is not installed; names the extra.
        CheckpointError: Shapes are not those of the configuration.

    Example: see `export_safetensors`.
    """
    path = stored.folder / "config.json"
    said = _json(path)
    if "model_type" not in said or "transformers_version" not in said or "auto_map" in said:
        return None
    need_transformers()
    from transformers import AutoModelForCausalLM

    config = read_config(os.fspath(stored.folder))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    model = without_weights(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if strange := {name for name in wanted if stored.name_of(name) is None} | {*stored.layouts} - {*wanted}:
        _logger.warning(
            "%s is not written in the layout of %s, but under its own names: %s are in one of the two only",
            stored.folder,
            type(model).__name__,
            listed(strange),
        )
        return None
    for name, shape in wanted.items():
        layout = stored.layouts[stored.name_of(name) or name]
        if layout.shape != shape:
            raise CheckpointError(f"{name} is {layout.shape} in {stored.folder}, and {shape} by its config.json")
    return model


def write_causal_lm(
    model: Any, stored: StoredModel, folder: Path, most: int, dtype: torch.dtype | None
) -> dict[str, tuple[str, ...]]:
    """Writes the safetensors files, config.json and generation_config.json into an empty folder.

    Args:
        model: From `causal_lm_of`.
        stored: The weights.
        folder: The folder.
        most: Bytes of a file.
        dtype: To convert floating tensors to.

    Returns:
        File -> names of its tensors.

    Raises:
        CheckpointError: Tensors cannot be read or written, or a tie of the configuration is none in the weights.

    Example: see `export_safetensors`.
    """
    parts = _stages(model, stored, most, dtype)
    pieces: list[StageFiles] = []
    for stage, part in parts.items():
        with quiet():
            part.load_state_dict(_state(part, stage, stored, dtype), assign=True)
            piece = save_stage(part, folder, stage, len(parts), max_shard_size=most)
        assert piece is not None
        part.to("meta")
        _give_back()
        pieces.append(piece)
    return _moved(folder, pieces)


def _give_back() -> None:
    """Returns freed memory to the system, where the C library has a call for that.

    It keeps freed blocks of up to 32 MiB, and among small ones that stay they become gaps: without this, 1.1 GB that go
    through in stages of 0.13 GB leave 0.9 GB of them.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _stages(model: Any, stored: StoredModel, most: int, dtype: torch.dtype | None) -> Mapping[int, nn.Module]:
    """The model as stages whose weights fit a file, if that can be: a layer is not cut."""
    try:
        layout = find_layout(model)
    except SplitError as error:
        _logger.warning("%s is written as a whole, in memory: %s", type(model).__name__, error)
        return {0: model}
    last = layout.num_layers - 1
    sizes = [0] * layout.num_layers
    place_of = {name: min(place, last) for place, name in enumerate(layout.row)}
    place_of |= dict.fromkeys(layout.prologue, 0) | dict.fromkeys(layout.idle, last)
    for unit, place in place_of.items():
        names = {stored.name_of(f"{unit}.{name}") for name in model.get_submodule(unit).state_dict()}
        sizes[place] += sum(stored.layouts[name].cast(dtype).num_bytes for name in names if name is not None)
    layers = {str(place): TensorLayout(torch.uint8, (size,)) for place, size in enumerate(sizes)}
    cuts = [int(shard[0]) for shard in plan_shards(layers, most)]
    return split_causal_lm(model, len(cuts), cut_points=cuts[1:])


def _state(part: nn.Module, stage: int, stored: StoredModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights of a stage; one tensor for all names of a tie, and no memory for those of an earlier stage."""
    elsewhere = {name: tie for name, tie in ties_in(part).items() if stage != tie.stages[0]}
    made: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    groups: dict[int, str] = {}  # a tensor of the meta model -> the name by which it is kept
    for name, tensor in part.state_dict(keep_vars=True).items():
        kept = stored.name_of(name)
        assert kept is not None  # causal_lm_of has looked
        if name in elsewhere:
            _check_tie(stored, stored.name_of(elsewhere[name].name), kept)
            state[name] = torch.empty_like(tensor, device="meta")
            continue
        first = groups.setdefault(id(tensor), kept)
        _check_tie(stored, first, kept)
        if first not in made:
            made[first] = stored.read(first, dtype)
        state[name] = made[first]
    return state


def _check_tie(stored: StoredModel, first: str | None, kept: str) -> None:
    """Two names of one parameter may be kept apart, by a run that did not tie them; then they must be equal."""
    if first is not None and first != kept and not torch.equal(stored.read(first), stored.read(kept)):
        raise CheckpointError(
            f"the configuration ties {kept} to {first}, but {stored.folder} holds different values of the two: write "
            '"tie_word_embeddings": false into its config.json'
        )


def _moved(folder: Path, pieces: list[StageFiles]) -> dict[str, tuple[str, ...]]:
    """The stages' files, one row of numbers for all, and what the first stage has besides."""
    old = [(piece, file) for piece in pieces for file in sorted({*piece.weight_map.values()})]
    files: dict[str, tuple[str, ...]] = {}
    for (piece, file), name in zip(old, shard_names(len(old)), strict=True):
        os.replace(folder / piece.folder / file, folder / name)
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())
        files[name] = tuple(tensor for tensor, place in piece.weight_map.items() if place == file)
    for piece in pieces:
        for path in (folder / piece.folder).iterdir():
            if piece is pieces[0]:
                os.replace(path, folder / path.name)
            else:
                path.unlink()
        (folder / piece.folder).rmdir()
    return files


def _json(path: Path) -> Mapping[str, Any]:
    """What a configuration says; nothing where there is none, or it is no dict."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
