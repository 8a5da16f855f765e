"""The loop of a trainer: epochs, steps, and what follows a step.

::

    for epoch in epochs:
        for batches in steps of the epoch:         feed.py         the same on every rank of a pipeline
            loss = run.training.train(batches)     steps.py        one step of the pipeline, weighted by tokens
            clip, step, schedule
            log, evaluate, save                    as the callbacks' flags say

Where it stands is two numbers, an epoch and the rows of all replicas that are done in it; with them it goes on in any
layout. Neighbours: `pipeline_trainer.py` makes it, `events.py` tells the callbacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchdistpackage.errors import TrainerError
from torchdistpackage.parallel import clip_grad_norm_
from torchdistpackage.trainer.arguments import PipelineTrainingArguments
from torchdistpackage.trainer.assembly import Run
from torchdistpackage.trainer.batches import Batch, BatchSource
from torchdistpackage.trainer.callbacks import TrainerState
from torchdistpackage.trainer.events import Events
from torchdistpackage.trainer.feed import Feed, grouped
from torchdistpackage.trainer.records import Records
from torchdistpackage.trainer.run_checkpoints import RunCheckpoints

__all__ = ["TrainingLoop"]

_log = logging.getLogger(__name__)
_OF_THIS_RUN = (
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "train_batch_size",
    "is_world_process_zero",
    "is_local_process_zero",
)


@final
class TrainingLoop:
    """One run's loop; every rank runs it, and every method is collective.

    Args:
        args: How to train.
        run: What is trained.
        feed: Makes batches.
        source: The training data.
        events: The callbacks, and the state.
        checkpoints: Where the run is saved.
        evaluate: Evaluates the model, logs, and returns the metrics.
    """

    def __init__(
        self,
        args: PipelineTrainingArguments,
        run: Run,
        feed: Feed,
        source: BatchSource,
        events: Events,
        checkpoints: RunCheckpoints,
        evaluate: Callable[[], Mapping[str, float]],
    ) -> None:
        self._args, self._run, self._events, self._checkpoints = args, run, events, checkpoints
        self._feed, self._source, self._evaluate = feed, source, evaluate
        self._batches_per_epoch = feed.batches_per_epoch(source)
        self._records = self._new_records()
        self._epoch = self._rows = 0
        self._learning_rate, self._recorded = 0.0, False

    def run(self, resume: bool | str | Any) -> dict[str, float]:
        """Trains; returns the summary.

        Args:
            resume: What the trainer's `train` takes.

        Raises:
            CheckpointError: The checkpoint is torn, or of another model.
            TrainerError: The data end at once, or the metric to be best is not there.
            PipelineError: Another rank failed.
        """
        events = self._events
        loaded = None if resume is False else self._checkpoints.load(resume)
        if loaded is not None:
            self.restore(loaded)
        elif events.state.global_step == 0 and self._args.save_strategy != "no":
            self._checkpoints.set_aside()
        state = events.state
        if state.global_step >= state.max_steps:
            _log.warning(
                "%d of %d steps are done: nothing is left to train; a new trainer with this model, or a larger "
                "max_steps and resume_from_checkpoint=..., trains on",
                state.global_step,
                state.max_steps,
            )
        self._run.modules.train()
        events.begin()
        events.call("on_train_begin")
        events.agree()
        self._records.resume()
        if self._args.eval_on_start and state.global_step == 0:
            self._evaluate_now()
            events.agree()
        while not events.control.should_training_stop and state.global_step < state.max_steps:
            self._one_epoch()
        return self._finish()

    def _one_epoch(self) -> None:
        """The rest of an epoch."""
        source, events = self._source, self._events
        events.call("on_epoch_begin")
        done, per_epoch = self._rows // source.global_batch_size, self._batches_per_epoch
        whole = True
        for batches in self._steps():
            events.call("on_step_begin")
            self._step(batches)
            done += len(batches)
            self._rows += len(batches) * source.global_batch_size
            events.state.epoch = self._epoch + (done / per_epoch if per_epoch else 0.0)
            events.call("on_step_end")
            self._follow()
            if events.control.should_training_stop or events.control.should_epoch_stop:
                whole = done == per_epoch or events.control.should_epoch_stop
                break
        if not done:
            raise TrainerError(
                f"epoch {self._epoch} has no batches: the data ({type(source.dataset).__name__}) are empty, or can be "
                "read only once; a stream begins anew each time that it is iterated over"
            )
        if whole:  # a run that is stopped before goes on in this epoch
            self._epoch, self._rows = self._epoch + 1, 0
            events.state.epoch = float(self._epoch)
        events.call("on_epoch_end")
        self._follow()

    def _step(self, batches: Sequence[Batch]) -> None:
        """One step of the optimizer."""
        run, events, recorded = self._run, self._events, self._logs_next()
        run.optimizer.zero_grad()
        loss = run.training.train(batches, record=recorded)
        for _ in batches[1:]:
            events.call("on_substep_end")
        if run.scaler is not None:
            run.scaler.unscale_(run.optimizer)
        norm = None
        if self._args.max_grad_norm or recorded:
            norm = clip_grad_norm_(run.modules.parameters(), self._args.max_grad_norm or float("inf"))
        events.call("on_pre_optimizer_step")
        self._learning_rate, self._recorded = float(run.optimizer.param_groups[0]["lr"]), recorded
        if self._has_stepped() and not isinstance(run.scheduler, ReduceLROnPlateau):
            run.scheduler.step()
        events.call("on_optimizer_step")
        events.state.global_step += 1
        self._records.step(batches, loss, norm)

    def _has_stepped(self) -> bool:
        """Steps; False if the scaler has found a gradient that is not finite, and left the step out."""
        optimizer, scaler = self._run.optimizer, self._run.scaler
        if scaler is None:
            optimizer.step()
            return True
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() >= before

    def _follow(self) -> None:
        """Does what the flags say; each event may raise more of them, on one rank alone."""
        acts = {"should_log": self._log_now, "should_evaluate": self._evaluate_now, "should_save": self._save_now}
        acted = True
        for flag, act in acts.items():
            if acted:
                self._events.agree()
            acted = getattr(self._events.control, flag)
            if acted:
                act()
        if acted:
            self._events.agree()

    def _log_now(self) -> None:
        epoch = round(self._events.state.epoch, 4)
        row = self._records.row(learning_rate=self._learning_rate, epoch=epoch, recorded=self._recorded)
        self._events.state.num_input_tokens_seen = self._records.tokens_seen
        self._events.log(row)

    def _save_now(self) -> None:
        self._records.pause()
        self.save()
        self._events.call("on_save")
        self._records.resume()

    def _evaluate_now(self) -> None:
        self._records.pause()
        metrics = self._evaluate()
        if isinstance(self._run.scheduler, ReduceLROnPlateau):
            self._run.scheduler.step(self._metric(metrics))
        if self._args.load_best_model_at_end:
            self._keep_if_best(metrics)
        self._records.resume()

    def _metric(self, metrics: Mapping[str, float]) -> float:
        name = self._args.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise TrainerError(f"metric_for_best_model is {name}, and the evaluation gave {', '.join(metrics)}")
        return metrics[name]

    def _keep_if_best(self, metrics: Mapping[str, float]) -> None:
        state, greater = self._events.state, self._args.greater_is_better
        best, value = state.best_metric, self._metric(metrics)
        if best is None or (value > best if greater else value < best):
            state.best_metric, state.best_global_step = value, state.global_step
            state.best_model_checkpoint = str(Path(self._args.output_dir, "best"))
            self._checkpoints.save_best(state.global_step)

    def _finish(self) -> dict[str, float]:
        events = self._events
        self._records.pause()
        summary = self._records.summary()
        self._checkpoints.finish()
        if self._args.load_best_model_at_end and events.state.best_model_checkpoint is not None:
            self._checkpoints.load_best(events.state.best_model_checkpoint)
        summary["epoch"] = round(events.state.epoch, 4)
        events.log(summary)
        events.call("on_train_end")
        events.control.should_training_stop = False
        return summary

    # ---- where it stands ----

    def save(self, directory: Any = None) -> Path:
        """Writes a checkpoint of everything.

        Args:
            directory: For a checkpoint apart; None for the run's own.

        Raises:
            CheckpointError: It cannot be written.
        """
        state = self._events.state
        state.stateful_callbacks = self._events.handler.states()
        extra = {"state": state.to_dict(), "records": self._records.state()}
        if self._args.save_dataset_state:
            extra["data"] = {"epoch": self._epoch, "rows": self._rows, "seed": self._feed.seed}
        return self._checkpoints.save(state.global_step, extra, directory)

    def restore(self, loaded: Mapping[str, Any]) -> None:
        """Takes back what `save` gave as extra; the weights are loaded already.

        Args:
            loaded: Empty for a checkpoint that is not of a trainer: then it is weights only.
        """
        if "state" not in loaded:
            return
        before, state = self._events.state, TrainerState.from_dict(loaded["state"])
        for name in _OF_THIS_RUN:
            setattr(state, name, getattr(before, name))
        self._events.state = state
        self._events.handler.restore(state.stateful_callbacks)
        self._records = self._new_records()
        self._records.load(loaded["records"])
        data = loaded.get("data")
        if data is None or not self._args.restore_dataset_state:
            return
        self._epoch, self._rows = data["epoch"], data["rows"]
        if data["seed"] != self._feed.seed:
            _log.info("the data go on in the order of the checkpoint's seed, %d", data["seed"])
            self._feed = replace(self._feed, seed=data["seed"])
            self._source = self._feed.source(self._source.dataset, training=True)

    def _steps(self) -> Iterator[list[Batch]]:
        batches = self._feed.batches(self._source, self._epoch, self._rows)
        return grouped(batches, self._args.gradient_accumulation_steps)

    def _new_records(self) -> Records:
        return Records(
            self._run.device,
            counts_tokens=self._run.cut.is_causal_lm,
            has_loss=self._run.training.has_last_stage,
            first_timed=self._args.speed_metrics_start_step,
        )

    def _logs_next(self) -> bool:
        """Whether the next step is going to be logged, as far as the arguments say."""
        number, args, state = self._events.state.global_step + 1, self._args, self._events.state
        if number == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == "epoch" and self._batches_per_epoch:
            return number % -(-self._batches_per_epoch // args.gradient_accumulation_steps) == 0
        return args.logging_strategy == "steps" and number % max(1, state.logging_steps) == 0
