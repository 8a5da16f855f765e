"""What is kept between steps: the transport of the pipeline, compiled plans, and what was last run and measured.

It belongs to the pipeline group that is set up now; another `setup_process_groups` starts afresh. Neighbours:
`pipeline_sched.py` and `profile.py` run steps with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.measure import MeasuredStep
from torchdistpackage.parallel.step_plan import AutoPlan
from torchdistpackage.runtime.executor import Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.p2p import DistributedTransport
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Plan, Timeline
from torchdistpackage.topology import tpc

__all__ = ["PipelineState", "current_state", "draw_last_step", "last_plan", "last_timeline"]

_MOST_PLANS = 64  # a caller with a new number of micro-batches every step must not fill the memory


@dataclass
class PipelineState:
    """One pipeline group, seen from this rank.

    Attributes:
        group: The group; None for a pipeline of one rank.
        control: The group that moves CPU tensors.
        transport: This rank's.
        executors: One for each plan that was run.
        planners: One for each kind of step that is planned from measured costs.
        plan: What the last step ran.
        step: What was last recorded.
    """

    group: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    transport: Transport
    executors: dict[Plan, Executor] = field(default_factory=dict)
    planners: dict[Any, AutoPlan] = field(default_factory=dict)
    plan: Plan | None = None
    step: MeasuredStep | None = None

    def executor(self, plan: Plan) -> Executor:
        """The executor of a plan, made once."""
        executor = self.executors.get(plan)
        if executor is None:
            if len(self.executors) >= _MOST_PLANS:
                self.executors.clear()
            executor = self.executors[plan] = Executor(plan, self.transport)
        return executor


_kept: list[PipelineState] = []


def current_state() -> PipelineState:
    """The state of the current pipeline group; a pipeline of one rank needs no processes.

    Raises:
        TopologyError: Process groups have not been set up.
    """
    size = tpc.get_pp_size()
    group = tpc.get_group("pipe") if size > 1 else None
    control = tpc.get_control_group("pipe") if size > 1 else None
    if not _kept or _kept[0].group is not group:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        transport: Transport = loopback(1, device=device)[0]
        if control is not None:
            transport = DistributedTransport(control, tpc.get_edge_groups(), device=device, switchboard=tpc.get_door())
        _kept[:] = [PipelineState(group, control, transport)]
    return _kept[0]


def last_plan() -> Plan | None:
    """The plan that the last step ran; None before the first.

    Example:
        >>> loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=8, schedule="auto")
        >>> print(last_plan().to_text())
    """
    return _kept[0].plan if _kept else None


def last_timeline() -> Timeline | None:
    """What `record_timeline` measured in the last recorded step, the same on every rank; None before the first.

    Example:
        >>> loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=8, record_timeline=True)
        >>> print(last_timeline().bubble_share)
    """
    return _kept[0].step.timeline if _kept and _kept[0].step else None


def draw_last_step(path: str | os.PathLike[str]) -> None:
    """Draws what `record_timeline` measured last beside its simulation; on any rank, without the others.

    Args:
        path: A picture (`.png`, `.svg`, `.pdf`), or a trace for Perfetto (`.json`).

    Raises:
        PipelineError: No step was recorded.
        ModuleNotFoundError: A picture needs matplotlib; the message names the extra.

    Example:
        >>> loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=8, record_timeline=True)
        >>> if tpc.get_pp_rank() == 0:
        ...     draw_last_step("step.png")
    """
    if not _kept or _kept[0].step is None:
        raise PipelineError("no step was recorded; call forward_backward(..., record_timeline=True) first")
    _kept[0].step.draw(path)
