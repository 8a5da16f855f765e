"""THE FACE: what a user's loop calls. The only room, with trainer and checkpoint above it, that reads `tpc`."""

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

__all__ = [
    "DDP",
    "CallableModule",
    "PipelineGradScaler",
    "check_parts",
    "clip_grad_norm_",
    "draw_last_step",
    "flat_and_partition",
    "flatten_model",
    "flatten_sequence",
    "forward_backward",
    "forward_eval",
    "generate",
    "last_plan",
    "last_timeline",
    "load_causal_lm",
    "local_stages",
    "partition_balanced",
    "partition_causal_lm",
    "partition_chunks",
    "partition_uniform",
    "profile_stage_costs",
    "save_causal_lm",
    "split_model",
    "tie_parameters",
]
