"""THE FACE: what a user's loop calls. The only room, with trainer and checkpoint above it, that reads `tpc`.

What stands beside a pipeline (replicas that reduce by themselves, sharded optimizers and averages, tensor parallelism)
is loaded on first use (PEP 562): torch's DTensor alone takes 0.4 s.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchdistpackage.parallel.causal_lm import generate, partition_causal_lm
from torchdistpackage.parallel.clip_grad_parallel import clip_grad_norm_
from torchdistpackage.parallel.data_parallel import DDP
from torchdistpackage.parallel.grad_scaler import PipelineGradScaler
from torchdistpackage.parallel.parts import check_parts
from torchdistpackage.parallel.pipeline_helper import (
    CallableModule,
    flat_and_partition,
    flatten_model,
    flatten_sequence,
    partition_balanced,
    partition_chunks,
    partition_uniform,
)
from torchdistpackage.parallel.pipeline_sched import forward_backward, forward_eval
from torchdistpackage.parallel.pipeline_state import draw_last_step, last_plan, last_timeline
from torchdistpackage.parallel.pretrained import load_causal_lm, save_causal_lm
from torchdistpackage.parallel.profile import profile_stage_costs
from torchdistpackage.parallel.tied_parameters import tie_parameters
from torchdistpackage.parallel.traced_split import local_stages, split_model

if TYPE_CHECKING:
    from torchdistpackage.parallel.ema import ShardedEMA
    from torchdistpackage.parallel.moe_data_parallel import MoEDP, create_moe_dp_hooks, moe_dp_iter_step
    from torchdistpackage.parallel.naive_ddp import NaiveDDP
    from torchdistpackage.parallel.tensor_parallel import (
        Attention,
        Block,
        ColParallelLinear,
        FreshRowwise,
        FusedColwise,
        Mlp,
        ParallelBlock,
        RowParallelLinear,
        SharedColwise,
        TpAttention,
        TpLayerNorm,
        TpLinear,
        TpMlp,
        Transformer,
        WholeOnShards,
        apply_tensor_parallel,
        enter_tensor_parallel_region,
        gather_from_sequence_parallel_region,
        get_tensor_model_parallel_world_size,
        get_tp_group,
        is_sequence_parallel_tensor,
        is_squence_parallel_tensor,
        leave_tensor_parallel_region,
        maybe_gather_from_sequence_parallel,
        maybe_split_into_sequence_parallel,
        reduce_scatter_to_sequence_parallel_region,
        set_sequence_parallel_attr,
        set_tp_group,
        tensor_mesh,
        tensor_parallel_plan,
    )
    from torchdistpackage.parallel.zero import Bf16ZeroOptimizer

_LATER = {
    "ema": "ShardedEMA",
    "moe_data_parallel": "MoEDP create_moe_dp_hooks moe_dp_iter_step",
    "naive_ddp": "NaiveDDP",
    "tensor_parallel": (
        "Attention Block ColParallelLinear FreshRowwise FusedColwise Mlp ParallelBlock RowParallelLinear "
        "SharedColwise TpAttention TpLayerNorm TpLinear TpMlp Transformer WholeOnShards "
        "apply_tensor_parallel enter_tensor_parallel_region gather_from_sequence_parallel_region "
        "get_tensor_model_parallel_world_size get_tp_group is_sequence_parallel_tensor "
        "is_squence_parallel_tensor leave_tensor_parallel_region maybe_gather_from_sequence_parallel "
        "maybe_split_into_sequence_parallel reduce_scatter_to_sequence_parallel_region "
        "set_sequence_parallel_attr set_tp_group tensor_mesh tensor_parallel_plan"
    ),
    "zero": "Bf16ZeroOptimizer",
}
_FILE = {name: file for file, names in _LATER.items() for name in names.split()}

__all__ = [
    "DDP",
    "Attention",
    "Bf16ZeroOptimizer",
    "Block",
    "CallableModule",
    "ColParallelLinear",
    "FreshRowwise",
    "FusedColwise",
    "Mlp",
    "MoEDP",
    "NaiveDDP",
    "ParallelBlock",
    "PipelineGradScaler",
    "RowParallelLinear",
    "ShardedEMA",
    "SharedColwise",
    "TpAttention",
    "TpLayerNorm",
    "TpLinear",
    "TpMlp",
    "Transformer",
    "WholeOnShards",
    "apply_tensor_parallel",
    "check_parts",
    "clip_grad_norm_",
    "create_moe_dp_hooks",
    "draw_last_step",
    "enter_tensor_parallel_region",
    "flat_and_partition",
    "flatten_model",
    "flatten_sequence",
    "forward_backward",
    "forward_eval",
    "gather_from_sequence_parallel_region",
    "generate",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "is_sequence_parallel_tensor",
    "is_squence_parallel_tensor",
    "last_plan",
    "last_timeline",
    "leave_tensor_parallel_region",
    "load_causal_lm",
    "local_stages",
    "maybe_gather_from_sequence_parallel",
    "maybe_split_into_sequence_parallel",
    "moe_dp_iter_step",
    "partition_balanced",
    "partition_causal_lm",
    "partition_chunks",
    "partition_uniform",
    "profile_stage_costs",
    "reduce_scatter_to_sequence_parallel_region",
    "save_causal_lm",
    "set_sequence_parallel_attr",
    "set_tp_group",
    "split_model",
    "tensor_mesh",
    "tensor_parallel_plan",
    "tie_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
