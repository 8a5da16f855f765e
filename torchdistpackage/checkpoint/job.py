"""The writing of one checkpoint, from parts that nobody changes any more to a folder that counts.

::

    every rank     rank 0                                                every rank
    ---------------------------------------------------------------------------------------------
                   step-00000120.unfinished, empty
    its boxes, hashed
                   .metadata, shared.pt, config.json, manifest, rename, older ones deleted
                                                                         done, or one error

It runs in `save`, or beside the steps in a thread: it touches neither the user's tensors nor a device. Each line ends
with the ranks telling each other how it went, so that all raise what one has met. A rank that is killed leaves the
folder unfinished, and the others get an error from the connection.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.checkpoint.boxes import whole_box
from torchdistpackage.checkpoint.folder import file_facts, prepare, publish, remove_old, unfinished, write_file
from torchdistpackage.checkpoint.manifest import MANIFEST, FileFacts, Manifest, TensorFacts, manifest_text
from torchdistpackage.checkpoint.plan import Chosen, total_bytes
from torchdistpackage.checkpoint.ranks import Ranks
from torchdistpackage.checkpoint.tensor_writing import finish_tensors, write_tensors
from torchdistpackage.errors import CheckpointError

__all__ = ["SHARED", "Job", "config_text", "rank_file"]

SHARED = "shared.pt"


def rank_file(rank: int) -> str:
    """Where a rank's own state is.

    Example:
        >>> rank_file(3)
        'rank-00003.pt'
    """
    return f"rank-{rank:05d}.pt"


@final
@dataclass(frozen=True, eq=False)
class Job:
    """One checkpoint that is to be written.

    Attributes:
        folder: Where it will lie.
        step: Its number.
        ranks: All.
        chosen: The boxes that each rank writes.
        tensors: The values of this rank's.
        random: The states of this rank's generators, by key.
        shared: `shared.pt`; only the first rank's counts.
        own: This rank's own state; None if it has none.
        config: `config.json`; None if there is none.
        layout: The ranks, in words.
        aliases: The names of parameters that have several.
        keep: How many checkpoints stay; None: all.
    """

    folder: Path
    step: int
    ranks: Ranks
    chosen: Sequence[Sequence[Chosen]]
    tensors: Sequence[Tensor]
    random: Mapping[str, Tensor]
    shared: bytes
    own: bytes | None
    config: str | None
    layout: str
    aliases: Mapping[str, Sequence[str]]
    keep: int | None

    def run(self) -> None:
        """Writes it. Collective.

        Raises:
            CheckpointError: Some rank could not write, or has ended. On every rank.
        """
        what = f"checkpoint of step {self.step}"
        self.ranks.together(what, self._prepare)
        written = self.ranks.together(what, self._write)
        self.ranks.together(what, lambda: self._finish(written))

    def _prepare(self) -> None:
        if self.ranks.rank == 0:
            prepare(self.folder)

    def _write(self) -> dict[str, Any]:
        target, rank = unfinished(self.folder), self.ranks.rank
        if not target.is_dir():
            raise CheckpointError(
                f"rank {rank} does not see {target}, which rank 0 has made; the folder of checkpoints must be on a "
                "file system that all ranks share"
            )
        random = [
            _beside(key, str(state.dtype).removeprefix("torch."), state.shape) for key, state in self.random.items()
        ]
        stored = write_tensors(target, [*self.chosen[rank], *random], [*self.tensors, *self.random.values()], rank)
        names = {file for file, _, _ in stored}
        if self.own is not None:
            write_file(target / rank_file(rank), self.own)
            names.add(rank_file(rank))
        facts = {name: file_facts(target / name) for name in sorted(names)}
        return {
            "stored": stored,
            "random": [[one.key, one.dtype, one.shape] for one in random],
            "files": {name: [one.nbytes, one.sha256] for name, one in facts.items()},
        }

    def _finish(self, written: Sequence[Mapping[str, Any]]) -> None:
        if self.ranks.rank:
            return
        target = unfinished(self.folder)
        everything = [
            [*mine, *(_beside(*one) for one in told["random"])] for mine, told in zip(self.chosen, written, strict=True)
        ]
        finish_tensors(target, everything, [told["stored"] for told in written])
        write_file(target / SHARED, self.shared)
        if self.config is not None:
            write_file(target / "config.json", self.config.encode())
        files = {name: FileFacts(*facts) for told in written for name, facts in told["files"].items()}
        for name in [".metadata", SHARED, *(["config.json"] if self.config is not None else [])]:
            files[name] = file_facts(target / name)
        _check_all_here(target, files)
        manifest = Manifest(
            step=self.step,
            time=time.time(),
            layout=self.layout,
            torch=str(torch.__version__),
            files=files,
            tensors={
                one.key: TensorFacts(one.dtype, one.shape, total_bytes(one.shape, one.dtype))
                for mine in everything
                for one in mine
            },
            aliases={name: tuple(names) for name, names in self.aliases.items()},
        )
        write_file(target / MANIFEST, manifest_text(manifest).encode())
        publish(self.folder)
        remove_old(self.folder.parent, self.step, self.keep)


def _beside(key: str, dtype: str, shape: Sequence[int]) -> Chosen:
    """A whole tensor that is no part of the model: a rank's own."""
    return Chosen(key, dtype, tuple(shape), whole_box(shape), -1)


def _check_all_here(target: Path, files: Mapping[str, FileFacts]) -> None:
    for name, facts in files.items():
        size = os.stat(target / name).st_size if (target / name).exists() else None
        if size != facts.nbytes:
            raise CheckpointError(
                f"rank 0 sees {size} bytes of {target / name} where its writer has written {facts.nbytes}; the folder "
                "of checkpoints must be on a file system that all ranks share"
            )


def config_text(config: Any) -> str | None:
    r"""A model's configuration as JSON.

    Args:
        config: A dict, or an object with `to_json_string()` or `to_dict()`, as Hugging Face's; None for none.

    Raises:
        CheckpointError: It is something else.

    Example:
        >>> config_text({"layers": 2})
        '{\n  "layers": 2\n}'
    """
    if config is None:
        return None
    if hasattr(config, "to_json_string"):
        return str(config.to_json_string())
    value = config.to_dict() if hasattr(config, "to_dict") else config
    try:
        return json.dumps(value, indent=2)
    except TypeError as error:
        raise CheckpointError(
            f"config is a {type(config).__name__} that JSON cannot say ({error}); give a dict of plain values, or a "
            "Hugging Face configuration"
        ) from error
