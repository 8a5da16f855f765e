r"""Steps that were timed: what every rank recorded, on one clock, as a timeline and as the costs of the stages.

::

    rank 0 | spans ---\                               / Timeline, on every rank (pictures, traces)
    rank 1 | spans ----> gather, one clock, one origin
    rank 2 | spans ---/                               \ CostModel (simulator, planner)

Clocks of two machines differ by more than a whole step; the offset of each rank's clock to that of the first is taken
from the fastest of a few round trips, as NTP does: half of what such a trip takes is the error.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Action, CostModel, Op, Plan, Span, Timeline, simulate
from torchdistpackage.topology.exchange import gather_json

__all__ = ["MeasuredStep", "measure_step", "stage_costs"]

_CLOCK = 3  # what an exchange is about, in the place of a micro-batch's number; see `tied_parameters.py`
_ROUND_TRIPS = 5


@dataclass(frozen=True)
class _Record:
    """What one rank tells the others."""

    spans: list[tuple[str, float, float]]
    activation_bytes: dict[int, int]
    message_bytes: dict[int, int]

    @classmethod
    def of(cls, said: dict[str, Any]) -> _Record:
        """From what JSON makes of it."""
        sizes = ({int(s): size for s, size in said[name].items()} for name in ("activation_bytes", "message_bytes"))
        return cls(said["spans"], *sizes)


@dataclass(frozen=True)
class MeasuredStep:
    """One step as it ran on all ranks.

    Attributes:
        plan: What was run.
        timeline: When each action ran; waiting for a message and sending one are spans of their own.
        activation_bytes: For every stage, what a micro-batch held between forward and backward, where measured.
        message_bytes: For every stage, what one forward sent on.
    """

    plan: Plan
    timeline: Timeline
    activation_bytes: dict[int, int]
    message_bytes: dict[int, int]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws the step next to the simulation with its own costs.

        Args:
            path: `.json` for a trace that Perfetto and Chrome open, anything else for a picture.

        Raises:
            ModuleNotFoundError: A picture needs matplotlib; the message names the extra.
        """
        from torchdistpackage.visualize import figure, write_trace  # a step without pictures does not load them

        simulated = simulate(self.plan, stage_costs([self], self.plan.placement.num_stages))
        if os.fspath(path).endswith(".json"):
            write_trace(path, simulated, measured=self.timeline)
        else:
            figure(simulated, path=path, measured=self.timeline)


def measure_step(transport: Transport, group: dist.ProcessGroup | None, plan: Plan, recorder: Recorder) -> MeasuredStep:
    """Puts together what all ranks recorded in one step. Collective over the pipeline.

    Args:
        transport: This rank's.
        group: The pipeline's control group; None for a pipeline of one rank.
        plan: What was run.
        recorder: What this rank recorded.

    Returns:
        The same on every rank; seconds from the first computation of any rank.
    """
    spans = recorder.spans()
    offset = _clock_offset(transport)
    mine = _Record(
        [(str(span.action), span.start + offset, span.end + offset) for span in spans],
        recorder.activation_bytes,
        recorder.message_bytes,
    )
    everyone = [mine] if group is None else [_Record.of(said) for said in gather_json(asdict(mine), group)]
    # The step begins with the first computation: a rank may have come early and waited for the others before that.
    computing = (start for record in everyone for text, start, _ in record.spans if Action.parse(text).op.is_compute)
    origin = min(computing, default=0.0)
    rows = tuple(
        tuple(
            Span(Action.parse(text), max(0.0, start - origin), end - origin)
            for text, start, end in record.spans
            if end > origin
        )
        for record in everyone
    )
    return MeasuredStep(
        plan,
        Timeline(f"{plan.name}, measured", rows, unit="s"),
        {stage: size for record in everyone for stage, size in record.activation_bytes.items()},
        {stage: size for record in everyone for stage, size in record.message_bytes.items()},
    )


