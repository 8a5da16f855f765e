"""How a run is configured: the names, defaults and meanings of Hugging Face's and Forgather's training arguments.

A configuration moves over as it is. Sizes are per *replica*: a pipeline is one device to its user, however many ranks
it has. ::

    one optimizer step = gradient_accumulation_steps batches
    one batch          = per_device_train_batch_size rows x data_parallel_size replicas
    one replica's rows = pipeline_chunks micro-batches, uneven if they do not divide

What is listed here works; what those libraries have and this one has not is refused, never passed over in silence.
Neighbours: `argument_checks.py` says what does not fit; `pipeline_trainer.py` and what it calls read the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchdistpackage.errors import TrainerError
from torchdistpackage.schedule import Plan
from torchdistpackage.trainer.argument_checks import chunks_of, completed, loaded_schedule, read_words

__all__ = ["PipelineTrainingArguments"]


@dataclass(kw_only=True)
class PipelineTrainingArguments:
    """How a `PipelineTrainer` trains.

    Attributes:
        output_dir: Where checkpoints and logs go.
        logging_dir: Where TensorBoard's files go; None for `runs` in `output_dir`.
        overwrite_output_dir: Delete the checkpoints of an earlier run in `output_dir`; else they are moved to
            `earlier-run-1` below it.
        per_device_train_batch_size: Rows of a batch that one replica (one pipeline) takes; any number.
        per_device_eval_batch_size: The same for evaluation.
        gradient_accumulation_steps: Batches of one optimizer step.
        num_train_epochs: Passes over the data; may be a fraction.
        max_steps: Optimizer steps; goes before `num_train_epochs`. -1 for as many as the epochs have.
        epoch_train_steps: Optimizer steps of an epoch, for a stream that does not know its length.
        seed: For weights, dropout and data; -1 for one that rank 0 draws.
        data_seed: For the order of the data and their random transforms; None for `seed`.
        use_cpu: Compute on the CPU although there are accelerators.
        learning_rate: The highest of the schedule.
        weight_decay: Of all weights that are no biases and no norms.
        adam_beta1: AdamW's first moment.
        adam_beta2: AdamW's second moment.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: Gradients are clipped to it, by the norm of the whole model; None (or 0) for no clipping.
        lr_scheduler_type: `"linear"`, `"cosine"`, `"constant"`, `"constant_with_warmup"`, or another one's name in
            transformers.
        lr_scheduler_kwargs: Its options.
        warmup_steps: Steps in which the learning rate rises from 0; below 1 it is a share of all steps.
        warmup_ratio: The same as a share of all steps, where `warmup_steps` is 0.
        eval_strategy: When to evaluate: `"no"`, `"steps"` or `"epoch"`.
        eval_steps: Every so many steps; below 1 it is a share of all steps.
        eval_delay: Not before this step (or epoch, as `eval_strategy`).
        max_eval_steps: The most batches of one evaluation; -1 for all.
        eval_on_start: Evaluate before the first step.
        logging_strategy: When to log: `"no"`, `"steps"` or `"epoch"`.
        logging_steps: As `eval_steps`.
        logging_first_step: Log after the first step as well.
        save_strategy: When to write a checkpoint: `"no"`, `"steps"` (and at the end) or `"epoch"`.
        save_steps: As `eval_steps`.
        save_total_limit: The most checkpoints to keep, the best one not counted; None for all.
        save_on_each_node: Not offered: nodes write one checkpoint together, where all of them see it.
        save_safetensors: Weights as safetensors files; nothing else is offered.
        async_save: Write while training goes on.
        save_optimizer_state: Put it into checkpoints. So do the next three.
        save_scheduler_state: The learning rate's.
        save_dataset_state: The place in the data.
        save_rng_state: The random number generators'; always there.
        restore_optimizer_state: Take it from the checkpoint that is resumed. So do the next three.
        restore_scheduler_state: The learning rate's.
        restore_dataset_state: The place in the data; else the data begin anew.
        restore_rng_state: The random number generators'.
        resume_from_checkpoint: True for the newest in `output_dir`, or a checkpoint's folder.
        load_best_model_at_end: Keep the best checkpoint, and end with its weights.
        metric_for_best_model: Which metric of the evaluation, with or without `eval_`.
        greater_is_better: None: unless its name ends in `loss`.
        dataloader_num_workers: Processes that load data, on every rank that takes some.
        dataloader_pin_memory: Batches in page-locked memory, where there is CUDA.
        dataloader_persistent_workers: Keep these processes between epochs.
        dataloader_prefetch_factor: Batches that each loads ahead; None for torch's default.
        dataloader_drop_last: Leave out an epoch's last batch if it is short.
        remove_unused_columns: Accepted; what the first stage's forward does not take is left out, and logged.
        label_names: Where a batch that is a dict has its labels; the first of them that is there.
        bf16: Compute in bfloat16 under autocast; weights stay as they are.
        fp16: The same in float16, with a gradient scaler.
        default_dtype: Of the weights that are made: a `torch.dtype` or its name; None for the model's own.
        gradient_checkpointing: Recompute activations in the backward.
        torch_compile: Compile each stage.
        detect_anomaly: Autograd's anomaly detection.
        float32_matmul_precision: `"highest"`, `"high"` or `"medium"`.
        report_to: `"tensorboard"`, `"none"`, objects with `.log(dict, step=)`, or functions that make one.
        disable_tqdm: Log lines instead of a progress bar.
        speed_metrics_start_step: Steps before this one do not count for speeds: the first ones warm up.
        pipeline_chunks: Micro-batches of a batch; 4 if nothing says.
        n_microbatches: The same; both hold the number afterwards.
        stages_per_rank: Stages that each rank runs; None for as many as the schedule has by default.
        schedule: A name of the catalogue, `"auto"`, `"auto-v"`, a Plan or the path of one as CSV. None: `"1f1b"`; with
            several stages a rank `"interleaved-1f1b"`; with `pp_stage_type="v"` `"zb-v"`.
        pp_stage_type: How stages lie on ranks, `"loop"` or `"v"`; None for the schedule's own.
        is_multistage: Accepted; `stages_per_rank` says it.
        pipeline_parallel_size: Ranks of a pipeline; None for what is left of the world.
        data_parallel_size: Pipelines; None for what is left of the world. Both None: one pipeline of all ranks.
        data_parallel: `"ddp"`, `"fsdp2"`, `"zero1"` or `"zero2"`.
        construct_model_on: Where the model is made before it is cut: `"meta"`, `"cpu"` or `"device"`.
        debug_pipeline: Log the plan and where stages lie.
        debug_split_model: Log how the model is cut.
        debug_model_params: Log the parameters of each stage.
        debug_model_init: Log where weights come from.
        device: Not offered: every process has the device that its launcher gives it.
        torch_compile_backend: Not offered.
        torch_compile_mode: Not offered.
        enable_activation_offloading: Not offered.
        fuse_optim_with_backward: Not offered: an optimizer that steps in the backward does so at every micro-batch.
        sdpa_backend: Not offered.
        gc_threshold: Not offered.

    Raises:
        TrainerError: Something does not fit; a ValueError. The message says what to try.
        ScheduleError: The schedule is unknown, or cannot be read.

    Example:
        >>> args = PipelineTrainingArguments(per_device_train_batch_size=8, n_microbatches=2, max_steps=100)
        >>> args.pipeline_chunks, args.resolved_schedule, args.chunks, args.train_steps(None)
        (2, '1f1b', 1, 100)
        >>> PipelineTrainingArguments(pp_stage_type="v").resolved_schedule
        'zb-v'
    """

    output_dir: str = "tmp_trainer"
    logging_dir: str | None = None
    overwrite_output_dir: bool = False
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_steps: int = -1
    epoch_train_steps: int | None = None
    seed: int = 42
    data_seed: int | None = None
    use_cpu: bool = False
    # --- optimizer
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    # --- what happens when
    eval_strategy: str = "no"
    eval_steps: float = 100
    eval_delay: float = 0
    max_eval_steps: int = -1
    eval_on_start: bool = False
    logging_strategy: str = "steps"
    logging_steps: float = 50
    logging_first_step: bool = False
    save_strategy: str = "steps"
    save_steps: float = 1000
    # --- checkpoints
    save_total_limit: int | None = 2
    save_on_each_node: bool = False
    save_safetensors: bool = True
    async_save: bool = True
    save_optimizer_state: bool = True
    save_scheduler_state: bool = True
    save_dataset_state: bool = True
    save_rng_state: bool = True
    restore_optimizer_state: bool = True
    restore_scheduler_state: bool = True
    restore_dataset_state: bool = True
    restore_rng_state: bool = True
    resume_from_checkpoint: bool | str | os.PathLike[str] = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "loss"
    greater_is_better: bool | None = None
    # --- data
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_persistent_workers: bool = False
    dataloader_prefetch_factor: int | None = None
    dataloader_drop_last: bool = False
    remove_unused_columns: bool = True
    label_names: Sequence[str] = ("labels", "label", "label_ids", "targets", "target")
    # --- arithmetic
    bf16: bool = False
    fp16: bool = False
    default_dtype: str | torch.dtype | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    detect_anomaly: bool = False
    float32_matmul_precision: str | None = None
    # --- what is shown
    report_to: Any = ()
    disable_tqdm: bool = False
    speed_metrics_start_step: int = 1
    # --- the pipeline
    pipeline_chunks: int | None = None
    n_microbatches: int | None = None
    stages_per_rank: int | None = None
    schedule: str | Plan | os.PathLike[str] | None = None
    pp_stage_type: str | None = None
    is_multistage: bool = False
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None
    data_parallel: str = "ddp"
    construct_model_on: str = "meta"
    debug_pipeline: bool = False
    debug_split_model: bool = False
    debug_model_params: bool = False
    debug_model_init: bool = False
    # --- refused: see argument_checks.py
    device: Any = None
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    enable_activation_offloading: bool = False
    fuse_optim_with_backward: bool = False
    sdpa_backend: Any = None
    gc_threshold: Any = None

    def __post_init__(self) -> None:
        for name, value in completed(self).items():
            setattr(self, name, value)

    @classmethod
    def from_words(cls, words: Sequence[str], **defaults: Any) -> PipelineTrainingArguments:
        """Arguments out of `name=value` words, such as those of a command line.

        Args:
            words: Numbers, `true`, `false`, `none` and lists are read as such, everything else is text.
            **defaults: What the words do not say.

        Raises:
            TrainerError: A word has no `=`, or its name is no argument.

        Example:
            >>> PipelineTrainingArguments.from_words(["max_steps=20", "schedule=zb-v", "bf16=true"], seed=1).max_steps
            20
        """
        return cls(**{**defaults, **read_words(words, [each.name for each in dataclasses.fields(cls)])})

    @property
    def resolved_schedule(self) -> str | Plan:
        """The schedule's name in the catalogue, `"auto"`, `"auto-v"`, or a plan (read, if a path was given).

        Example:
            >>> PipelineTrainingArguments(stages_per_rank=2).resolved_schedule
            'interleaved-1f1b'
        """
        return loaded_schedule(self)

    @property
    def chunks(self) -> int:
        """Stages that each rank runs.

        Example:
            >>> PipelineTrainingArguments(schedule="zbv").chunks
            2
        """
        return chunks_of(self.resolved_schedule, self.stages_per_rank)

    def train_steps(self, steps_per_epoch: int | None) -> int:
        """Optimizer steps of the whole run.

        Args:
            steps_per_epoch: Optimizer steps of an epoch; None for a stream that does not know its length.

        Raises:
            TrainerError: Nothing says how many, or there are none.

        Example:
            >>> PipelineTrainingArguments(num_train_epochs=1.5).train_steps(5)
            8
        """
        if self.max_steps > 0:
            return self.max_steps
        steps = self.epoch_train_steps if steps_per_epoch is None else steps_per_epoch
        if steps is None:
            raise TrainerError(
                "the training data do not know their length: pass max_steps=..., or epoch_train_steps=... with "
                f"num_train_epochs={self.num_train_epochs:g}"
            )
        if steps < 1:
            raise TrainerError(
                f"an epoch has {steps} steps: the training data do not fill one batch; pass a smaller "
                "per_device_train_batch_size, or dataloader_drop_last=False"
            )
        return math.ceil(self.num_train_epochs * steps)

    def warmup(self, total: int) -> int:
        """Steps in which the learning rate rises.

        Args:
            total: Optimizer steps of the whole run.

        Example:
            >>> PipelineTrainingArguments(warmup_ratio=0.1).warmup(95)
            10
        """
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total * (self.warmup_steps or self.warmup_ratio))

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON can hold them: plans and data types by name, trackers by their type.

        Example:
            >>> PipelineTrainingArguments(default_dtype="bfloat16").to_dict()["default_dtype"]
            'bfloat16'
        """
        return {each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(self)}

    def to_json_string(self) -> str:
        """The same as text; callbacks of transformers ask for it.

        Example:
            >>> '"max_steps": 3' in PipelineTrainingArguments(max_steps=3).to_json_string()
            True
        """
        return json.dumps(self.to_dict(), indent=2)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Plan):
        return f"plan {value.name!r}: {value.placement.num_ranks} ranks, {value.num_microbatches} micro-batches"
    return str(value) if isinstance(value, Path) else type(value).__name__
