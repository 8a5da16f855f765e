"""Which bytes of a checkpoint go into which part: found from config.json and the headers of its files alone.

::

    config.json  -->  the model on the meta device  -->  cut at 2, 10  -->  a part without weights
    headers      -->  where each tensor is  ------------------------------>  which of them it reads  -->  PartPlan

All that can be wrong with a checkpoint except its values is found here, before anything is written.
`checkpoint_split.py` carries the plan out.
"""

from __future__ import annotations

import gc
import json
import logging
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.needed_tensors import needed_tensors, torch_dtype
from torchdistpackage.split.decoder.pretrained import read_config, without_weights
from torchdistpackage.split.decoder.safetensors_header import SafetensorsHeader, read_header
from torchdistpackage.split.decoder.stage_forward import STAGE
from torchdistpackage.split.decoder.weight_files import SINGLE, WeightFiles, find, listed, need_transformers
from torchdistpackage.split.parts.configuration import num_layers_of
from torchdistpackage.split.parts.metadata import COMPONENTS
from torchdistpackage.split.parts.safetensors_copy import Piece, hash_of

__all__ = ["PartPlan", "SplitPlan", "plan_split"]

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class PartPlan:
    """What a part is made of.

    Attributes:
        component: "bottom", "trunk" or "top".
        start_layer: Its first layer, counted in the whole model.
        end_layer: The layer after its last one.
        num_parameters: Of the part as a module, each once.
        pieces: Name in the checkpoint -> where the tensor is.
    """

    component: str
    start_layer: int
    end_layer: int
    num_parameters: int
    pieces: Mapping[str, Piece]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(piece.entry.num_bytes for piece in self.pieces.values())


@final
@dataclass(frozen=True)
class SplitPlan:
    """How a checkpoint is split.

    Attributes:
        directory: Where it is.
        config: Its configuration, of transformers.
        cut_points: Layers at which trunk and top begin.
        total_layers: Of the model.
        dtype: In which the parts compute: what the configuration says, else what the files have.
        files: Name of each file -> (bytes, time of its last change in ns).
        parts: Bottom, trunk and top.
        generation_config: What generation_config.json says; None where there is none.
    """

    directory: Path
    config: Any
    cut_points: tuple[int, int]
    total_layers: int
    dtype: torch.dtype
    files: Mapping[str, tuple[int, int]]
    parts: tuple[PartPlan, ...]
    generation_config: Mapping[str, Any] | None


def plan_split(
    directory: str | os.PathLike[str], cut_points: Sequence[int], *, trust_remote_code: bool = False
) -> SplitPlan:
    """Plans to split a checkpoint; reads config.json and the headers of the files, and writes nothing.

    Args:
        directory: Where `save_pretrained` wrote, or what the hub gave.
        cut_points: Layers at which trunk and top begin.
        trust_remote_code: As for `from_pretrained`.

    Raises:
        SplitError: The model cannot be cut there; the message says how many layers it has.
        CheckpointError: The checkpoint is incomplete or broken, or not in safetensors files; the message names files
            and tensors.
        ModuleNotFoundError: transformers or safetensors is not installed; the message names the extra.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(home.name)
        >>> [(part.component, part.end_layer, part.num_bytes) for part in plan_split(home.name, [1, 3]).parts]
        [('bottom', 1, 36576), ('trunk', 3, 6976), ('top', 4, 3872)]
    """
    need_transformers()
    points = _points(cut_points)
    source = os.fspath(directory)
    if not os.path.exists(source):
        raise CheckpointError(f"{source} is not there; give the directory that holds config.json and the weights")
    config = read_config(source, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} holds quantized weights, which parts cannot be made of; split the originals")
    _check_points(points, num_layers_of(config))
    file_of = _files(source, getattr(config, "transformers_weights", None))
    headers = _headers(source, file_of)
    dtype = getattr(config, "dtype", None) or _float_dtype(file_of, headers)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    pieces = {name: Piece(Path(source, file), headers[file].tensors[name]) for name, file in file_of.items()}
    parts = []
    for stage in range(len(COMPONENTS)):
        parts.append(_part_plan(source, config, dtype, stage, points, pieces, trust_remote_code))
        gc.collect()  # models are cycles: the next one is to have the memory of this one, 10 MB for 22 layers
    if unused := pieces.keys() - {name for part in parts for name in part.pieces}:
        _logger.warning("%s holds tensors that no part needs, and that are left out: %s", source, listed(unused))
    stats = {file: os.stat(Path(source, file)) for file in sorted(headers)}
    return SplitPlan(
        directory=Path(source),
        config=config,
        cut_points=(points[0], points[1]),
        total_layers=parts[-1].end_layer,
        dtype=dtype,
        files={file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()},
        parts=tuple(parts),
        generation_config=_generation_config(source),
    )


