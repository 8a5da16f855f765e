"""What the stages of a model cost: measured or assumed, one entry a stage.

::

    stage         0        1        2
    forward       1.0      1.0      1.5        input_grad, weight_grad, activation_bytes, ... likewise
    hop              0.1      0.1              one entry a boundary between two stages

Neighbours: `simulate.py` plays a plan with these numbers, `bounds.py` says how fast any plan could be, `planner.py`
looks for a good one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.routing import Skips

__all__ = ["CostModel"]


@dataclass(frozen=True)
class CostModel:
    """What each stage costs for one micro-batch.

    Attributes:
        forward: Time of F, one entry a stage, in any unit.
        input_grad: Time of I.
        weight_grad: Time of W.
        backward: Time of the unsplit B; I + W if not given. On real machines B is cheaper than I and W apart.
        hop: Latency of one message: one number, or one for each boundary between the stages s and s + 1. A hop between
            two stages of one rank costs nothing.
        message_bytes: Size of one message, for each boundary; needs `bandwidth`.
        bandwidth: Bytes that travel in one unit of time.
        activation_bytes: What a stage holds of a micro-batch, from F to its last backward (B or W); 1 if not given.
        static_bytes: What a stage holds all the time: weights, gradients, optimizer; 0 if not given.
        unit: Of all times: `"s"`, or `""` for none.
        skip_hop: (from, to, time) of the message over a skip; one that is not in here takes the latency `hop` of the
            boundary behind its first stage. Within one rank it costs nothing.

    Raises:
        ScheduleError: Lengths differ, or a number is negative or not finite.

    Example:
        >>> costs = CostModel((1.0, 1.0), (1.0, 1.0), (1.0, 1.5), hop=0.1, message_bytes=(40.0,), bandwidth=100.0)
        >>> costs.backwards, costs.hops
        ((2.0, 2.5), (0.5,))
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    backward: tuple[float, ...] | None = None
    hop: float | tuple[float, ...] = 0.0
    message_bytes: tuple[float, ...] | None = None
    bandwidth: float | None = None
    activation_bytes: tuple[float, ...] | None = None
    static_bytes: tuple[float, ...] | None = None
    unit: str = ""
    skip_hop: tuple[tuple[int, int, float], ...] | None = None

    def __post_init__(self) -> None:
        stages = len(self.forward)
        if stages == 0:
            raise ScheduleError("a cost model needs at least one stage; forward is empty")
        for name in ("forward", "input_grad", "weight_grad", "backward", "activation_bytes", "static_bytes"):
            _check_numbers(name, getattr(self, name), stages, "stages")
        _check_numbers("message_bytes", self.message_bytes, stages - 1, "boundaries between stages")
        hops = self.hop if isinstance(self.hop, tuple) else (self.hop,) * (stages - 1)
        _check_numbers("hop", hops, stages - 1, "boundaries between stages")
        if (self.message_bytes is None) != (self.bandwidth is None):
            raise ScheduleError("message_bytes and bandwidth belong together; pass both, or put the whole time in hop")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ScheduleError(f"bandwidth must be above 0 bytes per unit of time, got {self.bandwidth}")
        for entry in self.skip_hop or ():
            if len(entry) != 3 or not 0 <= entry[0] < entry[1] - 1 < stages - 1 or not 0 <= entry[2] < math.inf:
                raise ScheduleError(
                    f"skip_hop has {entry}; an entry is (from, to, time), from + 1 < to < {stages} stages, time >= 0"
                )

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        input_grad: float = 1.0,
        weight_grad: float = 1.0,
        backward: float | None = None,
        hop: float = 0.0,
        chunks: int = 1,
        unit: str = "",
    ) -> CostModel:
        """Equal stages. The times are those of a full stage, one rank's share of the model.

        Args:
            num_stages: All stages, p * v.
            forward: Time of F of all chunks of a rank together; so are the other times.
            input_grad: Time of I.
            weight_grad: Time of W.
            backward: Time of the unsplit B; I + W if not given.
            hop: Time of one message.
            chunks: v, the stages of a rank: each costs, and holds, 1/v of a full stage.
            unit: Of all times.

        Raises:
            ScheduleError: A number is negative or not finite, or `num_stages` is no multiple of `chunks`.

        Example:
            >>> CostModel.uniform(4, forward=2.0, chunks=2).forward
            (1.0, 1.0, 1.0, 1.0)
        """
        if chunks < 1 or num_stages < chunks or num_stages % chunks:
            raise ScheduleError(f"{num_stages} stages are not {chunks} chunks on each of some ranks; pass p * v stages")
        whole = None if backward is None else (backward / chunks,) * num_stages
        f, i, w = ((time / chunks,) * num_stages for time in (forward, input_grad, weight_grad))
        return cls(f, i, w, whole, hop=hop, activation_bytes=(1 / chunks,) * num_stages, unit=unit)

    def to_json(self) -> str:
        """As `torchdistpackage schedule plan --costs FILE` reads it.

        Example:
            >>> CostModel((1.0,), (1.0,), (0.5,)).to_json()
            '{"forward": [1.0], "input_grad": [1.0], "weight_grad": [0.5], "hop": 0.0, "unit": ""}'
        """
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @property
    def num_stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.forward)

    @cached_property
    def backwards(self) -> tuple[float, ...]:
        """Time of the unsplit B of every stage."""
        if self.backward is not None:
            return self.backward
        return tuple(i + w for i, w in zip(self.input_grad, self.weight_grad, strict=True))

    @cached_property
    def hops(self) -> tuple[float, ...]:
        """Time of a message between two ranks over each boundary: latency and bytes."""
        if self.message_bytes is None or self.bandwidth is None:
            return self._latency
        return tuple(a + size / self.bandwidth for a, size in zip(self._latency, self.message_bytes, strict=True))

    @property
    def _latency(self) -> tuple[float, ...]:
        return self.hop if isinstance(self.hop, tuple) else (self.hop,) * (self.num_stages - 1)

    @cached_property
    def activations(self) -> tuple[float, ...]:
        """Bytes that each stage holds of one micro-batch."""
        return (1.0,) * self.num_stages if self.activation_bytes is None else self.activation_bytes

    def hops_on(self, placement: Placement) -> tuple[float, ...]:
        """Time of a message over each boundary where two stages meet as `placement` says: 0 within one rank."""
        return tuple(0.0 if a == b else hop for hop, (a, b) in zip(self.hops, pairwise(placement.owners), strict=True))

    def skip_hops_on(self, placement: Placement, skips: Skips) -> dict[tuple[int, int], float]:
        """Time of a message over each skip, the same in both directions: 0 within one rank."""
        known = {(a, b): time for a, b, time in self.skip_hop or ()}
        within = {(a, b): 0.0 for a, b in skips if placement.owner(a) == placement.owner(b)}
        return {(a, b): known.get((a, b), self._latency[a]) for a, b in skips} | within

    def static_on(self, placement: Placement) -> tuple[float, ...]:
        """Bytes that each rank holds all the time."""
        held = self.static_bytes or (0.0,) * self.num_stages
        return tuple(float(sum(held[s] for s in placement.local_stages(rank))) for rank in range(placement.num_ranks))


def _check_numbers(name: str, values: Sequence[float] | None, length: int, what: str) -> None:
    if values is None:
        return
    if len(values) != length:
        raise ScheduleError(f"{name} has {len(values)} entries for {length} {what}; pass one for each")
    for index, value in enumerate(values):
        if not 0 <= value < math.inf:
            raise ScheduleError(
                f"{name}[{index}] is {value}; a cost is a finite number of at least 0: measure it again"
            )
