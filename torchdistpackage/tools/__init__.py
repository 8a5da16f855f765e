"""LOOKING INTO A MODEL: what its modules cost, where numbers go bad, how to swap modules, how to repeat a run.

=====================  =============================================================================
`randomness.py`        one seed for every generator
`replace.py`           modules of one kind -> modules of another
`quantized.py`         the same, towards 8-bit linear layers of other packages
`profile.py`           time and memory of every module, there and back
`profile_table.py`     the numbers, and the table that says what to checkpoint first
`recorder.py`          what `profile.py` hooks into the model; `laps.py` is its stop watch
`trace.py`             one run under torch.profiler; `ranges.py` puts the modules' names in
`nan_finder.py`        the first module, operation or parameter with a NaN or Inf
`non_finite.py`        what is said about it
`finite.py`            the same for one value or one module, by hand
`module_calls.py`      which module runs now, and in which others; serves the profile and the finder
`graph_nodes.py`       which autograd nodes a call made; likewise
`values.py`            tensors in whatever modules take and return, and their bytes
=====================  =============================================================================

The tools need one process and know nothing of ranks, groups or `tpc`: they look at the part of the model that this
rank has. Of the other rooms only `split.calls` is used, which puts a model back as it was. The names below are loaded
on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.tools.finite import bwd_hook_wrapper, check_model_params, check_tensors, fwd_hook_wrapper
    from torchdistpackage.tools.nan_finder import NanFinder, NonFinite, find_nan
    from torchdistpackage.tools.profile import get_model_profile, register_profile_hooks
    from torchdistpackage.tools.profile_table import ModelProfile, ModuleCost, report_prof, sort_mem_time_ratio
    from torchdistpackage.tools.quantized import replace_linear_by_bminf, replace_linear_by_bnb
    from torchdistpackage.tools.randomness import fix_rand
    from torchdistpackage.tools.replace import replace_all_module

_HOME = {
    "finite": "bwd_hook_wrapper check_model_params check_tensors fwd_hook_wrapper",
    "nan_finder": "NanFinder NonFinite find_nan",
    "profile": "get_model_profile register_profile_hooks",
    "profile_table": "ModelProfile ModuleCost report_prof sort_mem_time_ratio",
    "quantized": "replace_linear_by_bminf replace_linear_by_bnb",
    "randomness": "fix_rand",
    "replace": "replace_all_module",
}
_FILE = {name: file for file, names in _HOME.items() for name in names.split()}

__all__ = [
    "ModelProfile",
    "ModuleCost",
    "NanFinder",
    "NonFinite",
    "bwd_hook_wrapper",
    "check_model_params",
    "check_tensors",
    "find_nan",
    "fix_rand",
    "fwd_hook_wrapper",
    "get_model_profile",
    "register_profile_hooks",
    "replace_all_module",
    "replace_linear_by_bminf",
    "replace_linear_by_bnb",
    "report_prof",
    "sort_mem_time_ratio",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
