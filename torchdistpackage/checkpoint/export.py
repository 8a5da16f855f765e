"""A checkpoint -> a Hugging Face directory: one process, no process groups, and never more than a file in memory.

::

    run/step-00000120/                           out/
        __0_0.distcp  __1_0.distcp  ..             config.json
        shared.pt: which names are one tensor  ->  model-00001-of-00002.safetensors  model-00002-of-00002.safetensors
        config.json                                model.safetensors.index.json      export.json

Where the configuration is that of a language model of transformers, names and layouts go back to those of its files
(`safetensors_causal_lm.py`), and `from_pretrained` loads the directory. Any other model keeps its own names, those of
`model.state_dict()`. The same weights give the same files, whatever the layout of the ranks that saved them was.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from torchdistpackage.checkpoint.safetensors_causal_lm import causal_lm_of, write_causal_lm
from torchdistpackage.checkpoint.safetensors_directory import (
    ExportReport,
    begin_directory,
    check_target,
    finish_directory,
)
from torchdistpackage.checkpoint.safetensors_source import StoredModel, open_model
from torchdistpackage.checkpoint.safetensors_writing import (
    ShardWriter,
    float_type,
    natural_order,
    number_of_bytes,
    plan_shards,
    shard_names,
)
from torchdistpackage.errors import CheckpointError

__all__ = ["export_safetensors"]


def export_safetensors(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    aliases: bool = False,
    verify: bool = False,
) -> ExportReport:
    """Writes the weights of a checkpoint as safetensors files, in the layout of Hugging Face.

    The directory appears at one moment, whole; an earlier export in it is replaced, anything else is not. Optimizer
    states are not part of it. A parameter that has several names is written once, under the first.

    Args:
        checkpoint: Folder of one checkpoint, or of a run: then its newest whole one.
        directory: Where to; absent, empty or an earlier export.
        max_shard_size: Of the tensors of a file, in bytes or as "5GB"; a larger tensor has a file of its own. A
            language model of transformers takes as much memory, but at least a layer's; any other model one tensor's.
        dtype: To convert floating tensors to, such as "bfloat16"; None leaves them.
        aliases: Write a parameter with several names under each of them. A language model of transformers knows its
            ties itself.
        verify: Read the whole checkpoint first, and compare hashes; else sizes are compared.

    Raises:
        CheckpointError: The checkpoint is torn or foreign, the directory holds something else, or the disk is full.
        ModuleNotFoundError: The model is one of transformers, which is not installed; the message names the extra.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10))
        >>> Checkpointer(f"{home.name}/run", model, config=model.config).save(120)
        >>> report = export_safetensors(f"{home.name}/run", f"{home.name}/tuned", dtype="bfloat16")
        >>> report.files, report.num_tensors
        (('model.safetensors',), 28)
        >>> AutoModelForCausalLM.from_pretrained(f"{home.name}/tuned").dtype
        torch.bfloat16
    """
    most, chosen = number_of_bytes(max_shard_size), float_type(dtype)
    target = check_target(directory)
    stored = open_model(checkpoint, verify=verify)
    model = causal_lm_of(stored)
    if model is not None and aliases:
        raise CheckpointError(
            f"{stored.folder} is of {type(model).__name__}, whose configuration says which weights are tied: export "
            "it without aliases"
        )
    folder = begin_directory(target)
    try:
        if model is None:
            files = _write_plainly(stored, folder, most, chosen, aliases)
        else:
            files = write_causal_lm(model, stored, folder, most, chosen)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    source = {"checkpoint": stored.folder.name, "dtype": str(chosen).removeprefix("torch.") if chosen else None}
    return finish_directory(folder, target, files, source)


def _write_plainly(
    stored: StoredModel, folder: Path, most: int, dtype: torch.dtype | None, aliases: bool
) -> dict[str, tuple[str, ...]]:
    """Every tensor under its own name, one at a time."""
    kept_as = {name: name for name in stored.layouts}
    if aliases:
        kept_as |= {other: name for name, others in stored.aliases.items() for other in others}
    layouts = {name: stored.layouts[kept_as[name]].cast(dtype) for name in sorted(kept_as, key=natural_order)}
    shards = plan_shards(layouts, most)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    for file, names in files.items():
        with ShardWriter(folder / file, {name: layouts[name] for name in names}) as writer:
            for name in names:
                writer.write(name, stored.read(kept_as[name], dtype))
    _copy_config(stored.folder, folder, dtype)
    return files


def _copy_config(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """The configuration, which may say the type of the weights: the loader of transformers believes it."""
    path = source / "config.json"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    said = json.loads(text)
    if dtype is not None and isinstance(said, dict) and (changed := {"dtype", "torch_dtype"} & {*said}):
        said |= dict.fromkeys(changed, str(dtype).removeprefix("torch."))
        text = json.dumps(said, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
