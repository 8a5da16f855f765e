"""Skips in plans: the table, the judge, the simulator."""

import itertools

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import CostModel, Plan, build, complete, names, simulate, verify
from torchdistpackage.schedule.routing import check_skips, destinations, skips_of, sources
from torchdistpackage.schedule.simulate import Clock, encode, play_with_skips


def every_skip(stages):
    return tuple(pair for pair in itertools.combinations(range(stages), 2) if pair[1] > pair[0] + 1)


@pytest.mark.parametrize(
    ("skips", "reason"),
    [
        (((0, 1),), "from stage 0 to stage 1 does not skip a stage"),
        (((3, 1),), "from stage 3 to stage 1 goes back"),
        (((0, 4),), "outside of the 4 stages, which are numbered 0 to 3"),
        (((-1, 2),), "outside of the 4 stages"),
        (((0, 2), (0, 2)), "from stage 0 to stage 2 is in the table twice"),
        (((1, 3), (0, 2)), "is sorted"),
    ],
)
def test_wrong_tables_are_refused_with_the_numbers(skips, reason):
    with pytest.raises(ScheduleError, match=reason):
        check_skips(skips, 4)


@pytest.mark.parametrize("pairs", [5, [5], [(1, 2, 3)], [(1.0, 3)], [("a", "b")], [(True, 3)]])
def test_what_is_no_table_is_refused(pairs):
    with pytest.raises(ScheduleError, match="pair"):
        skips_of(pairs)


def test_sources_and_destinations():
    skips = every_skip(4)
    assert skips == ((0, 2), (0, 3), (1, 3))
    assert sources(skips, 3) == (0, 1)
    assert destinations(skips, 0) == (2, 3)
    assert sources(skips, 1) == destinations(skips, 2) == ()


def test_a_plan_says_its_skips_only_in_its_signature():
    plain, plan = build("1f1b", 4, 3), build("1f1b", 4, 3, skips=[[1, 3], [0, 2]])
    assert plan.skips == ((0, 2), (1, 3))
    assert plan.signature == plain.signature + ", skips 0>2, 1>3"
    assert plan.to_text() == plain.to_text()
    assert plan.to_csv() == plain.to_csv()
    assert plan != plain
    assert plan.with_skips(()) == plain


def test_plans_with_skips_are_cached_and_passes_keep_them():
    assert build("1f1b", 4, 3, skips=[(0, 2)]) is build("1f1b", 4, 3, skips=((0, 2),))
    given = Plan.from_text("0F0 0B0\n1F0 1B0\n2F0 2B0").with_skips([(0, 2)])
    assert complete(given).skips == complete(given, evaluation=True).skips == ((0, 2),)
    with pytest.raises(ScheduleError, match="outside of the 2 stages"):
        build("1f1b", 2, 3, skips=[(0, 2)])


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_a_plan_that_is_right_is_right_with_any_skips(name, p):
    for m, evaluation in itertools.product((1, 3, 2 * p + 1), (False, True)):
        plan = build(name, p, m, forward_only=evaluation)
        verify(plan.with_skips(every_skip(plan.placement.num_stages)))


def test_a_wrong_plan_is_refused_with_skips_and_its_own_grid():
    plan = Plan.from_text("0F0 0B0\n1F0 1B0\n2B0 2F0").with_skips([(0, 2)])
    with pytest.raises(ScheduleError, match=">>2B0<< 2F0"):
        verify(plan)
    with pytest.raises(ScheduleError, match="goes back"):
        verify(Plan("x", plan.placement, 1, plan.actions, skips=((2, 0),)))


@pytest.mark.parametrize("name", names())
def test_skips_without_time_take_none(name):
    plan = build(name, 3, 5)
    stages = plan.placement.num_stages
    costs = CostModel.uniform(stages, input_grad=0.9, weight_grad=1.3)
    clock, rows = Clock.of(costs, plan.placement, 5), encode(plan)
    played = play_with_skips(clock, rows, dict.fromkeys(every_skip(stages), 0.0))
    expected = simulate(plan, costs)
    assert tuple(clock.spans(row, played) for row in rows) == expected.spans
    assert simulate(plan.with_skips(every_skip(stages)), costs) == expected


def test_an_input_has_come_when_the_last_of_its_messages_has():
    plan = Plan.from_text("0F0 0B0\n1F0 1B0\n2F0 2B0").with_skips([(0, 2)])
    late = CostModel((1.0,) * 3, (1.0,) * 3, (1.0,) * 3, skip_hop=((0, 2, 5.0),))
    spans = simulate(plan, late).spans
    assert [span.start for row in spans for span in row] == [0.0, 14.0, 1.0, 9.0, 6.0, 7.0]


def test_a_hop_of_a_skip_is_a_neighbours_latency_and_nothing_within_a_rank():
    plan = build("zb-v", 2, 2, skips=[(0, 2), (0, 3), (1, 3)])
    costs = CostModel.uniform(4, hop=0.5)
    assert costs.skip_hops_on(plan.placement, plan.skips) == {(0, 2): 0.5, (0, 3): 0.0, (1, 3): 0.5}
    with pytest.raises(ScheduleError, match="from \\+ 1 < to < 4 stages"):
        CostModel((1.0,) * 4, (1.0,) * 4, (1.0,) * 4, skip_hop=((0, 1, 1.0),))
