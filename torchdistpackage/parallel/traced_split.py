"""`split/traced.py` with the ranks filled in: one rank measures, all cut at the same places.

Measured times differ from process to process, and a cut that differs would lose layers without a word. So the first
rank of the first pipeline finds the cut and the others apply it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.first_rank import decided_by_the_first_rank
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Placement, Plan
from torchdistpackage.split.cutting import Cut
from torchdistpackage.split.pipe import Pipe
from torchdistpackage.split.report import SplitReport, StageRow
from torchdistpackage.split.traced import split
from torchdistpackage.split.traced_stage import TracedStage
from torchdistpackage.topology import tpc

__all__ = ["local_stages", "split_model"]


def split_model(
    model: nn.Module,
    example_inputs: Any,
    num_stages: int | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipe:
    """Cuts any model that can be traced into stages of equal cost, alike on every rank.

    Where process groups are set up, every rank makes the call, with the same model and options: the first rank
    measures, and the others use its cut. Elsewhere it is `torchdistpackage.split.split`.

    Args:
        model: Any module; it stays as it is.
        example_inputs: What it is called with, of the size of a micro-batch: one tensor, or a tuple of arguments.
        num_stages: Stages of the whole pipeline; one a rank when not given.
        example_kwargs: Keyword arguments.
        options: Those of `torchdistpackage.split.split`: `costs`, `sizes`, `layout`, `together`, `stage_of`,
            `memory_limit`, `leaf_modules`, `leaf_functions`, `open_modules`, `repeats`, `tolerance`.

    Returns:
        The stages; `pipe.get_stage_module(i)` or `local_stages(pipe, schedule)` gives those of this rank.

    Raises:
        SplitError: The model cannot be traced, or no cut satisfies the options.
        PipelineError: Another rank failed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pipe = split_model(model, torch.zeros(4, 2), num_stages=2 * tpc.get_pp_size())
        >>> [list(name for name, _ in pipe.get_stage_module(index).named_parameters()) for index in range(2)]
        [['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    if not dist.is_initialized() or not tpc.is_mode_inited("pipe"):
        return split(model, example_inputs, 1 if num_stages is None else num_stages, example_kwargs, **options)
    with guarded("split_model"):
        count = tpc.get_pp_size() if num_stages is None else num_stages
        return split(model, example_inputs, count, example_kwargs, **options, agree=_cut_of_the_first_rank)


def local_stages(
    pipe: Pipe, schedule: str | Plan | Placement | os.PathLike[str] = "1f1b", chunks: int | None = None
) -> dict[int, TracedStage]:
    """This rank's stages of a traced model under a schedule.

    Args:
        pipe: The cut model.
        schedule: Says which rank owns which stage: as for `partition_chunks`.
        chunks: Stages a rank, where a name leaves the choice; as many as the pipe has when not given.

    Returns:
        Global index of the stage -> its module, in the order of the model; lists for `fwd_fn` and `inputs` have the
        same order.

    Raises:
        SplitError: The schedule has another number of stages than the pipe.
        ScheduleError: The schedule is unknown or does not run that many chunks.
        TopologyError: The process groups are not set up.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pipe = split_model(model, torch.zeros(4, 2), num_stages=2 * tpc.get_pp_size())
        >>> list(local_stages(pipe, "zb-v"))  # on one rank; rank 0 of 4 has stages 0 and 7
        [0, 1]
    """
    ranks = tpc.get_pp_size()
    if chunks is None and isinstance(schedule, str) and pipe.num_stages % ranks == 0:
        chunks = pipe.num_stages // ranks
    placement = placement_of(schedule, ranks, chunks)
    if placement.num_stages != pipe.num_stages:
        raise SplitError(
            f"the model is cut into {pipe.num_stages} stages, and the schedule has {placement.num_stages} on {ranks} "
            f"ranks; pass num_stages={placement.num_stages} to split_model"
        )
    return {stage: pipe.get_stage_module(stage) for stage in placement.local_stages(tpc.get_pp_rank())}


def _cut_of_the_first_rank(find: Callable[[], Cut]) -> Cut:
    """What one rank decides, for all."""
    found = decided_by_the_first_rank(lambda: dataclasses.asdict(find()), "cut the model")
    report = dict(found["report"])
    rows = tuple(StageRow(**{**row, "layers": tuple(row["layers"])}) for row in report.pop("rows"))
    return Cut(
        tuple(found["opened"]), tuple(found["closed"]), tuple(found["boundaries"]), SplitReport(rows=rows, **report)
    )
