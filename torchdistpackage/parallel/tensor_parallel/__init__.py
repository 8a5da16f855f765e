"""Tensor parallelism: layers whose columns or rows lie on several ranks, on torch's DTensor.

`plans.py` shards models that know nothing of it, with torch's styles and those of `styles.py`; `layers.py`,
`attn.py`, `mlp.py` and `transformer.py` are layers made for it; `regions.py` has the steps in and out of them.
"""

from torchdistpackage.parallel.tensor_parallel.attn import Attention, TpAttention
from torchdistpackage.parallel.tensor_parallel.group import get_tp_group, set_tp_group, tensor_mesh
from torchdistpackage.parallel.tensor_parallel.layers import (
    ColParallelLinear,
    RowParallelLinear,
    TpLayerNorm,
    TpLinear,
)
from torchdistpackage.parallel.tensor_parallel.mlp import Mlp, TpMlp
from torchdistpackage.parallel.tensor_parallel.plans import apply_tensor_parallel, tensor_parallel_plan
from torchdistpackage.parallel.tensor_parallel.regions import (
    enter_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    get_tensor_model_parallel_world_size,
    is_sequence_parallel_tensor,
    is_squence_parallel_tensor,
    leave_tensor_parallel_region,
    maybe_gather_from_sequence_parallel,
    maybe_split_into_sequence_parallel,
    reduce_scatter_to_sequence_parallel_region,
    set_sequence_parallel_attr,
)
from torchdistpackage.parallel.tensor_parallel.styles import FreshRowwise, FusedColwise, SharedColwise, WholeOnShards
from torchdistpackage.parallel.tensor_parallel.transformer import Block, ParallelBlock, Transformer

__all__ = [
    "Attention",
    "Block",
    "ColParallelLinear",
    "FreshRowwise",
    "FusedColwise",
    "Mlp",
    "ParallelBlock",
    "RowParallelLinear",
    "SharedColwise",
    "TpAttention",
    "TpLayerNorm",
    "TpLinear",
    "TpMlp",
    "Transformer",
    "WholeOnShards",
    "apply_tensor_parallel",
    "enter_tensor_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "is_sequence_parallel_tensor",
    "is_squence_parallel_tensor",
    "leave_tensor_parallel_region",
    "maybe_gather_from_sequence_parallel",
    "maybe_split_into_sequence_parallel",
    "reduce_scatter_to_sequence_parallel_region",
    "set_sequence_parallel_attr",
    "set_tp_group",
    "tensor_mesh",
    "tensor_parallel_plan",
]
