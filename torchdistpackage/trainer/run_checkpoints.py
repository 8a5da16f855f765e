"""A run's checkpoints: when a run starts anew, goes on, or has found its best weights.

::

    output_dir/
        step-00000500/  step-00001000/    the newest `save_total_limit`
        best/step-00000700/               the weights with the best metric, if `load_best_model_at_end`
        earlier-run-1/                    what an earlier run left, when a new one starts here: nothing is deleted

Neighbours: `checkpoint/` does the work, `training_loop.py` says when.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch.distributed as dist

from torchdistpackage.checkpoint import Checkpointer, list_checkpoints
from torchdistpackage.checkpoint.folder import step_folder
from torchdistpackage.checkpoint.random_states import random_states, set_random_states
from torchdistpackage.errors import CheckpointError
from torchdistpackage.trainer.arguments import PipelineTrainingArguments
from torchdistpackage.trainer.assembly import Run
from torchdistpackage.trainer.process_layout import from_every_rank

__all__ = ["RunCheckpoints"]

_log = logging.getLogger(__name__)


@final
class RunCheckpoints:
    """The checkpoints of one run; all methods are collective.

    Args:
        args: Where, how many, what.
        run: What is saved.
    """

    def __init__(self, args: PipelineTrainingArguments, run: Run) -> None:
        self._args, self._run = args, run
        config = run.cut.config
        known = isinstance(config, dict) or hasattr(config, "to_json_string") or hasattr(config, "to_dict")
        self._config = config if known else None
        self._kept: Checkpointer | None = None
        self._best: Checkpointer | None = None

    def save(self, step: int, extra: Mapping[str, Any], directory: str | os.PathLike[str] | None = None) -> Path:
        """Writes everything; in the background if the arguments say so and no other directory is given."""
        if directory is None:
            self._kept = self._kept or self._checkpointer(self._args.output_dir, self._args.async_save)
            self._kept.save(step, extra=extra)
            return step_folder(Path(self._args.output_dir), step)
        with self._checkpointer(directory, asynchronous=False) as checkpointer:
            checkpointer.save(step, extra=extra)
        return step_folder(Path(directory), step)

    def load(self, source: bool | str | os.PathLike[str]) -> Mapping[str, Any] | None:
        """Restores a checkpoint.

        Args:
            source: True for the newest of the run; a checkpoint, or a directory of which the newest is taken.

        Returns:
            What was given as `extra`; None if there is none and nobody asked for a certain one.

        Raises:
            CheckpointError: It is torn, of another model, or there is none.
        """
        self.finish()
        directory = Path(self._args.output_dir if source is True else os.fspath(source))  # type: ignore[arg-type]
        one = source is not True and (directory / "manifest.json").is_file()
        with self._checkpointer(directory.parent if one else directory, False, loads=True) as checkpointer:
            before = random_states()
            loaded = checkpointer.load(directory if one else None, strict=self._restores_everything)
            if not self._args.restore_rng_state:
                set_random_states(before)
        if loaded is None and source is not True:
            raise CheckpointError(f"{directory} has no complete checkpoint to resume from")
        if loaded is None:
            _log.info("%s has no complete checkpoint: training begins anew", directory)
            return None
        _log.info("resumed from %s", loaded.path)
        return dict(loaded.extra)

    def save_best(self, step: int) -> None:
        """Keeps the weights of this step, apart from the others."""
        if self._best is None:
            self._best = Checkpointer(
                Path(self._args.output_dir, "best"),
                self._run.cut.stages,
                keep=1,
                asynchronous=self._args.async_save,
                config=self._config,
            )
        self._best.save(step)

    def load_best(self, directory: str | os.PathLike[str]) -> None:
        """Puts the best weights back.

        Args:
            directory: Where they are: a run that was resumed in another `output_dir` may have found none since.

        Raises:
            CheckpointError: They cannot be read.
        """
        if self._best is not None:
            self._best.wait()
        with Checkpointer(directory, self._run.cut.stages, config=self._config) as best:
            if best.load() is None:
                _log.warning("the best weights are not in %s any more: the model keeps the last ones", directory)

    def set_aside(self) -> None:
        """Comes before a run that begins anew: its checkpoints must not be mixed with those of an earlier one."""
        failure = None
        if dist.get_rank() == 0:
            try:
                self._set_aside()
            except OSError as error:
                failure = str(error)
        failures = [each for each in from_every_rank(failure) if each]
        if failures:
            raise CheckpointError(f"the checkpoints of an earlier run cannot be set aside: {failures[0]}")

    def _set_aside(self) -> None:
        home = Path(self._args.output_dir)
        left = [info.path for info in list_checkpoints(home)] if home.is_dir() else []
        left += [home / "best"] if (home / "best").is_dir() else []
        if not left:
            return
        if self._args.overwrite_output_dir:
            for path in left:
                shutil.rmtree(path)
            return
        number = 1
        while (aside := home / f"earlier-run-{number}").exists():
            number += 1
        aside.mkdir()
        for path in left:
            os.replace(path, aside / Path(path).name)
        _log.warning(
            "%s had %d checkpoints of an earlier run; they are in %s now. To go on from them pass "
            "resume_from_checkpoint=%r; overwrite_output_dir=True deletes instead of moving",
            home,
            len(left),
            aside.name,
            str(aside),
        )

    def finish(self) -> None:
        """Waits for what is written in the background."""
        for checkpointer in (self._kept, self._best):
            if checkpointer is not None:
                checkpointer.wait()

    @property
    def _restores_everything(self) -> bool:
        return self._args.restore_optimizer_state and self._args.restore_scheduler_state

    def _checkpointer(
        self, directory: str | os.PathLike[str], asynchronous: bool, *, loads: bool = False
    ) -> Checkpointer:
        args, run = self._args, self._run
        optimizer = args.restore_optimizer_state if loads else args.save_optimizer_state
        scheduler = args.restore_scheduler_state if loads else args.save_scheduler_state
        return Checkpointer(
            directory,
            run.cut.stages,
            optimizer=run.optimizer if optimizer else None,
            scheduler=run.scheduler if scheduler else None,
            scaler=run.scaler if optimizer else None,
            keep=None if loads else args.save_total_limit,
            asynchronous=asynchronous,
            config=self._config,
        )
