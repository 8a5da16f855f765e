import math

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import CostModel, Placement, build, describe, lower_bound, names, simulate


@pytest.mark.parametrize("p", [1, 2, 5, 8])
@pytest.mark.parametrize("m", [1, 7, 32])
def test_1f1b_is_optimal_among_unsplit_schedules_of_one_chunk(p, m):
    costs = CostModel.uniform(p, input_grad=1.2)
    bound = lower_bound(costs, Placement.loop(p), m, split=False)
    assert simulate(build("1f1b", p, m), costs).makespan == pytest.approx((p - 1) * 3.2 + m * 3.2)
    assert bound == pytest.approx((p - 1) * 3.2 + m * 3.2)


@pytest.mark.parametrize("name", names())
def test_no_schedule_is_faster(name):
    for p in (1, 2, 3, 6):
        for m in (1, 4, 11):
            placement = describe(name).place(p, describe(name).chunks)
            stages = range(placement.num_stages)
            costs = CostModel(
                tuple(1 + 0.3 * (s % 3) for s in stages),
                tuple(0.7 + 0.2 * (s % 2) for s in stages),
                tuple(0.4 + 0.1 * s for s in stages),
                hop=0.1,
            )
            timeline = simulate(build(name, p, m), costs)
            for limit in (None, timeline.peak_bytes):
                assert lower_bound(costs, placement, m, memory_limit=limit) <= timeline.makespan * (1 + 1e-9)


def test_the_path_of_one_microbatch():
    costs = CostModel((1.0, 2.0), (3.0, 4.0), (5.0, 6.0), hop=0.5)
    # Down and up, and the weights of the first stage.
    assert lower_bound(costs, Placement.loop(2), 1) == 1 + 0.5 + 2 + 4 + 0.5 + 3 + 5


def test_a_third_of_the_memory_is_enough_in_a_v_and_two_thirds_in_a_loop():
    p, m = 9, 900
    for placement, chunks, share in ((Placement.v(p), 2, 1 / 3), (Placement.loop(p), 1, 2 / 3)):
        costs = CostModel.uniform(placement.num_stages, chunks=chunks)
        free = lower_bound(costs, placement, m)
        assert lower_bound(costs, placement, m, memory_limit=1.2 * share * p) < 1.01 * free
        assert lower_bound(costs, placement, m, memory_limit=0.8 * share * p) > 1.1 * free


def test_no_room_at_all():
    costs = CostModel((1.0,), (1.0,), (1.0,), static_bytes=(8.0,))
    assert lower_bound(costs, Placement.loop(1), 2, memory_limit=8) == math.inf


@pytest.mark.parametrize(("limit", "reason"), [((1.0,), "1 entries for 2 ranks"), (0, "above 0 bytes")])
def test_limits_that_make_no_sense(limit, reason):
    with pytest.raises(ScheduleError, match=reason):
        lower_bound(CostModel.uniform(2), Placement.loop(2), 1, memory_limit=limit)


@pytest.mark.parametrize(("ranks", "m", "reason"), [(3, 1, "of 2 stages, the placement has 3"), (2, 0, "at least 1")])
def test_questions_that_make_no_sense(ranks, m, reason):
    with pytest.raises(ScheduleError, match=reason):
        lower_bound(CostModel.uniform(2), Placement.loop(ranks), m)
