import itertools
import random

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import CostModel, Placement, build, describe, names, planner, simulate, verify


def uneven(p, chunks, *, head=0.3, noise=0.1, hop=0.05, weight=1.0):
    """Stages that differ by some noise, the last one with a heavy head."""
    rng = random.Random(0)
    sizes = [1 + noise * rng.uniform(-1, 1) for _ in range(p * chunks)]
    sizes[-1] += head * chunks
    time = tuple(size / chunks for size in sizes)
    held = (1 / chunks,) * (p * chunks)
    return CostModel(time, time, tuple(weight * t for t in time), hop=hop, activation_bytes=held)


def best_of_the_catalogue(costs, p, m, limit):
    times = [
        timeline.makespan
        for name in names()
        if describe(name).runs(costs.num_stages // p)
        and max((timeline := simulate(build(name, p, m, chunks=costs.num_stages // p), costs)).peak_bytes) <= limit
    ]
    return min(times, default=float("inf"))


@pytest.mark.parametrize(("p", "m"), [(8, 32), (16, 64), (32, 128)])
@pytest.mark.parametrize(("closed", "chunks"), [("1f1b", 1), ("zb-v", 2)])
def test_close_to_the_lower_bound_with_the_memory_of_the_closed_form(p, m, closed, chunks):
    costs = uneven(p, chunks)
    found = planner.plan(costs, p, m, p, placement=describe(closed).place(p, chunks))
    assert found.ratio <= 1.02
    assert max(found.peak_bytes) <= p
    assert found.makespan < simulate(build(closed, p, m), costs).makespan
    assert found.makespan == pytest.approx(simulate(found.plan, costs).makespan)


GRID = list(itertools.product([0.25, 0.5, 1.0, 1.5], [0.0, 0.3], [0.0, 0.05, 0.2]))


@pytest.mark.parametrize(("p", "m"), [(2, 5), (4, 8), (4, 13)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_never_worse_than_the_catalogue(p, m, chunks):
    for weight, head, hop in GRID:
        costs = uneven(p, chunks, weight=weight, head=head, hop=hop)
        for limit in (p / 2, p, 2 * p):
            found = planner.plan(costs, p, m, limit)
            assert found.makespan <= best_of_the_catalogue(costs, p, m, limit) * (1 + 1e-9)
            assert max(found.peak_bytes) <= limit * (1 + 1e-9)
            assert found.ratio >= 1 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("p", "m"), [(8, 16), (8, 32), (16, 40)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_never_worse_than_the_catalogue_at_large(p, m, chunks):
    test_never_worse_than_the_catalogue(p, m, chunks)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "m"), [(16, 640), (64, 512)])
@pytest.mark.parametrize("weight", [0.25, 1.5])
def test_never_worse_than_the_catalogue_where_fewer_microbatches_are_tried_first(p, m, weight):
    costs = uneven(p, 2, weight=weight, hop=0.2)
    found = planner.plan(costs, p, m, 2 * p)
    assert found.makespan <= best_of_the_catalogue(costs, p, m, 2 * p) * (1 + 1e-9)


def test_a_large_plan_is_scouted_with_fewer_microbatches():
    costs = CostModel((1.0, 1.4), (1.0, 1.4), (0.6, 0.9), hop=0.3, activation_bytes=(1.0, 1.0))
    p, m = 2, 10_001
    found = planner.plan(costs, p, m, 3)
    assert 3 * p * m > planner._MANY
    assert found.ratio < 1.001
    assert max(found.peak_bytes) <= 3
    plain = {row.name: row for row in found.candidates}
    assert found.makespan <= min(row.makespan for row in plain.values() if row.fits)


@pytest.mark.parametrize(("p", "m", "limit", "at_most"), [(8, 32, 4, 1.35), (8, 32, 2, 1.1), (16, 64, 8, 1.35)])
def test_with_less_memory_than_any_schedule_of_one_chunk(p, m, limit, at_most):
    found = planner.plan(CostModel.uniform(p, hop=0.05), p, m, limit)
    assert max(found.peak_bytes) <= limit
    assert found.ratio <= at_most


def test_one_microbatch_at_a_time():
    found = planner.plan(CostModel.uniform(3), 3, 4, 1)
    assert found.peak_bytes == (1, 1, 1)


def test_whole_backwards_where_the_split_costs_more_than_it_gains():
    costs = CostModel((1.0,) * 4, (1.6,) * 4, (1.6,) * 4, backward=(2.0,) * 4)
    found = planner.plan(costs, 4, 64)
    assert found.makespan <= simulate(build("1f1b", 4, 64), costs).makespan
    split = sum(action.op.value == "I" for action in found.plan.actions[0])
    assert split <= 16, "at most some of the last backwards are split"


def test_the_plan_is_ready_to_run_and_the_same_every_time():
    costs = uneven(4, 2)
    first, second = planner.plan(costs, 4, 9), planner.plan(costs, 4, 9)
    assert first.plan == second.plan
    assert first.plan.has_communication
    verify(first.plan)
    assert first.timeline.makespan == pytest.approx(first.makespan)
    assert list(first.candidates) == sorted(first.candidates, key=lambda c: (not c.fits, c.makespan))


def test_the_best_of_several_cuts():
    slow, fast = CostModel.uniform(4, hop=0.5), CostModel.uniform(8, chunks=2, hop=0.0)
    found = planner.plan([slow, fast], 4, 8)
    assert found.costs is fast
    assert found.plan.placement.num_stages == 8


def test_a_placement_that_is_settled():
    costs = uneven(4, 2)
    for placement in (Placement.loop(4, 2), Placement.v(4)):
        assert planner.plan(costs, 4, 8, placement=placement).plan.placement == placement


def test_nothing_to_plan():
    with pytest.raises(ScheduleError, match=r"on ranks \(1, 0\)"):
        planner.plan(CostModel.uniform(2), 2, 2, placement=Placement(2, (1, 0)))
    with pytest.raises(ScheduleError, match="costs is empty"):
        planner.plan([], 2, 2)


def test_a_limit_that_nothing_fits():
    with pytest.raises(
        ScheduleError, match=r"memory_limit=0.5: .* holds 4 on its fullest rank, and a single .* 1. Cut"
    ):
        planner.plan(CostModel.uniform(4), 4, 8, 0.5)


@pytest.mark.parametrize(
    ("p", "m", "reason"), [(3, 4, "4 stages, which are not"), (0, 1, "num_ranks"), (2, 0, "batches")]
)
def test_sizes_that_do_not_fit(p, m, reason):
    with pytest.raises(ScheduleError, match=reason):
        planner.plan(CostModel.uniform(4), p, m)
