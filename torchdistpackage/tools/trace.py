"""One run of a model under torch.profiler: a trace with the modules in it, and the operations that take longest.

The table of modules is not made from it, see `laps.py` for why; it answers what comes after the table: what does this
module do all the time, and what does the device wait for? The ranges that name the modules are opened by `ranges.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from torchdistpackage.tools.ranges import backward_name, profiler_runs

__all__ = ["check_no_profiler", "checked_path", "operations_table", "profiler_for"]


def checked_path(trace: str | os.PathLike[str]) -> Path:
    """Where the trace goes, if one can be written there; nothing is created.

    Raises:
        ValueError: The name does not end in .json or .json.gz.
        FileNotFoundError: There is no such folder.
        PermissionError: The file, or a new file in the folder, may not be written.

    Example:
        >>> checked_path("trace.txt")
        Traceback (most recent call last):
        ValueError: trace must end in .json or .json.gz, as torch.profiler writes no other format; got trace.txt
    """
    path = Path(trace)
    if not path.name.endswith((".json", ".json.gz")) or path.is_dir():
        raise ValueError(
            f"trace must end in .json or .json.gz, as torch.profiler writes no other format; got {path}"
            + (", which is a folder" if path.is_dir() else "")
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the trace cannot be written to {path}: there is no folder {path.parent}, create it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        what = "the file is there and" if path.exists() else f"the folder {path.parent}"
        raise PermissionError(f"the trace cannot be written to {path}: {what} is not writable, choose another path")
    return path


def check_no_profiler() -> None:
    """Raises RuntimeError if a profiler runs, as torch has one at a time."""
    if profiler_runs():
        raise RuntimeError(
            "a profiler runs already, and torch has one at a time: leave out trace and operations (the modules are in "
            "the trace of yours anyway), or call get_model_profile outside of it"
        )


def profiler_for(tensors: Iterable[torch.Tensor]) -> profile:
    """A profiler of the CPU and of the devices that these tensors are on, not started yet.

    Example:
        >>> with profiler_for([torch.zeros(1)]) as profiler:
        ...     _ = torch.zeros(2).exp()
        >>> "aten::exp" in operations_table(profiler, ())
        True
    """
    kinds = {"cpu", *(tensor.device.type for tensor in tensors)}
    supported = supported_activities()  # type: ignore[no-untyped-call]
    activities = [activity for activity in supported if activity.name.lower() in kinds]
    return profile(activities=activities, profile_memory=True)


def operations_table(profiler: profile, modules: Iterable[str], most: int = 20) -> str:
    """The operations that took longest by themselves, on the device if there is one.

    Args:
        profiler: Has run.
        modules: Names of modules, whose ranges are left out: they are no operations.
        most: Rows; negative for all.
    """
    ranges = {name for module in modules for name in (module, backward_name(module))}
    averages = profiler.key_averages()
    averages[:] = [average for average in averages if average.key not in ranges]
    order = "self_cpu_time_total" if set(profiler.activities) == {ProfilerActivity.CPU} else "self_device_time_total"
    table = averages.table(sort_by=order, row_limit=most)
    return "\n".join(line.rstrip() for line in table.splitlines() if line)
