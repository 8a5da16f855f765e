"""Hugging Face directories in and out, with the ranks filled in: each rank reads and writes its own stages.

The work is done by `split/decoder/pretrained.py` and `pretrained_saving.py`; here ranks agree. A rank that finds a file
broken tells the others, which would wait for it in the first step; the index, which makes a save valid, is written by
the first rank of the first replica when all stages are on the disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.parallel.agreement import together
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Placement, Plan
from torchdistpackage.split.decoder.pretrained import load_stages
from torchdistpackage.split.decoder.pretrained_saving import StageFiles, save_stage, write_index
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json

__all__ = ["load_causal_lm", "save_causal_lm"]


def load_causal_lm(
    directory: str | os.PathLike[str],
    schedule: str | Plan | Placement | os.PathLike[str] = "1f1b",
    chunks: int | None = None,
    **options: Any,
) -> dict[int, nn.Module]:
    """This rank's stages of a saved language model; each rank reads its own weights and no others. Collective.

    Args:
        directory: What `from_pretrained` would load: a directory with safetensors files, or a name on the hub.
        schedule: Says which rank owns which stage: as for `partition_chunks`.
        chunks: Stages a rank, where a name leaves the choice.
        options: Those of `torchdistpackage.split.load_stages`: `dtype`, `device`, `attn_implementation`,
            `cut_points`, `module_names`, `input_weight`, `output_weight`, `config`, `trust_remote_code`.

    Returns:
        Global index of the stage -> its module in evaluation mode, in the order of the model.

    Raises:
        CheckpointError: Files or tensors are missing or broken, here or on another rank.
        SplitError: The model cannot be cut so.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        >>> GPT2LMHeadModel(config).save_pretrained("whole")
        >>> parts = load_causal_lm("whole", "zb-v", dtype="bfloat16")
        >>> {index: next(part.parameters()).dtype for index, part in parts.items()}
        {0: torch.bfloat16, 1: torch.bfloat16}
    """

    def load() -> dict[int, nn.Module]:
        placement = placement_of(schedule, tpc.get_pp_size(), chunks)
        return load_stages(directory, placement.num_stages, placement.local_stages(tpc.get_pp_rank()), **options)

    return together(load, "load its stages", CheckpointError)


def save_causal_lm(
    parts: Mapping[int, nn.Module], directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes all stages as one directory that `from_pretrained` loads, here and anywhere. Collective over all replicas.

    What was in the directory stays whole until all stages are on the disk.

    Args:
        parts: This rank's stages, from `partition_causal_lm` or `load_causal_lm`.
        directory: The same on every rank, on a file system that all of them see.
        max_shard_size: Of a file, in bytes or as "5GB".

    Raises:
        CheckpointError: The stages are not those of one model, or cannot be written, here or on another rank.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        >>> from torchdistpackage import partition_causal_lm
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> save_causal_lm(partition_causal_lm(model), "tuned")
        >>> type(AutoModelForCausalLM.from_pretrained("tuned")).__name__
        'GPT2LMHeadModel'
    """
    writes = all(tpc.get_group_rank(mode) == 0 for mode in ("data", "tensor") if tpc.is_mode_inited(mode))
    indices = [index for mine in _pipeline_of(sorted(parts)) for index in mine]
    if sorted(indices) != list(range(len(indices))):
        raise CheckpointError(f"the ranks have the stages {sorted(indices)}, which are not all of one model, once each")

    def save() -> list[Any]:
        saved = [
            save_stage(part, directory, index, len(indices), max_shard_size=max_shard_size, writes=writes)
            for index, part in parts.items()
        ]
        return [dataclasses.asdict(piece) for piece in saved if piece is not None]

    pieces = [piece for theirs in _pipeline_of(together(save, "write its stages", CheckpointError)) for piece in theirs]

    def finish() -> None:
        if writes and tpc.get_pp_rank() == 0:
            write_index(directory, [StageFiles(**piece) for piece in pieces])

    together(finish, "write the index", CheckpointError)  # and nobody reads before it is there


def _pipeline_of(value: Any) -> list[Any]:
    return gather_json(value, tpc.get_control_group("pipe")) if tpc.get_pp_size() > 1 else [value]
