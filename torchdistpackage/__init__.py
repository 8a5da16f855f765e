"""Pipeline-parallel training in PyTorch, inside the user's own loop.

    from torchdistpackage import forward_backward, partition_uniform, setup_distributed, tpc

The names below are loaded on first use (PEP 562): `import torchdistpackage` and `torchdistpackage.schedule` do not
import torch, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.checkpoint import Checkpointer, load_safetensors, save_safetensors
    from torchdistpackage.errors import (
        CheckpointError,
        DeadlockError,
        NonFiniteError,
        PipelineError,
        ScheduleError,
        SplitError,
        TopologyError,
        TorchDistError,
        TrainerError,
        TransportError,
    )
    from torchdistpackage.parallel import (
        DDP,
        Bf16ZeroOptimizer,
        MoEDP,
        NaiveDDP,
        PipelineGradScaler,
        ShardedEMA,
        apply_tensor_parallel,
        check_parts,
        clip_grad_norm_,
        create_moe_dp_hooks,
        draw_last_step,
        flat_and_partition,
        flatten_model,
        flatten_sequence,
        forward_backward,
        forward_eval,
        generate,
        last_plan,
        last_timeline,
        load_causal_lm,
        local_stages,
        moe_dp_iter_step,
        partition_balanced,
        partition_causal_lm,
        partition_chunks,
        partition_uniform,
        profile_stage_costs,
        save_causal_lm,
        split_model,
        tensor_parallel_plan,
        tie_parameters,
    )
    from torchdistpackage.schedule import Routed
    from torchdistpackage.split import (
        BaseBottomModel,
        BaseTopModel,
        BaseTrunkModel,
        ModelFactory,
        ModelRegistry,
        ModelSplitter,
        Pipe,
        PipelineStage,
        SplitPoint,
        calculate_virtual_stages,
        create_automatic_splitter,
        create_manual_causal_lm_splitter,
        generate_hf_model_fqn_per_model_part,
        load_split_model,
        load_whole_model_state_dict,
        pipe_split,
        pipeline,
        split_causal_lm,
        stage_ids_this_rank,
        whole_model_names,
        whole_model_state_dict,
    )
    from torchdistpackage.tools import (
        find_nan,
        fix_rand,
        get_model_profile,
        register_profile_hooks,
        replace_all_module,
        replace_linear_by_bminf,
        replace_linear_by_bnb,
        report_prof,
    )
    from torchdistpackage.topology import (
        ParallelContext,
        find_free_port,
        get_mp_ckpt_suffix,
        is_using_pp,
        setup_distributed,
        setup_node_groups,
        test_comm,
        torch_parallel_context,
        tpc,
    )
    from torchdistpackage.trainer import (
        AutoPipeline,
        AutoPipelineConfig,
        PipelineInfo,
        PipelineTrainer,
        PipelineTrainingArguments,
        TrainerCallback,
    )

__version__ = "0.1.0"

_HOME = {
    "torchdistpackage.checkpoint": "Checkpointer load_safetensors save_safetensors",
    "torchdistpackage.errors": (
        "CheckpointError DeadlockError NonFiniteError PipelineError ScheduleError SplitError TopologyError "
        "TorchDistError TrainerError TransportError"
    ),
    "torchdistpackage.parallel": (
        "DDP Bf16ZeroOptimizer MoEDP NaiveDDP PipelineGradScaler ShardedEMA apply_tensor_parallel check_parts "
        "clip_grad_norm_ create_moe_dp_hooks draw_last_step flat_and_partition flatten_model flatten_sequence "
        "forward_backward forward_eval generate last_plan last_timeline load_causal_lm local_stages "
        "moe_dp_iter_step partition_balanced partition_causal_lm partition_chunks partition_uniform "
        "profile_stage_costs save_causal_lm split_model tensor_parallel_plan tie_parameters"
    ),
    "torchdistpackage.schedule": "Routed",
    "torchdistpackage.split": (
        "BaseBottomModel BaseTopModel BaseTrunkModel ModelFactory ModelRegistry ModelSplitter Pipe PipelineStage "
        "SplitPoint calculate_virtual_stages create_automatic_splitter create_manual_causal_lm_splitter "
        "generate_hf_model_fqn_per_model_part load_split_model load_whole_model_state_dict pipe_split pipeline "
        "split_causal_lm stage_ids_this_rank whole_model_names whole_model_state_dict"
    ),
    "torchdistpackage.tools": (
        "find_nan fix_rand get_model_profile register_profile_hooks replace_all_module replace_linear_by_bminf "
        "replace_linear_by_bnb report_prof"
    ),
    "torchdistpackage.topology": (
        "ParallelContext find_free_port get_mp_ckpt_suffix is_using_pp setup_distributed setup_node_groups "
        "test_comm torch_parallel_context tpc"
    ),
    "torchdistpackage.trainer": (
        "AutoPipeline AutoPipelineConfig PipelineInfo PipelineTrainer PipelineTrainingArguments TrainerCallback"
    ),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names.split()}

__all__ = [
    "DDP",
    "AutoPipeline",
    "AutoPipelineConfig",
    "BaseBottomModel",
    "BaseTopModel",
    "BaseTrunkModel",
    "Bf16ZeroOptimizer",
    "CheckpointError",
    "Checkpointer",
    "DeadlockError",
    "MoEDP",
    "ModelFactory",
    "ModelRegistry",
    "ModelSplitter",
    "NaiveDDP",
    "NonFiniteError",
    "ParallelContext",
    "Pipe",
    "PipelineError",
    "PipelineGradScaler",
    "PipelineInfo",
    "PipelineStage",
    "PipelineTrainer",
    "PipelineTrainingArguments",
    "Routed",
    "ScheduleError",
    "ShardedEMA",
    "SplitError",
    "SplitPoint",
    "TopologyError",
    "TorchDistError",
    "TrainerCallback",
    "TrainerError",
    "TransportError",
    "apply_tensor_parallel",
    "calculate_virtual_stages",
    "check_parts",
    "clip_grad_norm_",
    "create_automatic_splitter",
    "create_manual_causal_lm_splitter",
    "create_moe_dp_hooks",
    "draw_last_step",
    "find_free_port",
    "find_nan",
    "fix_rand",
    "flat_and_partition",
    "flatten_model",
    "flatten_sequence",
    "forward_backward",
    "forward_eval",
    "generate",
    "generate_hf_model_fqn_per_model_part",
    "get_model_profile",
    "get_mp_ckpt_suffix",
    "is_using_pp",
    "last_plan",
    "last_timeline",
    "load_causal_lm",
    "load_safetensors",
    "load_split_model",
    "load_whole_model_state_dict",
    "local_stages",
    "moe_dp_iter_step",
    "partition_balanced",
    "partition_causal_lm",
    "partition_chunks",
    "partition_uniform",
    "pipe_split",
    "pipeline",
    "profile_stage_costs",
    "register_profile_hooks",
    "replace_all_module",
    "replace_linear_by_bminf",
    "replace_linear_by_bnb",
    "report_prof",
    "save_causal_lm",
    "save_safetensors",
    "setup_distributed",
    "setup_node_groups",
    "split_causal_lm",
    "split_model",
    "stage_ids_this_rank",
    "tensor_parallel_plan",
    "test_comm",
    "tie_parameters",
    "torch_parallel_context",
    "tpc",
    "whole_model_names",
    "whole_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
