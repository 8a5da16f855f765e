"""Tensor parallelism: layers whose columns or rows lie on several ranks, on torch's DTensor."""

from torchdistpackage.parallel.tensor_parallel.group import get_tp_group, set_tp_group, tensor_mesh
from torchdistpackage.parallel.tensor_parallel.plans import apply_tensor_parallel, tensor_parallel_plan
from torchdistpackage.parallel.tensor_parallel.styles import FreshRowwise, FusedColwise, SharedColwise, WholeOnShards

__all__ = [
    "FreshRowwise",
    "FusedColwise",
    "SharedColwise",
    "WholeOnShards",
    "apply_tensor_parallel",
    "get_tp_group",
    "set_tp_group",
    "tensor_mesh",
    "tensor_parallel_plan",
]
