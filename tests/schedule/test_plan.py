import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Plan, build, canonical_name, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (4, 9)])
@pytest.mark.parametrize("forward_only", [False, True])
def test_text_and_csv_are_read_back_as_the_same_plan(name, p, m, forward_only):
    plan = build(name, p, m, forward_only=forward_only)
    assert Plan.from_text(plan.to_text(), name=name) == plan
    assert Plan.from_csv(plan.to_csv(), name=name) == plan


def test_csv_may_have_idle_cells():
    assert Plan.from_csv("0F0,,,0B0\n,1F0,1B0,\n").to_text() == "rank 0: 0F0 0B0\nrank 1: 1F0 1B0"


def test_a_marked_grid_points_at_one_action():
    grid = build("gpipe", 2, 9).to_text(mark=(0, 8), window=1)
    assert grid.splitlines()[0] == "rank 0: ... 0SEND_F3 >>0F4<< 0SEND_F4 ..."


def test_plans_are_hashable_and_cached():
    assert build("1f1b", 3, 5) is build("1F1B", 3, 5)
    assert len({build("1f1b", 3, 5), build("gpipe", 3, 5), build("1f1b", 3, 5, forward_only=True)}) == 3


def test_facts_of_a_plan():
    plan = build("1f1b", 2, 3)
    assert (plan.num_microbatches, plan.forward_only, plan.has_communication) == (3, False, True)
    assert plan.signature.startswith("schedule '1f1b', training, 3 micro-batches, 2 ranks, 2 stages, checksum ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0F0\n0B0", "stage 0 is used by rank 0 and rank 1"),
        ("0F0 2F0", "stages must be numbered 0, 1, 2"),
        ("rank 1: 0F0", "expected the line of rank 0"),
        ("0F0 zero", "is not an action"),
    ],
)
def test_text_that_is_not_a_plan_is_refused(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        Plan.from_text(text)


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ScheduleError, match="unknown schedule 'zigzag'; known schedules: .*1f1b.*gpipe"):
        build("zigzag", 2, 2)


@pytest.mark.parametrize(
    ("name", "near"), [("1F1B-interleaved", "interleaved-1f1b"), ("1f1bb", "1f1b"), ("planned-v", "planned-v-too")]
)
def test_an_unknown_schedule_is_told_the_nearest_one(name, near):
    with pytest.raises(ScheduleError, match=f"'{name}'; did you mean '{near}'[?] .*zb-v, planned-v-too; torch's names"):
        canonical_name(name, besides=["planned-v-too"])


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0), (2, -3), (2, 1.5), (2, True)])
def test_sizes_must_be_whole_and_positive(sizes):
    with pytest.raises(ScheduleError, match="at least 1"):
        build("1f1b", *sizes)
