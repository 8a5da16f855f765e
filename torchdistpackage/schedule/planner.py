"""The best plan for what the stages cost: costs and a memory limit in, a proved plan and its distance to the bound out.

::

    catalogue of orders            1f1b, zb-h1, zb-v, ... that run on this many chunks; orders.py: as memory allows
      | x W-refill                 the same F and I, every W where the rank would idle        refill.py
      | x whole backwards          where B is cheaper than I and W apart
      v
    time each, keep what fits, take the fastest  -->  lower, prove  -->  makespan / lower bound   bounds.py

Every schedule of the catalogue that fits is timed as it is, so that the result is never slower than the best of them.
Nothing here depends on the clock or on chance: every rank and every run gets the same plan from the same costs.

Source: the portfolio and the refill follow the observation of Qi et al., "Zero Bubble Pipeline Parallelism", 2023, that
with measured costs a heuristic with free W comes within a few percent of the optimum that an integer program finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.bounds import MemoryLimit, lower_bound, memory_limits
from torchdistpackage.schedule.building import complete, outline
from torchdistpackage.schedule.costs import CostModel
from torchdistpackage.schedule.orders import warm_up, windowed
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.refill import merge, merge_all, order_of, refill
from torchdistpackage.schedule.registry import describe, names
from torchdistpackage.schedule.simulate import Clock, Rows, encode, simulate
from torchdistpackage.schedule.timeline import Timeline

__all__ = ["Candidate", "PlannedSchedule", "plan"]

_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
_ENOUGH = 1.001  # of the lower bound: nothing that is worth a search is left to gain
_MANY = 60_000  # actions, from which on places for W are tried with fewer micro-batches first
_FINALISTS = 3  # of a large plan, looked at in full
_WARM_UPS = ("1f1b, eager as memory allows", "1f1b, as memory allows")
_WINDOWED = "windowed"
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Candidate:
    """One plan that was looked at.

    Attributes:
        name: The schedule that it comes from, and what was done to it.
        makespan: Its time; infinite if it does not fit.
        peak: The most bytes that any rank holds.
        fits: Whether every rank stays within its memory limit.

    Example:
        >>> looked_at = plan(CostModel.uniform(2), 2, 4, memory_limit=2).candidates
        >>> next(row for row in looked_at if row.name == "gpipe")
        Candidate(name='gpipe', makespan=inf, peak=4.0, fits=False)
    """

    name: str
    makespan: float
    peak: float
    fits: bool


@dataclass(frozen=True)
class PlannedSchedule:
    """What `plan` found.

    Attributes:
        plan: With communication, proved; ready for `forward_backward(schedule=...)`.
        costs: What it was planned for.
        makespan: Its simulated time, in the unit of the costs.
        lower_bound: What no schedule of these stages on these ranks can beat.
        peak_bytes: The most bytes that each rank holds.
        candidates: Everything that was looked at, fastest first.

    Example:
        >>> found = plan(CostModel.uniform(2), 2, 4, memory_limit=2)
        >>> found.plan.name, found.makespan, found.ratio, found.peak_bytes
        ('zb-h1', 13.0, 1.0, (2.0, 2.0))
        >>> found.timeline.bubble
        (1.0, 1.0)
    """

    plan: Plan
    costs: CostModel
    makespan: float
    lower_bound: float
    peak_bytes: tuple[float, ...]
    candidates: tuple[Candidate, ...]

    @property
    def ratio(self) -> float:
        """Makespan over lower bound: 1.0 is a proof that nothing is left to gain."""
        return self.makespan / self.lower_bound if self.lower_bound > 0 else 1.0

    @cached_property
    def timeline(self) -> Timeline:
        """When each action runs."""
        return simulate(self.plan, self.costs)


def plan(
    costs: CostModel | Sequence[CostModel],
    num_ranks: int,
    num_microbatches: int,
    memory_limit: MemoryLimit = None,
    *,
    placement: Placement | None = None,
) -> PlannedSchedule:
    """Finds the best plan over the catalogue, warm-ups between its schedules, and the places of every W.

    Args:
        costs: Of p * v stages; or several cost models, the same model cut in different ways, of which the best is
            taken.
        num_ranks: Ranks of the pipeline, p.
        num_microbatches: Micro-batches of a step, m.
        memory_limit: Bytes that a rank may hold (activations and the costs' static bytes), one number or one a rank.
        placement: Where the stages are, if that is settled; otherwise loop and v are tried.

    Returns:
        The plan, its time and its distance to the lower bound. 64 ranks and 512 micro-batches take a few seconds.

    Raises:
        ScheduleError: The stages do not fit the ranks, or nothing fits the memory limit; the message has the least
            memory that was found.

    Example:
        >>> found = plan(CostModel.uniform(4, hop=0.05), 4, 8)
        >>> found.plan.name, round(found.makespan, 2), round(found.ratio, 2)
        ('zb-h2', 27.15, 1.0)
    """
    for what, size in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ScheduleError(f"{what} must be a whole number of at least 1, got {size!r}")
    limits = memory_limits(memory_limit, num_ranks)
    searches = [
        search
        for model in ([costs] if isinstance(costs, CostModel) else costs)
        for search in _searches(model, num_ranks, num_microbatches, limits, placement)
    ]
    if not searches:
        owners = "none was given" if placement is None else f"the stages are on ranks {placement.owners}"
        raise ScheduleError(f"there is nothing to plan: no schedule fits the placement ({owners}), or costs is empty")
    if max(search.size for search in searches) > _MANY:
        _scout(searches)
    else:
        for search in searches:
            search.run()
    looked_at = sorted((c for search in searches for c in search.candidates), key=lambda c: (not c.fits, c.makespan))
    best = min(searches, key=lambda search: search.makespan)
    if best.rows is None:
        least = min((candidate.peak for candidate in looked_at), default=math.inf)
        raise ScheduleError(
            f"no schedule fits memory_limit={memory_limit}: the leanest of {len(looked_at)} holds {least:g} on its "
            f"fullest rank, and a single micro-batch {max(search.floor for search in searches):g}. Cut the model over "
            "more ranks, checkpoint activations, or make the micro-batches smaller; their number does not matter"
        )
    rows = [best.clock.decode(row) for row in best.rows]
    found = complete(Plan(best.name, best.clock.placement, num_microbatches, tuple(map(tuple, rows))))
    # The bound holds for any placement that was open to the planner, so that the ratio is honest.
    bound = min(lower_bound(s.costs, s.clock.placement, num_microbatches, memory_limit=memory_limit) for s in searches)
    return PlannedSchedule(
        found, best.costs, best.makespan, bound, tuple(best.clock.peaks(best.rows)), tuple(looked_at)
    )


def _searches(
    costs: CostModel, num_ranks: int, count: int, limits: tuple[float, ...], placement: Placement | None
) -> Iterator[_Search]:
    """One search for each placement of the stages."""
    chunks, rest = divmod(costs.num_stages, num_ranks)
    if rest or (placement is not None and placement.num_stages != costs.num_stages):
        raise ScheduleError(
            f"the costs are those of {costs.num_stages} stages, which are not the same number of chunks on each of "
            f"{num_ranks} ranks; cut the model into {num_ranks}, {2 * num_ranks}, ... stages and measure those"
        )
    groups: dict[Placement, list[str]] = {}
    for name in names():
        facts = describe(name)
        if facts.runs(chunks) and (chunks > 1 or facts.chunks == 1):  # with one chunk the looped ones are eager 1F1B
            groups.setdefault(facts.place(num_ranks, chunks), []).append(name)
    for where, fitting in groups.items():
        if placement is None or where.owners == placement.owners:
            yield _Search(costs, where, count, limits, fitting)


class _Idea(NamedTuple):
    """A plan that can be made for any number of micro-batches: an order, and what to do with it."""

    name: str
    share: float | None = None  # of a W that must fit into a gap; None: every W stays where the order has it
    whole: int = 0  # the backwards before the last `whole` micro-batches stay whole; 0: all are split

    @property
    def title(self) -> str:
        """For people."""
        if self.share is None:
            return self.name
        return f"{self.name}+refill" + (f", whole but the last {self.whole}" if self.whole else "")


@final
class _Search:
    """The plans of one placement for one number of micro-batches."""

    def __init__(
        self, costs: CostModel, placement: Placement, count: int, limits: tuple[float, ...], schedules: list[str]
    ) -> None:
        self.costs, self.schedules, self._limits = costs, schedules, limits
        self.clock = Clock.of(costs, placement, count)
        self.candidates: list[Candidate] = []
        self.name, self.makespan, self._peak = "", math.inf, math.inf
        self.rows: Rows | None = None
        self.enough = _ENOUGH * lower_bound(costs, placement, count)
        # On real machines a whole backward is cheaper than its halves: then as few as useful are split.
        self._dear = any(b < (i + w) / _ROUNDING for b, i, w in _backwards(costs))
        self._orders: dict[str, Rows] = {}

    @property
    def size(self) -> int:
        """About how many actions a plan has."""
        return 3 * self.clock.placement.num_stages * self.clock.count

    @property
    def floor(self) -> float:
        """Bytes on the fullest rank with one micro-batch at a time: no order needs less."""
        place, held = self.clock.placement, self.costs.activations
        alone = [sum(held[stage] for stage in place.local_stages(rank)) for rank in range(place.num_ranks)]
        return max(static + size for static, size in zip(self.clock.static, alone, strict=True))

    def smaller(self, count: int) -> _Search:
        """The same search for another number of micro-batches."""
        return _Search(self.costs, self.clock.placement, count, self._limits, self.schedules)

    def run(self) -> None:
        """Times the catalogue as it is, then every other idea, until the lower bound is as good as reached."""
        for idea in self.plain():
            self.look(idea)
        for idea in self.refills():
            if self.makespan <= self.enough:
                return
            self.look(idea)

    def plain(self) -> list[_Idea]:
        """The catalogue as it is."""
        return [_Idea(name) for name in self.schedules]

    def refills(self, shares: Sequence[float] = _SHARES) -> Iterator[_Idea]:
        """All orders with every W anew."""
        p = self.clock.placement.num_ranks
        warm_ups = _WARM_UPS if self.clock.placement.num_stages == p else ()
        for name in (*self.schedules, *warm_ups, _WINDOWED):
            for whole in (0, p, 2 * p) if self._dear else (0,):
                if whole < self.clock.count:
                    yield from (_Idea(name, share, whole) for share in shares)

    def look(self, idea: _Idea, *, merging: bool = True) -> float:
        """Times an idea and keeps it if it is the best that fits; returns its time, infinite if it does not fit."""
        rows = self._order(idea.name)
        if idea.share is None:
            time = self._take(idea.title, rows)
            merged = merge_all(self.clock, rows) if self._dear else rows
            return time if merged == rows else min(time, self._take(f"{idea.title}, whole", merged))
        order = order_of(self.clock, rows, self.clock.count - idea.whole if idea.whole else 0)
        found = refill(self.clock, order, self._limits, share=idea.share)
        if found is None:
            return math.inf
        time = self._take(idea.title, found.rows, found.makespan)
        if merging and self._dear and (arrivals := self.clock.play(found.rows)) is not None:
            merged = merge(self.clock, found.rows, arrivals)
            if merged != found.rows:
                return min(time, self._take(f"{idea.title}, merged", merged))
        return time

    def _take(self, title: str, rows: Rows, time: float | None = None) -> float:
        """Keeps rows if they fit and are faster than what was found before."""
        peaks = self.clock.peaks(rows)
        fits = all(peak <= limit * _ROUNDING for peak, limit in zip(peaks, self._limits, strict=True))
        if time is None or not fits:
            arrivals = self.clock.play(rows) if fits else None
            time = math.inf if arrivals is None else max(self.clock.finish(row, arrivals) for row in rows)
        self.candidates.append(Candidate(title, time, max(peaks), fits))
        # Of equally fast plans the one that holds less.
        if fits and (
            time < self.makespan / _ROUNDING or (time <= self.makespan * _ROUNDING and max(peaks) < self._peak)
        ):
            self.name, self.makespan, self.rows, self._peak = title, time, rows, max(peaks)
        return time

    def _order(self, name: str) -> Rows:
        placement = self.clock.placement
        if name not in self._orders:
            if name == _WINDOWED:
                self._orders[name] = windowed(self.clock, self._limits)
            elif name in _WARM_UPS:
                self._orders[name] = warm_up(self.clock, self._limits, lean=name == _WARM_UPS[1])
            else:
                chunks = placement.num_stages // placement.num_ranks
                self._orders[name] = encode(outline(name, placement.num_ranks, self.clock.count, chunks=chunks))
        return self._orders[name]


def _scout(searches: list[_Search]) -> None:
    """Large plans: times the catalogue as it is, but finds the promising places for W with fewer micro-batches.

    Time grows by the same amount with every further micro-batch, once the pipeline is full: two sizes tell how much.
    """
    entries: list[tuple[float, int, _Idea]] = []
    smaller = []
    for number, search in enumerate(searches):
        for idea in search.plain():
            search.look(idea)
        p, count = search.clock.placement.num_ranks, search.clock.count
        few, some = (search.smaller(min(count, size)) for size in (p + 1, p + p // 2 + 2))
        smaller.append(some)
        scale = (count - some.clock.count) / max(1, some.clock.count - few.clock.count)
        for idea in some.refills(_SHARES[2:3]):
            time = some.look(idea, merging=False)
            if time < math.inf:
                entries.append((time + scale * max(0.0, time - few.look(idea, merging=False)), number, idea))
    best = min(searches, key=lambda search: search.makespan)
    if best.makespan <= best.enough:
        return
    for _, number, idea in sorted(entries, key=lambda entry: entry[:2])[:_FINALISTS]:
        tries = [idea._replace(share=share) for share in _SHARES]
        times = [smaller[number].look(again, merging=False) for again in tries]
        searches[number].look(tries[times.index(min(times))])


def _backwards(costs: CostModel) -> Iterator[tuple[float, float, float]]:
    return zip(costs.backwards, costs.input_grad, costs.weight_grad, strict=True)
