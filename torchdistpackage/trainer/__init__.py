"""THE TRAINERS: whole-model interfaces on top of the face, for people who bring a model and a loss and nothing else.

===========================  =================================================================================
`auto_pipeline.py`           `AutoPipeline`: a Hugging Face model, a device mesh and a loss -> steps
`auto_pipeline_config.py`    what it is told, and what it tells
`auto_pipeline_schedule.py`  a schedule bound to this rank's stages: runs batches of any size
`auto_pipeline_report.py`    names, counts and summaries for people
`functional.py`              the same in single functions, for those who put them together in another way
`gradients.py`               divides and clips the gradients of all stages
`parallelize.py`             calls the user's function that shards or wraps each stage
`mesh_topology.py`           a device mesh -> the groups of `tpc`
`pipeline_trainer.py`        `PipelineTrainer`: a model, data and arguments -> a trained model
`training_loop.py`           its loop; `events.py` its callbacks, `records.py` its log, `run_checkpoints.py` its disk
`assembly.py`                stages, optimizer and scheduler of a run; `stages.py`, `splitting.py`, `replication.py`
`process_layout.py`          process groups out of the arguments, and what ranks tell each other
`steps.py`                   batches through the stages; `losses.py` weighs them, `batch_arguments.py` cuts them
`feed.py`                    datasets -> batches of steps
`evaluation.py`              a whole dataset, every row once
`arguments.py`               `PipelineTrainingArguments`: how a run is configured
`argument_checks.py`         what in them does not fit, and what follows from them
`callbacks.py`               the events of a run, as Hugging Face's callbacks know them
`run_state.py`               what they see and set
`progress.py`                a progress bar, or lines, and the table at the end
`progress_table.py`          that table as text
`trackers.py`                TensorBoard, and whatever else has `.log`
`batches.py`                 which rows every replica gets in which step
`batch_reading.py`           what in a batch is what
`seeded_data.py`             rows that are the same on every rank and after any restart
`optimizers.py`              optimizer and learning rate schedule
===========================  =================================================================================

The names below are loaded on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.split import (
        ModelSplitter,
        PipelineStage,
        calculate_virtual_stages,
        create_automatic_splitter,
        create_manual_causal_lm_splitter,
        generate_hf_model_fqn_per_model_part,
        stage_ids_this_rank,
    )
    from torchdistpackage.trainer.arguments import PipelineTrainingArguments
    from torchdistpackage.trainer.auto_pipeline import AutoPipeline
    from torchdistpackage.trainer.auto_pipeline_config import AutoPipelineConfig, ParallelizeFnProtocol, PipelineInfo
    from torchdistpackage.trainer.auto_pipeline_schedule import PipelineSchedule
    from torchdistpackage.trainer.batches import Batch, BatchSource, RawBatch, default_collator, read_batch
    from torchdistpackage.trainer.callbacks import CallbackHandler, DefaultFlowCallback, TrainerCallback
    from torchdistpackage.trainer.evaluation import EvalPrediction
    from torchdistpackage.trainer.functional import (
        build_pipeline_schedule,
        get_schedule_class,
        pipeline_model,
        split_model_into_stages,
        validate_hf_model_for_pipeline_support,
    )
    from torchdistpackage.trainer.gradients import scale_grads_and_clip_grad_norm
    from torchdistpackage.trainer.optimizers import default_optimizer, make_optimizer, make_scheduler
    from torchdistpackage.trainer.pipeline_trainer import PipelineTrainer, TrainOutput
    from torchdistpackage.trainer.progress import ProgressCallback, metrics_table
    from torchdistpackage.trainer.run_state import TrainerControl, TrainerState
    from torchdistpackage.trainer.trackers import TensorBoardCallback, TrackerCallback

_HOME = {
    "arguments": "PipelineTrainingArguments",
    "batches": "Batch BatchSource RawBatch default_collator read_batch",
    "callbacks": "CallbackHandler DefaultFlowCallback TrainerCallback",
    "evaluation": "EvalPrediction",
    "optimizers": "default_optimizer make_optimizer make_scheduler",
    "progress": "ProgressCallback metrics_table",
    "pipeline_trainer": "PipelineTrainer TrainOutput",
    "run_state": "TrainerControl TrainerState",
    "trackers": "TensorBoardCallback TrackerCallback",
    "auto_pipeline": "AutoPipeline",
    "auto_pipeline_config": "AutoPipelineConfig ParallelizeFnProtocol PipelineInfo",
    "auto_pipeline_schedule": "PipelineSchedule",
    "functional": (
        "build_pipeline_schedule get_schedule_class pipeline_model split_model_into_stages "
        "validate_hf_model_for_pipeline_support"
    ),
    "gradients": "scale_grads_and_clip_grad_norm",
}
_FILE = {name: f"{__name__}.{file}" for file, names in _HOME.items() for name in names.split()}
_FILE |= dict.fromkeys(
    (
        "ModelSplitter PipelineStage calculate_virtual_stages create_automatic_splitter "
        "create_manual_causal_lm_splitter generate_hf_model_fqn_per_model_part stage_ids_this_rank"
    ).split(),
    "torchdistpackage.split",
)

__all__ = [
    "AutoPipeline",
    "AutoPipelineConfig",
    "Batch",
    "BatchSource",
    "CallbackHandler",
    "DefaultFlowCallback",
    "EvalPrediction",
    "ModelSplitter",
    "ParallelizeFnProtocol",
    "PipelineInfo",
    "PipelineSchedule",
    "PipelineStage",
    "PipelineTrainer",
    "PipelineTrainingArguments",
    "ProgressCallback",
    "RawBatch",
    "TensorBoardCallback",
    "TrainOutput",
    "TrackerCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "create_automatic_splitter",
    "create_manual_causal_lm_splitter",
    "default_collator",
    "default_optimizer",
    "generate_hf_model_fqn_per_model_part",
    "get_schedule_class",
    "make_optimizer",
    "make_scheduler",
    "metrics_table",
    "pipeline_model",
    "read_batch",
    "scale_grads_and_clip_grad_norm",
    "split_model_into_stages",
    "stage_ids_this_rank",
    "validate_hf_model_for_pipeline_support",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_FILE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
