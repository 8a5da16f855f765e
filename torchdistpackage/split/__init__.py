"""MODEL -> STAGES: several doors, one product, and one place that decides where to cut.

====================  ============================================================================
`boundaries.py`       costs -> cut points; the only layer-distribution code, without torch
`constraints.py`      what cuts must keep to: pins, forbidden places, memory, bytes sent
`constrained.py`      the best cut among those that keep to it
`layout_string.py`    Megatron-LM's layout strings -> cut points
`cost.py`             a row of layers -> parameters, FLOPs, measured time, bytes at the cuts
`calls.py`            one call of anything -> seconds there and back, FLOPs, saved activations
`report.py`           the table of a split
`sequential.py`       a list of layers -> a row -> one stage's slice of it
`execution_order.py`  the list, found by tracing
`traced.py`           any model -> stages, by tracing: `split` and `pipeline`
`tracer.py`           the forward as a graph of whole modules; `symbols.py`, `operations.py`, `recordable.py`,
                      `recording.py`, `marks.py`, `patches.py`, `type_answers.py` and `untraceable.py` serve it
`exported.py`         the same graph out of `torch.export`, for what that tracer cannot record
`unrepeatable.py`     what Python does in a forward and no recording holds: it is noticed, and not cut through
`graph.py`            the graph as a row that can be cut: what crosses a cut, where none may be
`cutting.py`          measures (`unit_costs.py`), cuts, opens what is too large to balance around
`building.py`         the cut graph -> `Pipe` (`pipe.py`), made of `TracedStage` modules (`traced_stage.py`)
`causal_lm.py`        decoder-only language models -> stages; `decoder/` is how, `causal_lm_names.py` counts and names
`parts/`              the same, physically split over three parties: Bottom, Trunk and Top
`pipeline_stage.py`   a stage with its place, for trainers
`signature.py`        how a model is called and what it returns, flat and back
`deferred_init.py`    a model that costs no memory, and later the values of a few stages, as if it had been built;
                      `init_recorder.py`, `init_tape.py` and `places.py` serve it
`names.py`            whole-model names of a stage's tensors; `whole_state.py` makes state dicts under them
`ties.py`             parameters that several stages share
`model_tensors.py`    a model's tensors under these names, through wrappers, as this rank holds them
====================  ============================================================================

The names below are loaded on first use (PEP 562), so that `boundaries` can be had without importing torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.split.boundaries import (
        LoadBalance,
        MemoryLimit,
        balanced_boundaries,
        boundaries_of_sizes,
        load_balance,
        uniform_boundaries,
        uniform_sizes,
    )
    from torchdistpackage.split.calls import CallCost, call_cost, undisturbed
    from torchdistpackage.split.causal_lm import (
        ModelSplitter,
        causal_lm_module_names,
        create_automatic_splitter,
        create_manual_causal_lm_splitter,
        new_cache,
        split_causal_lm,
    )
    from torchdistpackage.split.causal_lm_names import (
        calculate_virtual_stages,
        generate_hf_model_fqn_per_model_part,
        stage_ids_this_rank,
    )
    from torchdistpackage.split.cost import cut_bytes, flop_counts, layer_costs, measured_times, parameter_counts
    from torchdistpackage.split.decoder.materialize import materialize_stages
    from torchdistpackage.split.decoder.pretrained import load_stages
    from torchdistpackage.split.decoder.pretrained_saving import StageFiles, save_stage, write_index
    from torchdistpackage.split.deferred_init import RecordedInit, record_init
    from torchdistpackage.split.layout_string import layout_boundaries, parse_layout
    from torchdistpackage.split.names import whole_model_names
    from torchdistpackage.split.parts.base import BaseBottomModel, BaseTopModel, BaseTrunkModel
    from torchdistpackage.split.parts.factory import ModelFactory
    from torchdistpackage.split.parts.files import load_split_model
    from torchdistpackage.split.parts.registry import ModelRegistry
    from torchdistpackage.split.pipe import Pipe, PipeInfo
    from torchdistpackage.split.pipeline_stage import PipelineStage
    from torchdistpackage.split.report import SplitReport, StageRow
    from torchdistpackage.split.sequential import (
        CallableModule,
        balanced_partition,
        flatten_model,
        flatten_sequence,
        uniform_partition,
    )
    from torchdistpackage.split.ties import TiedParameter, shared_parameters, ties_in, ties_of
    from torchdistpackage.split.traced import SplitPoint, pipe_split, pipeline, split
    from torchdistpackage.split.traced_stage import TracedStage
    from torchdistpackage.split.whole_state import load_whole_model_state_dict, whole_model_state_dict

_HOME = {
    "boundaries": (
        "LoadBalance MemoryLimit balanced_boundaries boundaries_of_sizes load_balance uniform_boundaries uniform_sizes"
    ),
    "calls": "CallCost call_cost undisturbed",
    "causal_lm": (
        "ModelSplitter causal_lm_module_names create_automatic_splitter create_manual_causal_lm_splitter new_cache "
        "split_causal_lm"
    ),
    "causal_lm_names": "calculate_virtual_stages generate_hf_model_fqn_per_model_part stage_ids_this_rank",
    "cost": "cut_bytes flop_counts layer_costs measured_times parameter_counts",
    "decoder.materialize": "materialize_stages",
    "decoder.pretrained": "load_stages",
    "decoder.pretrained_saving": "StageFiles save_stage write_index",
    "deferred_init": "RecordedInit record_init",
    "layout_string": "layout_boundaries parse_layout",
    "names": "whole_model_names",
    "parts.base": "BaseBottomModel BaseTopModel BaseTrunkModel",
    "parts.factory": "ModelFactory",
    "parts.files": "load_split_model",
    "parts.registry": "ModelRegistry",
    "pipe": "Pipe PipeInfo",
    "pipeline_stage": "PipelineStage",
    "report": "SplitReport StageRow",
    "sequential": "CallableModule balanced_partition flatten_model flatten_sequence uniform_partition",
    "ties": "TiedParameter shared_parameters ties_in ties_of",
    "traced": "SplitPoint pipe_split pipeline split",
    "traced_stage": "TracedStage",
    "whole_state": "load_whole_model_state_dict whole_model_state_dict",
}
_FILE = {name: file for file, names in _HOME.items() for name in names.split()}

__all__ = [
    "BaseBottomModel",
    "BaseTopModel",
    "BaseTrunkModel",
    "CallCost",
    "CallableModule",
    "LoadBalance",
    "MemoryLimit",
    "ModelFactory",
    "ModelRegistry",
    "ModelSplitter",
    "Pipe",
    "PipeInfo",
    "PipelineStage",
    "RecordedInit",
    "SplitPoint",
    "SplitReport",
    "StageFiles",
    "StageRow",
    "TiedParameter",
    "TracedStage",
    "balanced_boundaries",
    "balanced_partition",
    "boundaries_of_sizes",
    "calculate_virtual_stages",
    "call_cost",
    "causal_lm_module_names",
    "create_automatic_splitter",
    "create_manual_causal_lm_splitter",
    "cut_bytes",
    "flatten_model",
    "flatten_sequence",
    "flop_counts",
    "generate_hf_model_fqn_per_model_part",
    "layer_costs",
    "layout_boundaries",
    "load_balance",
    "load_split_model",
    "load_stages",
    "load_whole_model_state_dict",
    "materialize_stages",
    "measured_times",
    "new_cache",
    "parameter_counts",
    "parse_layout",
    "pipe_split",
    "pipeline",
    "record_init",
    "save_stage",
    "shared_parameters",
    "split",
    "split_causal_lm",
    "stage_ids_this_rank",
    "ties_in",
    "ties_of",
    "undisturbed",
    "uniform_boundaries",
    "uniform_partition",
    "uniform_sizes",
    "whole_model_names",
    "whole_model_state_dict",
    "write_index",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Room(ModuleType):
    """`from torchdistpackage import split` names this room; called, it is the face's function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("torchdistpackage").split_model(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