def _generation_config(source: str) -> Mapping[str, Any] | None:
    path = find(source, "generation_config.json")
    if path is None:
        return None
    try:
        found: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again, or delete it") from error
    return found


def _points(cut_points: Sequence[int]) -> list[int]:
    try:
        points = [operator.index(point) for point in cut_points]
    except TypeError:
        points = []
    if len(points) != len(COMPONENTS) - 1:
        raise SplitError(f"two layers say where trunk and top begin, such as 2, 10; got {cut_points!r}")
    return points


def _check_points(points: Sequence[int], layers: int) -> None:
    if not 0 < points[0] < points[1] < layers:
        third = max(1, layers // 3)
        advice = f"try {third},{layers - third}" if layers >= 3 else "three parts need three"
        raise SplitError(
            f"trunk and top must begin, in this order, within the layers 1..{layers - 1} of {layers}, so that each "
            f"part has one; got {points[0]},{points[1]}: {advice}"
        )


def _files(source: str, explicit: str | None) -> Mapping[str, str]:
    """Tensor -> file, without opening a file by the library: mapping one that is larger than the memory can fail."""
    file = explicit or SINGLE
    path = find(source, file)
    if path is not None and file.endswith(".safetensors"):
        return dict.fromkeys(read_header(path).tensors, file)
    with WeightFiles(source, explicit) as files:
        return files.file_of


def _float_dtype(file_of: Mapping[str, str], headers: Mapping[str, SafetensorsHeader]) -> torch.dtype:
    """The type of the first floating tensor of the first file."""
    ordered = sorted(file_of.items(), key=operator.itemgetter(1))
    dtypes = (torch_dtype(headers[file].tensors[name]) for name, file in ordered)
    return next((dtype for dtype in dtypes if dtype in _FLOATING), torch.float32)


def _headers(source: str, file_of: Mapping[str, str]) -> dict[str, SafetensorsHeader]:
    """The headers of all files; raises all that is wrong with any of them at once."""
    held: dict[str, list[str]] = {}
    for name, file in file_of.items():
        held.setdefault(file, []).append(name)
    headers: dict[str, SafetensorsHeader] = {}
    wrong: list[str] = []
    for file, names in sorted(held.items()):
        path = find(source, file)
        if path is None:
            wrong.append(f"{file} is not there, which holds {listed(names)}")
            continue
        try:
            headers[file] = read_header(path)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if absent := [name for name in names if name not in headers[file].tensors]:
            wrong.append(f"{file} does not hold {listed(absent)}, which the index says it does")
    if wrong:
        raise CheckpointError(f"{source} is not whole: {'; '.join(wrong)}. Fetch what is missing, and try again")
    return headers


def _part_plan(
    source: str,
    config: Any,
    dtype: torch.dtype,
    stage: int,
    cut_points: Sequence[int],
    pieces: Mapping[str, Piece],
    trust_remote_code: bool,
) -> PartPlan:
    """Builds the model anew for each part: the loader joins ties of what it fills, across parts of one model."""
    try:
        whole = without_weights(config, dtype, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]  # it can be a page
        raise CheckpointError(
            f"config.json of {source} describes no language model that can be built: {reason}"
        ) from error
    part: Any = split_causal_lm(whole, len(COMPONENTS), [stage], cut_points=cut_points)[stage]
    layers = vars(part)[STAGE].layout.num_layers
    edges = (0, *cut_points, layers)
    num_parameters = sum(parameter.numel() for parameter in part.parameters())
    entries = {name: piece.entry for name, piece in pieces.items()}
    needed = needed_tensors(part, whole, entries, dtype, name=source, trust_remote_code=trust_remote_code)
    _check_ties(source, whole, {name: pieces[name] for name in needed})
    return PartPlan(
        component=COMPONENTS[stage],
        start_layer=edges[stage],
        end_layer=edges[stage + 1],
        num_parameters=num_parameters,
        pieces={name: pieces[name] for name in sorted(needed)},
    )


def _check_ties(source: str, whole: Any, pieces: Mapping[str, Piece]) -> None:
    """Compares the two ends of a tie where the files hold both: the loader of the part would refuse other values."""
    prefix = f"{whole.base_model_prefix}."  # files of a base model lack it
    for ends in getattr(whole, "all_tied_weights_keys", {}).items():
        there = {name for end in ends for name in (end, end.removeprefix(prefix)) if name in pieces}
        if len(there) > 1 and len({hash_of(name, pieces[name]) for name in there}) > 1:
            raise CheckpointError(
                f"config.json of {source} ties {' to '.join(ends)}, but the files hold different values of the two; "
                "set tie_word_embeddings to false there if both are meant"
            )
