"""`PipelineTrainer`: a model, data and arguments -> a trained model, in any layout, with the loop written already.

::

    args, model_init, train_dataset
      |  process_layout.py   who trains what
      |  feed.py             batches
      |  assembly.py         stages, optimizer, scheduler
      |  training_loop.py    the loop, its log and its checkpoints
      v
    TrainOutput, checkpoints, a model that Hugging Face loads

The interface is that of Forgather's trainer, whose names are Hugging Face's. A user who wants to see or change the loop
takes `forward_backward` and writes it: nothing here can do more than that.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage.checkpoint import save_safetensors
from torchdistpackage.errors import TrainerError
from torchdistpackage.parallel import save_causal_lm
from torchdistpackage.parallel.agreement import together
from torchdistpackage.split import ModelSplitter
from torchdistpackage.topology import tpc
from torchdistpackage.trainer.arguments import PipelineTrainingArguments
from torchdistpackage.trainer.assembly import Factories, build_run, cut_for
from torchdistpackage.trainer.batches import Batch, BatchSource
from torchdistpackage.trainer.callbacks import TrainerState
from torchdistpackage.trainer.evaluation import in_eval_mode, run_evaluation
from torchdistpackage.trainer.events import Events
from torchdistpackage.trainer.feed import Feed
from torchdistpackage.trainer.functional import get_schedule_class
from torchdistpackage.trainer.losses import WeightedLoss
from torchdistpackage.trainer.process_layout import device_of, from_first_rank, others_are_told, set_up_processes
from torchdistpackage.trainer.progress import ProgressCallback
from torchdistpackage.trainer.run_checkpoints import RunCheckpoints
from torchdistpackage.trainer.trackers import reporting_callbacks
from torchdistpackage.trainer.training_loop import TrainingLoop

__all__ = ["PipelineTrainer", "TrainOutput"]


class TrainOutput(NamedTuple):
    """What a training run gives.

    Attributes:
        global_step: Optimizer steps that were done, those before a restart included.
        training_loss: Mean loss of these steps.
        metrics: `train_runtime`, `train_loss`, speeds, peak memory.

    Example:
        It unpacks::

            steps, loss, metrics = trainer.train()
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@final
class PipelineTrainer:
    """Trains a model through a pipeline, with data parallelism around it; the numbers are those of one process.

    Every process makes one and calls the same methods. Start them with torchrun; without it one process is a pipeline
    of one. Process groups are set up here, unless they are already.

    Args:
        args: How; the defaults if None.
        model_splitter: Cuts the model, see `ModelSplitter`; None for the default: decoders between their layers, any
            other model by tracing.
        model_init: Makes the model, a function without arguments. It runs on the meta device: every rank gets memory
            for its own stages only, and in every layout their weights are those of `torch.manual_seed(seed);
            model_init()`, to the bit.
        model: The model itself, with its weights, instead.
        train_dataset: With `__getitem__` and `__len__`, or a stream, or a DataLoader; see `BatchSource`.
        eval_dataset: The same, or a dict of them.
        data_collator: List of rows -> batch.
        processing_class: A tokenizer or the like: handed to callbacks, and saved with the model.
        compute_loss_func: `function(output, labels)` -> mean loss, or Hugging Face's `(outputs, labels,
            num_items_in_batch)`. None: the cross entropy of the next token, or of the class.
        compute_metrics: `function(EvalPrediction)` -> numbers by name, for evaluations.
        callbacks: Objects or classes with Hugging Face's event names.
        optimizer_factory: Makes the optimizer of a list of (whole-model name, parameter), as those of torch take it.
        optimizer_cls_and_kwargs: A class and its options, instead.
        lr_scheduler_factory: Makes the schedule; is called with `optimizer=` and, if it takes them, `num_warmup_steps=`
            and `num_training_steps=`.
        pipe_schedule_factory: A schedule class of `torch.distributed.pipelining` whose schedule runs, where the
            arguments name none: for code that comes from Forgather.

    Attributes:
        args: As given.
        device: Where this process computes.

    Raises:
        TrainerError: Arguments, data or factories do not fit; a ValueError.
        SplitError: The model cannot be cut, or the splitter returned something else.
        ScheduleError: The schedule is unknown or does not run so many stages a rank.
        TopologyError: The processes cannot be put into groups so.

    Example:
        >>> rows = [{"x": torch.randn(4), "labels": number % 2} for number in range(16)]
        >>> def model_init():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> args = PipelineTrainingArguments(
        ...     output_dir="run", max_steps=3, per_device_train_batch_size=8, save_steps=2, use_cpu=True)
        >>> trainer = PipelineTrainer(args=args, model_init=model_init, train_dataset=rows, eval_dataset=rows)
        >>> trainer.remove_callback(ProgressCallback)  # which prints
        >>> trainer.train().global_step
        3
        >>> trainer.evaluate()["eval_samples"]
        16
        >>> trainer.save_checkpoint("apart").name
        'step-00000003'
    """

    def __init__(
        self,
        *,
        args: PipelineTrainingArguments | None = None,
        model_splitter: ModelSplitter | None = None,
        model_init: Callable[[], nn.Module] | None = None,
        model: nn.Module | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
        callbacks: Iterable[Any] | None = None,
        optimizer_factory: Callable[..., Any] | None = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        lr_scheduler_factory: Callable[..., Any] | None = None,
        pipe_schedule_factory: Any = None,
    ) -> None:
        args = PipelineTrainingArguments() if args is None else args
        if not isinstance(args, PipelineTrainingArguments):
            raise TrainerError(f"args must be PipelineTrainingArguments, got {type(args).__name__}")
        if train_dataset is None and eval_dataset is None:
            raise TrainerError("give train_dataset=..., eval_dataset=..., or both: a model is cut with a batch in hand")
        if pipe_schedule_factory is not None and args.schedule is None:
            of = getattr(pipe_schedule_factory, "func", pipe_schedule_factory)  # a functools.partial
            args = replace(args, schedule=get_schedule_class(getattr(of, "__name__", of)).name)
        self.args, self.processing_class, self._compute_metrics = args, processing_class, compute_metrics
        self._eval_dataset = eval_dataset
        set_up_processes(args)
        self.device = device_of(args)
        _set_torch_up(args)
        feed = Feed(args, _agreed_seed(args.seed), data_collator)
        source = None if train_dataset is None else feed.source(train_dataset, training=True)
        cut = cut_for(
            args,
            model=model,
            model_init=model_init,
            splitter=model_splitter,
            example=together(
                lambda: _example(feed, source, eval_dataset), "read the first batch for the splitter", TrainerError
            ),
            device=self.device,
            seed=feed.seed,
        )
        self._feed = replace(feed, default_labels=cut.is_causal_lm)
        state = _new_state(args, None if source is None else feed.batches_per_epoch(source), source is not None)
        self._run = build_run(
            args,
            cut,
            loss=WeightedLoss(
                compute_loss_func,
                cut.is_causal_lm,
                vocabulary=getattr(cut.config, "vocab_size", None) or 8,
                device=self.device,
            ),
            factories=Factories(optimizer_factory, optimizer_cls_and_kwargs, lr_scheduler_factory),
            total_steps=state.max_steps,
            device=self.device,
        )
        self._checkpoints = RunCheckpoints(args, self._run)
        state.is_world_process_zero = tpc.is_first_in_data_group() and self._run.training.has_last_stage
        state.is_local_process_zero = state.is_world_process_zero
        built_in = [*reporting_callbacks(args.report_to), ProgressCallback()]
        self._events = Events(args, state, callbacks or (), built_in, self._shown(source))
        self._loop = None if source is None else self._new_loop(source)
        if dist.get_rank() > 0:  # replicas and stages draw other dropout masks; the first rank those of the plain loop
            _seed_generators(feed.seed, dist.get_rank())
        with others_are_told("making the trainer"):
            self._events.call("on_init_end")

    @property
    def state(self) -> TrainerState:
        """Where the run is."""
        return self._events.state

    @property
    def stages(self) -> dict[int, nn.Module]:
        """This rank's stages, global index -> module, in the order of the model."""
        return dict(self._run.cut.stages)

    # ---- training ----

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> TrainOutput:
        """Trains as the arguments say.

        Args:
            resume_from_checkpoint: True for the newest checkpoint of `output_dir`, or a path; None for what the
                arguments say.

        Raises:
            TrainerError: There are no training data.
            CheckpointError: The checkpoint is torn, or of another model.
            PipelineError: Another rank failed. This rank's own exceptions come as they are.
        """
        if self._loop is None:
            raise TrainerError("there is no train_dataset: pass it to the trainer, or call evaluate()")
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with others_are_told("training"):
            summary = self._loop.run(resume)
        return TrainOutput(self.state.global_step, summary["train_loss"], summary)

    # ---- evaluation ----

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss over a dataset, weighted by tokens, and what `compute_metrics` finds; the same on every rank.

        Args:
            eval_dataset: Another one than the trainer's; a dict of them has its names in those of the metrics.
            metric_key_prefix: Before the names.

        Raises:
            TrainerError: There are no data.
            PipelineError: Another rank failed.
        """
        dataset = self._eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise TrainerError("there is no eval_dataset: pass it to the trainer or to evaluate()")
        named = dataset if isinstance(dataset, dict) else {None: dataset}
        metrics: dict[str, float] = {}
        with others_are_told("evaluating"):
            with in_eval_mode(self._run.modules):
                for name, one in named.items():
                    prefix = metric_key_prefix if name is None else f"{metric_key_prefix}_{name}"
                    metrics |= self._evaluated(one, prefix)
            metrics["epoch"] = round(self.state.epoch, 4)
            self._events.log(metrics)
            self._events.call("on_evaluate", metrics=metrics)
        return metrics

    def _evaluated(self, dataset: Any, prefix: str) -> dict[str, float]:
        source = self._feed.source(dataset, training=False)
        most = self.args.max_eval_steps if self.args.max_eval_steps > 0 else None
        return run_evaluation(
            self._run.evaluation,
            islice(self._feed.batches(source, 0), most),
            prefix,
            self._compute_metrics,
            partial(self._events.call, "on_prediction_step", eval_dataloader=source),
        )

    # ---- checkpoints and models ----

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Writes the weights as Hugging Face's `save_pretrained` would: safetensors files under whole-model names.

        Args:
            output_dir: Where to; the arguments' `output_dir` if None.

        Raises:
            CheckpointError: They cannot be written.

        Example:
            Of a language model::

                trainer.save_model("tuned")
                model = AutoModelForCausalLM.from_pretrained("tuned")
        """
        directory = self.args.output_dir if output_dir is None else output_dir
        stages = self._run.cut.stages
        if self._run.cut.is_causal_lm and all(hasattr(stage, "save_pretrained") for stage in stages.values()):
            save_causal_lm(stages, directory)
        else:
            save_safetensors(stages, directory, config=self._run.cut.config)
        if hasattr(self.processing_class, "save_pretrained") and dist.get_rank() == 0:
            self.processing_class.save_pretrained(directory)

    def save_checkpoint(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Writes all that a run needs to go on, in any layout.

        Args:
            path: A directory for it; the run's own if None, where only the newest are kept.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: It cannot be written, here or on another rank.
        """
        return self._checkpoints.save(self.state.global_step, {}, path) if self._loop is None else self._loop.save(path)

    def load_checkpoint(self, path: str | os.PathLike[str] | None = None) -> None:
        """Restores a checkpoint; `train` then goes on from it.

        Args:
            path: A checkpoint, or a directory of which the newest is taken; the run's own if None.

        Raises:
            CheckpointError: There is none, it is torn, or of another model.
        """
        loaded = self._checkpoints.load(self.args.output_dir if path is None else path)
        if self._loop is not None and loaded is not None:
            self._loop.restore(loaded)

    # ---- callbacks ----

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, an object or a class."""
        self._events.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Takes a callback out and returns it, by object or class; None if there is none."""
        return self._events.handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Takes a callback out, by object or class."""
        self._events.handler.remove(callback)

    def _new_loop(self, source: BatchSource) -> TrainingLoop:
        return TrainingLoop(
            self.args, self._run, self._feed, source, self._events, self._checkpoints, lambda: self.evaluate()
        )

    def _shown(self, source: BatchSource | None) -> dict[str, Any]:
        """What every callback sees."""
        return {
            "model": self._run.modules,
            "processing_class": self.processing_class,
            "optimizer": self._run.optimizer,
            "lr_scheduler": self._run.scheduler,
            "train_dataloader": source,
        }


def _set_torch_up(args: PipelineTrainingArguments) -> None:
    if args.float32_matmul_precision is not None:
        torch.set_float32_matmul_precision(args.float32_matmul_precision)
    if args.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)


def _agreed_seed(seed: int) -> int:
    return int(from_first_rank(seed if seed >= 0 else random.SystemRandom().randrange(2**31)))


def _example(feed: Feed, source: BatchSource | None, eval_dataset: Any) -> Batch:
    if source is not None:
        return feed.example(source)
    one = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
    return feed.example(feed.source(one, training=False))


def _new_state(args: PipelineTrainingArguments, batches: int | None, trains: bool) -> TrainerState:
    per_epoch = None if batches is None else -(-batches // args.gradient_accumulation_steps)
    steps = args.train_steps(per_epoch) if trains else 0
    state = TrainerState(
        max_steps=steps,
        num_train_epochs=math.ceil(steps / per_epoch) if per_epoch else math.ceil(args.num_train_epochs),
        train_batch_size=args.per_device_train_batch_size,
    )
    state.compute_steps(args, steps)
    return state


def _seed_generators(*numbers: int) -> None:
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.manual_seed(int(words[0]))
