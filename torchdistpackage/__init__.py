"""Pipeline-parallel training in PyTorch, inside the user's own loop.

    from torchdistpackage import forward_backward, partition_uniform, setup_distributed, tpc

The names below are loaded on first use (PEP 562): `import torchdistpackage` and `torchdistpackage.schedule` do not
import torch, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.errors import (
        CheckpointError,
        DeadlockError,
        PipelineError,
        ScheduleError,
        SplitError,
        TopologyError,
        TorchDistError,
        TransportError,
    )
    from torchdistpackage.parallel import (
        DDP,
        PipelineGradScaler,
        clip_grad_norm_,
        draw_last_step,
        flat_and_partition,
        flatten_model,
        flatten_sequence,
        forward_backward,
        forward_eval,
        last_plan,
        last_timeline,
        local_stages,
        partition_balanced,
        partition_chunks,
        partition_uniform,
        profile_stage_costs,
        split_model,
        tie_parameters,
    )
    from torchdistpackage.schedule import Routed
    from torchdistpackage.split import (
        Pipe,
        SplitPoint,
        load_whole_model_state_dict,
        pipe_split,
        pipeline,
        whole_model_names,
        whole_model_state_dict,
    )
    from torchdistpackage.topology import (
        ParallelContext,
        find_free_port,
        is_using_pp,
        setup_distributed,
        setup_node_groups,
        test_comm,
        torch_parallel_context,
        tpc,
    )

__version__ = "0.1.0.dev0"

_HOME = {
    "torchdistpackage.errors": (
        "CheckpointError DeadlockError PipelineError ScheduleError SplitError TopologyError TorchDistError "
        "TransportError"
    ),
    "torchdistpackage.parallel": (
        "DDP PipelineGradScaler clip_grad_norm_ draw_last_step flat_and_partition flatten_model flatten_sequence "
        "forward_backward forward_eval last_plan last_timeline local_stages partition_balanced partition_chunks "
        "partition_uniform profile_stage_costs split_model tie_parameters"
    ),
    "torchdistpackage.schedule": "Routed",
    "torchdistpackage.split": (
        "Pipe SplitPoint load_whole_model_state_dict pipe_split pipeline whole_model_names whole_model_state_dict"
    ),
    "torchdistpackage.topology": (
        "ParallelContext find_free_port is_using_pp setup_distributed setup_node_groups test_comm "
        "torch_parallel_context tpc"
    ),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names.split()}

__all__ = [
    "DDP",
    "CheckpointError",
    "DeadlockError",
    "ParallelContext",
    "Pipe",
    "PipelineError",
    "PipelineGradScaler",
    "Routed",
    "ScheduleError",
    "SplitError",
    "SplitPoint",
    "TopologyError",
    "TorchDistError",
    "TransportError",
    "clip_grad_norm_",
    "draw_last_step",
    "find_free_port",
    "flat_and_partition",
    "flatten_model",
    "flatten_sequence",
    "forward_backward",
    "forward_eval",
    "is_using_pp",
    "last_plan",
    "last_timeline",
    "load_whole_model_state_dict",
    "local_stages",
    "partition_balanced",
    "partition_chunks",
    "partition_uniform",
    "pipe_split",
    "pipeline",
    "profile_stage_costs",
    "setup_distributed",
    "setup_node_groups",
    "split_model",
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
