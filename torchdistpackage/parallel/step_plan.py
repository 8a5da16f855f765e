"""Which plan a step runs: by name, a user's own, or chosen from what the user's model really costs.

The choice (`schedule="auto"`) is made while training goes on, in steps that count like any other::

    step 1        step 2, 3               step 4          step 5, 6                        step 7, 8, ...
    warm-up       whole backwards timed   warm-up, split  halves timed, then: gather,      the planned schedule
                                                          plan on rank 0, broadcast

The first rank sees the batch, so it decides in which of these a step is, and says so down the ranks ahead of its first
message: nobody waits longer than for that message anyway. Another shape of the batch has its own count. Replicas of the
pipeline (data, tensor) follow the first one: their collectives must come in one order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdistpackage.errors import ScheduleError
from torchdistpackage.parallel.measure import MeasuredStep, stage_costs
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import (
    Placement,
    Plan,
    build,
    canonical_name,
    complete,
    describe,
    names,
    peak_activations,
    planner,
    split_backwards,
    without_communication,
)
from torchdistpackage.topology.exchange import broadcast_json

__all__ = ["AutoPlan", "is_auto", "leanest_plan", "placement_of", "resolve_plan"]

_log = logging.getLogger(__name__)
_DECISION = 4  # what an exchange is about, in the place of a micro-batch's number; see `measure.py`
_AUTO = {"auto": "loop", "auto-v": "v"}  # how the user has placed the chunks

# What the steps of one shape do, one after the other; after the last one the planned schedule runs.
_WARM_UP, _TIME_WHOLE, _WARM_UP_SPLIT, _TIME_SPLIT, _PLANNED = range(5)
_STEPS = (_WARM_UP, _TIME_WHOLE, _TIME_WHOLE, _WARM_UP_SPLIT, _TIME_SPLIT, _TIME_SPLIT)


def is_auto(schedule: Any) -> bool:
    """Whether the schedule is to be planned from measured costs."""
    return isinstance(schedule, str) and schedule.lower() in _AUTO


def placement_of(
    schedule: str | Plan | Placement | os.PathLike[str], num_ranks: int, chunks: int | None = None
) -> Placement:
    """Which rank owns which stage under a schedule.

    Args:
        schedule: A name of the catalogue, `"auto"`, `"auto-v"`, a Plan, the path of a CSV file with one, a Placement.
        num_ranks: Ranks of the pipeline.
        chunks: Stages a rank, where a name leaves the choice.

    Raises:
        ScheduleError: Unknown, made for other ranks, or not for that many chunks.
    """
    given: Any = _loaded(schedule)
    if isinstance(given, str):
        if is_auto(given):
            where = _AUTO[given.lower()]
            return Placement.v(num_ranks, chunks or 2) if where == "v" else Placement.loop(num_ranks, chunks or 1)
        facts = describe(canonical_name(given, _AUTO))
        if not facts.runs(chunks or facts.chunks):
            raise ScheduleError(
                f"schedule {facts.name!r} does not run {chunks} stages a rank; its own are {facts.chunks}"
            )
        return facts.place(num_ranks, chunks or facts.chunks)
    placement = given.placement if isinstance(given, Plan) else given
    if placement.num_ranks != num_ranks:
        raise ScheduleError(f"the placement is for {placement.num_ranks} ranks; this pipeline has {num_ranks}")
    return placement


def resolve_plan(
    schedule: str | Plan | os.PathLike[str],
    num_ranks: int,
    num_microbatches: int,
    *,
    forward_only: bool,
    chunks: int | None,
) -> Plan:
    """The proved plan of a step whose schedule is given.

    Args:
        schedule: A name of the catalogue, the path of a CSV file (a name that ends in `.csv`, or a path object), or a
            Plan, with or without communication.
        num_ranks: Ranks of the pipeline.
        num_microbatches: As the user asked for.
        forward_only: Keep the forwards only.
        chunks: Stages of this rank, if the user's functions say so.

    Raises:
        ScheduleError: Unknown, wrong, or made for other sizes.
    """
    given: Any = _loaded(schedule)
    if not isinstance(given, Plan):
        name = canonical_name(given, _AUTO)
        return build(name, num_ranks, num_microbatches, forward_only=forward_only, chunks=chunks)
    found = (given.placement.num_ranks, given.num_microbatches)
    if found != (num_ranks, num_microbatches):
        raise ScheduleError(
            f"plan {given.name!r} is made for {found[0]} ranks and {found[1]} micro-batches; this pipeline has "
            f"{num_ranks} and num_microbatches is {num_microbatches}"
        )
    if given.forward_only and not forward_only:
        raise ScheduleError(f"plan {given.name!r} has no backward; pass forward_only=True, or a training plan")
    return _complete(given, forward_only)


def _loaded(schedule: Any) -> Any:
    """The plan that a path stands for; anything else as it is."""
    if isinstance(schedule, os.PathLike) or (isinstance(schedule, str) and schedule.lower().endswith(".csv")):
        return _read(str(schedule), _changed(schedule))
    return schedule


@lru_cache(maxsize=64)
def _complete(plan: Plan, evaluation: bool) -> Plan:
    return complete(plan, evaluation=evaluation)


def _changed(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError as error:
        raise ScheduleError(f"cannot read the schedule {str(path)!r}: {error.strerror}") from error


@lru_cache(maxsize=16)
def _read(path: str, changed: int) -> Plan:
    return Plan.from_csv(Path(path).read_text(), name=Path(path).name)


@dataclass
class _Shape:
    """One shape of the batch, on one rank."""

    steps: int = 0
    samples: list[MeasuredStep] = field(default_factory=list)
    plan: Plan | None = None


@final
class AutoPlan:
    """Plans the schedule of one pipeline for one number of micro-batches.

    Args:
        transport: This rank's.
        group: The pipeline's control group; None for a pipeline of one rank.
        schedule: `"auto"` (chunks placed in a loop) or `"auto-v"` (in a v).
        num_microbatches: m.
        chunks: Stages of a rank.
        memory_limit: Bytes of activations that a rank may hold.
        replicas: Groups over which this pipeline has replicas, for CPU tensors.

    Raises:
        ScheduleError: No schedule of the catalogue fits the placement and the chunks.
    """

    def __init__(
        self,
        transport: Transport,
        group: dist.ProcessGroup | None,
        schedule: str,
        num_microbatches: int,
        chunks: int,
        memory_limit: float | None,
        *,
        replicas: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self._transport, self._group, self._replicas = transport, group, replicas
        self._placement, self._memory_limit = _AUTO[schedule.lower()], memory_limit
        self._whole = leanest_plan(self._placement, transport.num_ranks, num_microbatches, chunks)
        self._split = complete(split_backwards(without_communication(self._whole)))
        self._shapes: dict[int, _Shape] = {}
        self._numbers: dict[Any, int] = {}  # on the first rank: what a batch looks like -> its number
        self._step = (0, _PLANNED)

    def evaluation(self) -> Plan:
        """The plan for `forward_only`: needs no costs, the forwards of any schedule fill the pipeline."""
        return _complete(self._whole, True)

    def begin(self, inputs: Any) -> Plan:
        """Which plan this step runs. Every rank calls it, the first one with the batch.

        Args:
            inputs: The first stage's inputs, on the first rank.
        """
        self._transport.announce(f"schedule 'auto', {self._whole.num_microbatches} micro-batches")
        number, kind = self._decide(inputs)
        self._step = (number, kind)
        shape = self._shapes.setdefault(number, _Shape())
        if kind == _PLANNED:
            assert shape.plan is not None
            return shape.plan
        return self._whole if kind in (_WARM_UP, _TIME_WHOLE) else self._split

    def recorder(self) -> Recorder | None:
        """What has to record this step."""
        kind = self._step[1]
        if kind not in (_TIME_WHOLE, _TIME_SPLIT):
            return None
        return Recorder(self._transport.device, memory=kind == _TIME_WHOLE)

    def end(self, measured: MeasuredStep | None) -> None:
        """Comes after a step that went well, on every rank; after the last timed one the plan is made."""
        number, kind = self._step
        shape = self._shapes[number]
        if kind == _PLANNED:
            return
        shape.steps += 1
        if measured is not None and kind in (_TIME_WHOLE, _TIME_SPLIT):
            shape.samples.append(measured)
        if shape.steps == len(_STEPS):
            shape.plan = self._make(shape.samples)
            shape.samples = []

    def _decide(self, inputs: Any) -> tuple[int, int]:
        transport = self._transport
        if transport.rank == 0:
            look = tuple(_look(leaf) for leaf in pytree.tree_leaves(inputs))
            number = self._numbers.setdefault(look, len(self._numbers))
            steps = self._shapes[number].steps if number in self._shapes else 0
            decision = torch.tensor([number, _STEPS[steps] if steps < len(_STEPS) else _PLANNED])
            for group in self._replicas:
                dist.broadcast(decision, src=dist.get_global_rank(group, 0), group=group)
            number, kind = map(int, decision.tolist())
        else:
            number, kind = _hear(transport)
        if transport.rank + 1 < transport.num_ranks:
            leaves, spec = flatten(torch.tensor([number, kind]))
            transport.outlet(transport.rank + 1).send(Kind.VALUE, transport.rank, _DECISION, 0, leaves, spec)
        return number, kind

    def _make(self, samples: list[MeasuredStep]) -> Plan:
        """Plans on the first rank and gives every rank the result; an error goes round as well."""
        costs = stage_costs(samples, self._whole.placement.num_stages)
        found: Any = None
        first = self._transport.rank == 0
        if first and all(dist.get_rank(group) == 0 for group in self._replicas):
            try:
                planned = planner.plan(
                    costs,
                    self._transport.num_ranks,
                    self._whole.num_microbatches,
                    self._memory_limit,
                    placement=self._whole.placement,
                )
                found = [planned.plan.name, planned.plan.to_csv()]
                _log.info("planned %s: %.1f %% above the lower bound", planned.plan.name, 100 * (planned.ratio - 1))
            except ScheduleError as error:
                found = str(error)
        for group in [*(self._replicas if first else ()), *([] if self._group is None else [self._group])]:
            found = broadcast_json(found, group)
        if isinstance(found, str):
            raise ScheduleError(f"no schedule could be planned: {found}")
        name, text = found
        return complete(Plan.from_csv(text, name=f"auto: {name}"))


def _look(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else type(leaf).__name__


def _hear(transport: Transport) -> tuple[int, int]:
    message = transport.inlet(transport.rank - 1).take(Kind.VALUE, transport.rank - 1, _DECISION)
    number, kind = message.tensors[0].tolist()
    return int(number), int(kind)


def leanest_plan(placement: str, num_ranks: int, num_microbatches: int, chunks: int) -> Plan:
    """The unsplit schedule of the catalogue that holds the fewest activations: it must run before memory is known."""
    fitting = [name for name in names() if (facts := describe(name)).placement == placement and facts.runs(chunks)]
    plans = [build(name, num_ranks, num_microbatches, chunks=chunks) for name in fitting if not describe(name).split]
    if not plans:
        raise ScheduleError(
            f"no schedule without a split backward runs {chunks} stage(s) a rank in {placement} placement; pass "
            "fwd_fn with another number of functions, or name a schedule"
        )
    return min(plans, key=lambda plan: (max(peak_activations(plan)), plan.name))
