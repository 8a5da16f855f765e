"""MODEL -> STAGES: several doors, one product, and one place that decides where to cut.

===================  =============================================================================
`boundaries.py`      costs -> cut points; the only layer-distribution code, without torch
`cost.py`            parameters, FLOPs, measured time, bytes at the cuts
`sequential.py`      a list of layers -> a row -> one stage's slice of it
`names.py`           whole-model names of a stage's tensors; parameters that several stages share
===================  =============================================================================

The names below are loaded on first use (PEP 562), so that `boundaries` can be had without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.split.boundaries import balanced_boundaries, uniform_boundaries, uniform_sizes
    from torchdistpackage.split.cost import cut_bytes, flop_counts, layer_costs, measured_times, parameter_counts
    from torchdistpackage.split.names import (
        TiedParameter,
        load_whole_model_state_dict,
        shared_parameters,
        ties_in,
        ties_of,
        whole_model_names,
        whole_model_state_dict,
    )
    from torchdistpackage.split.sequential import (
        CallableModule,
        balanced_partition,
        flatten_model,
        flatten_sequence,
        uniform_partition,
    )

_HOME = {
    "boundaries": "balanced_boundaries uniform_boundaries uniform_sizes",
    "cost": "cut_bytes flop_counts layer_costs measured_times parameter_counts",
    "names": (
        "TiedParameter load_whole_model_state_dict shared_parameters ties_in ties_of whole_model_names "
        "whole_model_state_dict"
    ),
    "sequential": "CallableModule balanced_partition flatten_model flatten_sequence uniform_partition",
}
_FILE = {name: file for file, names in _HOME.items() for name in names.split()}

__all__ = [
    "CallableModule",
    "TiedParameter",
    "balanced_boundaries",
    "balanced_partition",
    "cut_bytes",
    "flatten_model",
    "flatten_sequence",
    "flop_counts",
    "layer_costs",
    "load_whole_model_state_dict",
    "measured_times",
    "parameter_counts",
    "shared_parameters",
    "ties_in",
    "ties_of",
    "uniform_boundaries",
    "uniform_partition",
    "uniform_sizes",
    "whole_model_names",
    "whole_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
