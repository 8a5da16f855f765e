"""The face of this room: saves and loads everything that a run needs to go on, in any layout.

::

    checkpointer = Checkpointer("run", stages, optimizer=optimizer, scheduler=scheduler, asynchronous=True)
    loaded = checkpointer.load()
    for step in range(loaded.step if loaded else 0, steps):
        ...
        checkpointer.save(step + 1)
    checkpointer.close()

    save   together: what each rank holds -> plan.py: who writes what -> (copies) -> job.py, here or in a thread
    load   choosing.py: which one -> restore.py: names and shapes on all ranks, then values -> random numbers, data

Neighbours: `contents.py` has the user's objects, `ranks.py` the messages, `folder.py` the disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

from torchdistpackage.checkpoint.background import Background, HostCopies
from torchdistpackage.checkpoint.choosing import choose
from torchdistpackage.checkpoint.companions import Companions
from torchdistpackage.checkpoint.contents import Contents, first_of_all
from torchdistpackage.checkpoint.folder import step_folder
from torchdistpackage.checkpoint.job import SHARED, Job, config_text
from torchdistpackage.checkpoint.named_model import Stages
from torchdistpackage.checkpoint.options import merged_options, options_of
from torchdistpackage.checkpoint.plain import packed, unpacked
from torchdistpackage.checkpoint.plan import Chosen, choose_writers
from torchdistpackage.checkpoint.random_states import random_states
from torchdistpackage.checkpoint.ranks import Ranks
from torchdistpackage.checkpoint.restore import Restore
from torchdistpackage.errors import CheckpointError
from torchdistpackage.topology import tpc

__all__ = ["Checkpointer", "Loaded"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        step: Its number.
        path: Its folder.
        extra: What `save` was given beside.
        same_layout: Whether every rank holds the same as then: the run goes on with the same bits.
        skipped: Name and fault of each newer checkpoint that is torn.
        missing: With strict=False: names of the model that the checkpoint has not.
        unexpected: With strict=False: names of the checkpoint that no rank's model has.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3)).save(120, extra={"epoch": 3})
        >>> loaded = Checkpointer(run.name, nn.Linear(2, 3, bias=False)).load(strict=False)
        >>> loaded.path.name, loaded.extra, loaded.unexpected
        ('step-00000120', {'epoch': 3}, ('bias',))
    """

    step: int
    path: Path
    extra: Any
    same_layout: bool
    skipped: tuple[tuple[str, str], ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """Who writes what, and what was said for it; valid until a rank says something else."""

    digests: list[str]
    told: list[dict[str, Any]]
    chosen: list[list[Chosen]]


@final
class Checkpointer:
    """Checkpoints of a run that fit any layout.

    A checkpoint is of the whole model: names are those of the whole model, tensors whole ones that the ranks wrote
    together. It loads into any number of pipeline stages, replicas and shards, into DistributedDataParallel,
    `fully_shard`, `Bf16ZeroOptimizer` and one plain process. Loaded into the layout that saved it, the run goes on with
    the very bits of an undisturbed one. A checkpoint counts when all of it is on the disk, and not before, whenever
    the run is killed.

    Construct it on every rank, after the modules and the optimizer have their final form; it makes a gloo group of all
    ranks. `save`, `load` and the construction are collective. The folder is on a file system that all ranks share.

    Args:
        run: The folder of all checkpoints of the run.
        stages: This rank's modules: one, wrapped or not, a list, or {stage: module} as `partition_chunks` gives them.
        optimizer: None, one, or several; each parameter is in one of them.
        scheduler: The learning rate scheduler; its lists with an entry a parameter group are each rank's own.
        scaler: A gradient scaler.
        ema: A `ShardedEMA` of this rank's modules.
        data: This rank's own: something with `state_dict` and `load_state_dict`, such as a stateful data loader.
        objects: More such, by name, that are the same on every rank; the first rank's state is saved.
        keep: How many checkpoints stay; None: all.
        asynchronous: Write in the background; `save` returns when this rank's part is copied to host memory.
        config: The model's configuration, written as `config.json`: a dict, or one of Hugging Face's.
        timeout: Seconds after which a rank that does not answer is given up.

    Raises:
        CheckpointError: A wrong argument, or parameters that are not of the stages. On every rank.

    Example:
        >>> import tempfile, torch
        >>> run, layer = tempfile.TemporaryDirectory(), torch.nn.Linear(2, 2)
        >>> with Checkpointer(run.name, layer, optimizer=torch.optim.AdamW(layer.parameters())) as checkpointer:
        ...     checkpointer.save(120, extra={"epoch": 3})
        ...     loaded = checkpointer.load()
        >>> loaded.step, loaded.extra, loaded.same_layout
        (120, {'epoch': 3}, True)
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        stages: Stages,
        *,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        ema: Any = None,
        data: Any = None,
        objects: Mapping[str, Any] | None = None,
        keep: int | None = 2,
        asynchronous: bool = False,
        config: Any = None,
        timeout: float = 1800.0,
    ) -> None:
        self._run, self._keep, self._asynchronous = Path(os.path.abspath(run)), keep, asynchronous
        self._ranks = Ranks(timeout)
        self._background, self._copies = Background(), HostCopies()
        self._plan: _Plan | None = None
        self._closed = False

        def make() -> None:
            if keep is not None and (not isinstance(keep, int) or keep < 1):
                raise CheckpointError(f"keep must be at least 1, or None to keep all, got {keep!r}")
            self._config = config_text(config)
            self._contents = Contents(stages, optimizer, ema)
            self._companions = Companions(scheduler, scaler, objects or {}, data)

        self._ranks.together("Checkpointer", make)

    # ---- saving ----

    def save(self, step: int, extra: Any = None) -> None:
        """Saves a checkpoint, in place of an earlier one of the same step. Collective over all ranks.

        Args:
            step: Its number.
            extra: Plain values and tensors, the same on every rank; `load` gives them back.

        Raises:
            CheckpointError: Something cannot be saved, a rank could not write or has ended, or the save before has
                failed in the background. On every rank; earlier checkpoints are still there.
        """
        self._wait_for_all()
        what = f"checkpoint of step {step}"
        mine: dict[str, Any] = {}
        answers = self._ranks.together(what, lambda: self._look(step, extra, mine))
        steps = sorted({answer["step"] for answer in answers})
        if len(steps) > 1:
            raise CheckpointError(f"the ranks save different steps, {steps}; call save with one step on every rank")
        plan = self._planned([answer["digest"] for answer in answers], mine["told"])
        job = self._job(step, plan, answers, mine)
        if self._asynchronous:
            self._background.start(what, lambda: self._write(job))
        else:
            self._write(job)

    def _look(self, step: int, extra: Any, mine: dict[str, Any]) -> dict[str, Any]:
        """Puts what this rank has into `mine`, and returns what the others have to know each time."""
        if not isinstance(step, int) or step < 0:
            raise CheckpointError(f"step must be a whole number from 0, got {step!r}")
        contents, place = self._contents, self._ranks.place
        held = contents.held()
        told = held.told(place)
        shared = {"extra": unpacked(packed("extra", extra)), "objects": self._companions.states()}
        mine.update(held=held, told=told, own=self._companions.own(), shared=shared)
        changing = {
            "options": options_of(contents.optimizers),
            "values": held.values(),
            "schedulers": self._companions.schedulers(),
        }
        return {
            "step": step,
            "digest": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            "layout": held.layout(place),
            "changing": base64.b64encode(packed("optimizer", changing)).decode(),
            "averages": contents.num_updates,
        }

    def _planned(self, digests: list[str], told: dict[str, Any]) -> _Plan:
        """Who writes what: as the last time, if all ranks hold the same as then."""
        if self._plan is None or self._plan.digests != digests:
            rank = self._ranks.rank
            everyone = self._ranks.gather(told if digests.index(digests[rank]) == rank else None)
            filled = [everyone[digests.index(digest)] for digest in digests]  # replicas say the same: one is heard
            self._plan = _Plan(digests, filled, choose_writers(filled))
        return self._plan

    def _job(self, step: int, plan: _Plan, answers: Sequence[Mapping[str, Any]], mine: Mapping[str, Any]) -> Job:
        ranks = self._ranks
        parts = mine["held"].parts
        tensors = [parts[one.part].tensor for one in plan.chosen[ranks.rank]]
        if self._asynchronous:
            tensors = self._copies.take(tensors)
        aliases = first_of_all(plan.told, "aliases")
        shared = _shared(step, plan, answers, mine["shared"] | {"aliases": aliases}) if ranks.rank == 0 else b""
        return Job(
            folder=step_folder(self._run, step),
            step=step,
            ranks=ranks,
            chosen=plan.chosen,
            tensors=tensors,
            random={f"random.{ranks.rank}.{name}": state for name, state in random_states().items()},
            shared=shared,
            own=mine["own"],
            config=self._config,
            layout=_in_words(ranks.size),
            aliases=aliases,
            keep=self._keep,
        )

    def _write(self, job: Job) -> None:
        job.run()
        _logger.info("checkpoint of step %d written to %s", job.step, job.folder)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on the disk.

        Raises:
            CheckpointError: It has failed. On every rank.
        """
        self._background.wait()

    def close(self) -> None:
        """Waits, and lets go of the process group. Call it before `destroy_process_group`; a second time does nothing.

        Raises:
            CheckpointError: The checkpoint that was being written has failed. On every rank.
        """
        try:
            self._background.wait()
        finally:
            self._closed = True
            self._ranks.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _logger.error("the last checkpoint has failed, too: %s", failed)

    # ---- loading ----

    def load(
        self, which: int | str | os.PathLike[str] | None = None, *, strict: bool = True, verify: bool = True
    ) -> Loaded | None:
        """Loads the newest checkpoint that is whole, or a given one, into the objects. Collective over all ranks.

        Args:
            which: A step of this run, or the folder of a checkpoint; None: the newest.
            strict: Raise for parameters that only the model or only the checkpoint has.
            verify: Compare every file's SHA-256; False: only its size.

        Returns:
            What was loaded; None if there is none to load.

        Raises:
            CheckpointError: It is torn, foreign, or does not fit: nothing was changed. Or a file could not be read
                after its hash was: load another one. On every rank.
        """
        self._wait_for_all()
        ranks = self._ranks
        asked = ranks.gather([None if which is None else str(which), strict, verify])
        if any(one != asked[0] for one in asked):
            raise CheckpointError(
                f"the ranks call load differently: (which, strict, verify) are {asked[0]} on rank 0 and "
                f"{next(one for one in asked if one != asked[0])} on another; call it alike on every rank"
            )
        choice = choose(self._run, which, ranks, verify=verify)
        if choice.path is None:
            return None
        path = choice.path
        restore = Restore(path, self._contents, strict)
        what = f"load {path.name}"

        def look() -> dict[str, Any]:
            restore.look()
            self._companions.look(restore.shared["objects"], strict=strict)
            layout = self._contents.held().layout(ranks.place)
            return {"used": restore.used_mask(), "missing": restore.missing, "layout": layout}

        answers = ranks.together(what, look)
        unexpected = restore.unused([answer["used"] for answer in answers])
        if unexpected and strict:
            raise CheckpointError(
                f"{what}: no rank has a place for {', '.join(unexpected[:8])} ({len(unexpected)} in all); it is of "
                "another model. load(strict=False) leaves them out"
            )
        same = [answer["layout"] for answer in answers] == restore.shared["layout"]
        own = ranks.together(what, lambda: self._companions.look_for_own(path, ranks.rank, same=same))
        ranks.together(what, restore.read)
        ranks.together(what, lambda: self._companions.load(restore, ranks.rank, own[ranks.rank], same=same))
        missing = sorted({name for answer in answers for name in answer["missing"]})
        return Loaded(
            step=int(restore.shared["step"]),
            path=path,
            extra=restore.shared["extra"],
            same_layout=same,
            skipped=choice.skipped,
            missing=tuple(missing),
            unexpected=tuple(unexpected),
        )

    def _wait_for_all(self) -> None:
        """Waits for the save before; all ranks raise if it has failed on one."""
        if self._closed:
            raise CheckpointError("this Checkpointer is closed; construct a new one on every rank")
        self._background.wait()


def _in_words(ranks: int) -> str:
    if not tpc._is_inited("global"):
        return "1 process" if ranks == 1 else f"{ranks} ranks"
    sizes = [(mode, tpc.get_group_size(mode)) for mode in ("data", "pipe", "tensor") if tpc._is_inited(mode)]
    return f"{ranks} ranks: " + ", ".join(f"{mode} {size}" for mode, size in sizes)


def _shared(step: int, plan: _Plan, answers: Sequence[Mapping[str, Any]], beside: Mapping[str, Any]) -> bytes:
    """`shared.pt`: what is no tensor by name, and the same for all ranks."""
    changing = [unpacked(base64.b64decode(answer["changing"])) for answer in answers]
    optimizer = {
        "groups": merged_options([one["options"] for one in changing], [one["groups"] for one in plan.told]),
        "entries": first_of_all(plan.told, "entries"),
        "stepped": first_of_all(plan.told, "stepped"),
        "values": first_of_all(changing, "values"),
    }
    layout = {"layout": [answer["layout"] for answer in answers], "num_updates": answers[0]["averages"]}
    schedulers = [one["schedulers"] for one in changing]
    return packed(SHARED, {"step": step, "optimizer": optimizer, "schedulers": schedulers, **beside, **layout})
