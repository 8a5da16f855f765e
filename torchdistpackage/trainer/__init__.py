"""THE TRAINERS: whole-model interfaces on top of the face, for people who bring a model and a loss and nothing else.

==========================  =================================================================================
`auto_pipeline.py`          `AutoPipeline`: a Hugging Face model, a device mesh and a loss -> steps
`auto_pipeline_config.py`   what it is told, and what it tells
`auto_pipeline_schedule.py` a schedule bound to this rank's stages: runs batches of any size
`auto_pipeline_report.py`   names, counts and summaries for people
`functional.py`             the same in single functions, for those who put them together in another way
`gradients.py`              divides and clips the gradients of all stages
`parallelize.py`            calls the user's function that shards or wraps each stage
`mesh_topology.py`          a device mesh -> the groups of `tpc`
==========================  =================================================================================

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
    from torchdistpackage.trainer.auto_pipeline import AutoPipeline
    from torchdistpackage.trainer.auto_pipeline_config import AutoPipelineConfig, ParallelizeFnProtocol, PipelineInfo
    from torchdistpackage.trainer.auto_pipeline_schedule import PipelineSchedule
    from torchdistpackage.trainer.functional import (
        build_pipeline_schedule,
        get_schedule_class,
        pipeline_model,
        split_model_into_stages,
        validate_hf_model_for_pipeline_support,
    )
    from torchdistpackage.trainer.gradients import scale_grads_and_clip_grad_norm

_HOME = {
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
    "ModelSplitter",
    "ParallelizeFnProtocol",
    "PipelineInfo",
    "PipelineSchedule",
    "PipelineStage",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "create_automatic_splitter",
    "create_manual_causal_lm_splitter",
    "generate_hf_model_fqn_per_model_part",
    "get_schedule_class",
    "pipeline_model",
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
