"""From a name to a plan that is ready to run: options, numbers of chunks, passes."""

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Plan, add_communication, build, merge_backwards, outline, split_backwards

ONE_F_ONE_B = {"offsets": ((0, 3), (1, 2)), "period": 2}


def test_a_pattern_is_built_from_its_offsets():
    assert build("pattern", 2, 5, **ONE_F_ONE_B).actions == build("1f1b", 2, 5).actions


def test_a_pattern_may_place_its_stages_itself():
    plan = build("pattern", 2, 2, offsets=((0, 7), (1, 6), (2, 5), (3, 4)), period=8, owners=(0, 1, 1, 0))
    assert plan.placement.owners == (0, 1, 1, 0)
    assert outline("pattern", 1, 1, offsets=((0, 1),), period=1).to_text() == "rank 0: 0F0 0B0"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("1f1b", {"chunks": 2}, r"'1f1b' runs 1 stage\(s\) a rank, not 2; .* can: interleaved-1f1b, .*hanayo"),
        ("hanayo", {"chunks": 3}, r"not 3; schedules that can: interleaved-1f1b, looped-bfs, interleaved-zb"),
        ("1f1b", {"group_size": 4}, "'1f1b' has no option group_size; it takes none"),
        ("interleaved-1f1b", {"groups": 4}, r"no option groups; it takes \['group_size'\]"),
        ("pattern", {"offsets": ((0, 1), (1, 2))}, r"'pattern' needs the option\(s\) period: .* period slots later"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(name, options, reason):
    with pytest.raises(ScheduleError, match=reason):
        build(name, 2, 4, **options)


def test_communication_is_added_once():
    with pytest.raises(ScheduleError, match="has communication already"):
        add_communication(build("1f1b", 2, 2))


@pytest.mark.parametrize("name", ["zb-h1", "dualpipe-v", "1f1b"])
def test_splitting_and_merging_undo_each_other(name):
    split = split_backwards(outline(name, 2, 4))
    assert not any(action.op.value == "B" for row in split.actions for action in row)
    assert split_backwards(merge_backwards(split)) == split
    assert merge_backwards(split_backwards(Plan.from_text("0F0 0B0"))).to_text() == "rank 0: 0F0 0B0"
