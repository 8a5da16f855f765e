"""What is kept between steps: the transport of the pipeline, compiled plans, and what was last run and measured.

It belongs to the pipeline group that is set up now; another `setup_process_groups` starts afresh. Neighbours:
`pipeline_sched.py` and `profile.py` run steps with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.measure import MeasuredStep
from torchdistpackage.parallel.replicas import Replicas
from torchdistpackage.parallel.step_plan import AutoPlan
from torchdistpackage.runtime.board import StoreBoard
from torchdistpackage.runtime.executor import Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.p2p import DistributedTransport
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.runtime.watch import Watch
from torchdistpackage.runtime.watchdog import Watchdog
from torchdistpackage.schedule import Plan, Timeline
from torchdistpackage.topology import tpc
from torchdistpackage.topology.launch import store_host
from torchdistpackage.topology.pipeline_links import PipelineLinks

__all__ = [
    "PipelineState",
    "current_state",
    "draw_last_step",
    "guarded",
    "last_plan",
    "last_timeline",
    "running_step",
    "step_under_way",
]

_MOST_PLANS = 64  # a caller with a new number of micro-batches every step must not fill the memory


@dataclass
class PipelineState:
    """One pipeline group, seen from this rank.

    Attributes:
        links: How this rank reaches the others.
        transport: To the ranks of its pipeline.
        replicas: Those that hold the same stages, by mode ("data", "tensor"), where there are any.
        executors: One for each plan that was run.
        planners: One for each kind of step that is planned from measured costs.
        plan: What the last step ran.
        step: What was last recorded.
    """

    links: PipelineLinks
    transport: Transport
    replicas: Mapping[str, Replicas]
    executors: dict[Plan, Executor] = field(default_factory=dict)
    planners: dict[Any, AutoPlan] = field(default_factory=dict)
    plan: Plan | None = None
    step: MeasuredStep | None = None
    _epoch: int = 0

    def recover(self) -> None:
        """Comes at the begin of each step: after a failure, no rank goes on before its replicas have heard of it.

        One of them may still wait in a collective of the failed step, which must not meet one of the next.

        Raises:
            RemoteFailure: It has closed its groups to get out of there.
        """
        if self._epoch != self.transport.epoch:
            for replicas in self.replicas.values():
                replicas.agree()
            self._epoch = self.transport.epoch

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The pipeline's group that moves CPU tensors; None for a pipeline of one rank."""
        return None if self.links.pipe is None else self.links.pipe.control

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
    links = tpc.links
    if not _kept or _kept[0].links is not links:
        if _kept and _kept[0].transport.watchdog is not None:
            _kept[0].transport.watchdog.stop()
        _kept[:] = [_connected(links)]
    return _kept[0]


@contextmanager
def guarded(action: str) -> Iterator[None]:
    """Surrounds a collective of this library beside the steps: if a rank fails, all say which, as in a step.

    Args:
        action: What it is, for messages to people.
    """
    transport = current_state().transport
    if transport.watchdog is not None:
        transport.watchdog.start()  # there may not have been a step yet
    with transport.guard(action):
        yield


def guarded_if_set_up(action: str) -> AbstractContextManager[None]:
    """`guarded`, for what also works without `tpc`: there it does nothing."""
    return guarded(action) if tpc._is_inited("global") else nullcontext()


_steps: list[None] = []  # one entry for each step that runs


@contextmanager
def running_step() -> Iterator[None]:
    """Surrounds the backwards of a step: who reduces gradients by hooks waits until it is over."""
    _steps.append(None)
    try:
        yield
    finally:
        _steps.pop()


def step_under_way() -> bool:
    """Whether a step runs, so that gradients are not complete."""
    return bool(_steps)


def _connected(links: PipelineLinks) -> PipelineState:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    watchdog = None
    if links.pipe is not None or links.replicas:
        store = dist.distributed_c10d._get_default_store()
        watchdog = Watchdog(
            Watch(),
            StoreBoard(store, f"torchdistpackage/{links.number}"),  # one board for all pipelines of this set-up
            ranks=tpc.get_ranks_in_group("pipe"),
            rank=tpc.get_pp_rank(),
            patience=links.watchdog,
            world_size=dist.get_world_size(),
            interrupt=links.interrupt,
            board_host=store_host(),
            device_waits=links.on_device,
        )
    transport: Transport = loopback(1, device=device, watchdog=watchdog)[0]
    if links.pipe is not None:
        transport = DistributedTransport(
            links.pipe.control, links.edges, device=device, switchboard=links.pipe.door, watchdog=watchdog
        )
    replicas = {}
    for mode, link in links.replicas.items():
        way = DistributedTransport(link.control, device=device, switchboard=link.door, watchdog=watchdog)
        replicas[mode] = Replicas(way, mode)
        transport.companions.append(way)
    return PipelineState(links, transport, replicas)


def last_plan() -> Plan | None:
    """The plan that the last step ran; None before the first.

    Example:
        >>> from torchdistpackage import forward_eval
        >>> _ = forward_eval(torch.nn.Linear(2, 2), torch.ones(3, 2), num_microbatches=3)
        >>> last_plan().name, last_plan().num_microbatches
        ('1f1b', 3)
    """
    return _kept[0].plan if _kept else None


def last_timeline() -> Timeline | None:
    """What `record_timeline` measured in the last recorded step, the same on every rank; None before the first.

    Example:
        >>> from torchdistpackage import forward_eval
        >>> _ = forward_eval(torch.nn.Linear(2, 2), torch.ones(3, 2), num_microbatches=3, record_timeline=True)
        >>> [str(span.action) for span in last_timeline().spans[0]], last_timeline().unit  # of the first rank
        (['0F0', '0F1', '0F2'], 's')
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
        >>> from torchdistpackage import forward_eval
        >>> _ = forward_eval(torch.nn.Linear(2, 2), torch.ones(3, 2), num_microbatches=3, record_timeline=True)
        >>> if tpc.get_pp_rank() == 0:
        ...     draw_last_step("step.json")
        >>> os.path.isfile("step.json")
        True
    """
    if not _kept or _kept[0].step is None:
        raise PipelineError("no step was recorded; call forward_backward(..., record_timeline=True) first")
    _kept[0].step.draw(path)