def _clock_offset(transport: Transport) -> float:
    """What has to be added to this rank's clock to get the first rank's."""
    if transport.rank > 0:
        for _ in range(_ROUND_TRIPS):
            _tell(transport, 0, time.perf_counter())
            offset = _hear(transport, 0)
        return offset
    for peer in range(1, transport.num_ranks):
        best, asked = (math.inf, 0.0), 0.0
        for number in range(_ROUND_TRIPS):
            theirs = _hear(transport, peer)
            now = time.perf_counter()
            # The first message may have waited for us; from the second on it answers what we sent right before it.
            if number:
                best = min(best, (now - asked, (asked + now) / 2 - theirs))
            asked = time.perf_counter()
            _tell(transport, peer, best[1])
    return 0.0


def _tell(transport: Transport, peer: int, value: float) -> None:
    leaves, spec = flatten(torch.tensor([value], dtype=torch.float64))
    transport.outlet(peer).send(Kind.VALUE, transport.rank, _CLOCK, 0, leaves, spec)


def _hear(transport: Transport, peer: int) -> float:
    return float(transport.inlet(peer).take(Kind.VALUE, peer, _CLOCK).tensors[0])


def stage_costs(steps: Sequence[MeasuredStep], num_stages: int) -> CostModel:
    """The costs of the stages: medians over all micro-batches of some measured steps.

    Args:
        steps: What none of them ran (whole backwards, or split ones) costs 0 in the result.
        num_stages: How many stages the model has.

    Returns:
        Times in seconds, sizes in bytes, one entry a stage. A hop is what a message took that its receiver waited for,
        from the end of sending to the end of receiving.
    """
    times: dict[tuple[Op, int], list[float]] = defaultdict(list)
    hops: dict[int, list[float]] = defaultdict(list)
    activations: dict[int, int] = {}
    messages: dict[int, int] = {}
    for step in steps:
        _collect(step.timeline, times, hops)
        activations.update(step.activation_bytes)
        messages.update(step.message_bytes)

    def median(op: Op) -> tuple[float, ...]:
        return tuple(_middle(times.get((op, stage), ())) for stage in range(num_stages))

    usual = _middle(time for found in hops.values() for time in found)
    boundaries = range(num_stages - 1)
    return CostModel(
        forward=median(Op.FORWARD),
        input_grad=median(Op.INPUT_GRAD),
        weight_grad=median(Op.WEIGHT_GRAD),
        backward=median(Op.BACKWARD),
        hop=tuple(_middle(hops[boundary]) if boundary in hops else usual for boundary in boundaries),
        message_bytes=tuple(float(messages.get(stage, 0)) for stage in boundaries),
        bandwidth=math.inf,  # a hop was measured with its bytes
        activation_bytes=tuple(float(activations.get(stage, 0)) for stage in range(num_stages)),
        unit="s",
    )


def _collect(timeline: Timeline, times: dict[tuple[Op, int], list[float]], hops: dict[int, list[float]]) -> None:
    """Adds the times of one step."""
    sent: dict[Action, float] = {}
    for row in timeline.spans:
        for index, span in enumerate(row):
            stage, op, i = span.action
            following = row[index + 1] if index + 1 < len(row) else span
            if op.is_compute:
                # Packing and handing to the network is the rank's time, too.
                sends = following.action.op in (Op.SEND_F, Op.SEND_B) and following.action[::2] == (stage, i)
                times[op, stage].append((following if sends else span).end - span.start)
            elif op in (Op.SEND_F, Op.SEND_B):
                sent[span.action] = span.end
    for row in timeline.spans:
        for span in row:
            stage, op, i = span.action
            source = Action(stage - 1, Op.SEND_F, i) if op is Op.RECV_F else Action(stage + 1, Op.SEND_B, i)
            if op in (Op.RECV_F, Op.RECV_B) and span.start < sent.get(source, 0.0):
                hops[min(stage, source.stage)].append(max(0.0, span.end - sent[source]))


def _middle(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0
