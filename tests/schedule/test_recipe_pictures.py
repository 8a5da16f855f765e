"""Expected orders as pictures: one line a rank, upper case for its first chunk and lower case for its second."""

from functools import partial

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.recipes.dualpipe_v import dualpipe_v
from torchdistpackage.schedule.recipes.eager_one_f_one_b import eager_one_f_one_b
from torchdistpackage.schedule.recipes.gpipe import gpipe
from torchdistpackage.schedule.recipes.interleaved import interleaved_one_f_one_b, interleaved_zero_bubble
from torchdistpackage.schedule.recipes.looped_bfs import looped_breadth_first
from torchdistpackage.schedule.recipes.one_f_one_b import one_f_one_b
from torchdistpackage.schedule.recipes.pattern import hanayo, pattern, v_half, v_min
from torchdistpackage.schedule.recipes.zero_bubble import zero_bubble_h1, zero_bubble_h2
from torchdistpackage.schedule.recipes.zero_bubble_v import zero_bubble_v


def picture(recipe, placement, num_microbatches):
    def cell(rank, action):
        chunk = placement.local_stages(rank).index(action.stage)
        return f"{action.op.value.lower() if chunk else action.op.value}{action.microbatch}"

    ranks = range(placement.num_ranks)
    rows = [recipe(rank, placement.num_ranks, num_microbatches) for rank in ranks]
    return "\n".join(" ".join(cell(rank, action) for action in rows[rank]) for rank in ranks)


def test_eager_one_f_one_b_sends_forwards_early():
    assert picture(eager_one_f_one_b, Placement.loop(3), 6) == (
        "F0 F1 F2 F3 F4 B0 F5 B1 B2 B3 B4 B5\n"
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 B4 B5\n"
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5"
    )  # fmt: skip


def test_zero_bubble_h1():
    assert picture(zero_bubble_h1, Placement.loop(3), 4) == (
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3\n"
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3\n"
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"
    )  # fmt: skip


def test_zero_bubble_h2():
    assert picture(zero_bubble_h2, Placement.loop(3), 4) == (
        "F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3\n"
        "F0 F1 F2 I0 F3 I1 I2 W0 I3 W1 W2 W3\n"
        "F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3"
    )  # fmt: skip


def test_interleaved_one_f_one_b():
    assert picture(interleaved_one_f_one_b, Placement.loop(2, chunks=2), 4) == (
        "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 b2 b3 B2 B3\n"
        "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3"
    )  # fmt: skip


def test_interleaved_with_a_partial_group():
    assert picture(interleaved_one_f_one_b, Placement.loop(3, chunks=2), 4) == (
        "F0 F1 F2 f0 f1 f2 F3 b0 b1 f3 b2 B0 B1 B2 b3 B3\n"
        "F0 F1 F2 f0 f1 f2 b0 F3 b1 b2 B0 f3 B1 B2 b3 B3\n"
        "F0 F1 F2 f0 b0 f1 b1 f2 b2 F3 B0 B1 B2 f3 b3 B3"
    )  # fmt: skip


def test_interleaved_in_groups_as_large_as_the_batch():
    assert picture(partial(interleaved_one_f_one_b, group_size=4), Placement.loop(2, chunks=2), 4) == (
        "F0 F1 F2 F3 f0 f1 f2 b0 f3 b1 b2 b3 B0 B1 B2 B3\n"
        "F0 F1 F2 F3 f0 b0 f1 b1 f2 b2 f3 b3 B0 B1 B2 B3"
    )  # fmt: skip


def test_interleaved_zero_bubble():
    assert picture(interleaved_zero_bubble, Placement.loop(2, chunks=2), 4) == (
        "F0 F1 f0 f1 F2 i0 w0 F3 i1 w1 f2 I0 W0 f3 I1 W1 i2 w2 i3 w3 I2 W2 I3 W3\n"
        "F0 F1 f0 i0 f1 i1 w0 F2 I0 w1 F3 I1 W0 f2 i2 W1 f3 i3 w2 I2 w3 I3 W2 W3"
    )  # fmt: skip


def test_looped_breadth_first():
    assert picture(looped_breadth_first, Placement.loop(2, chunks=2), 3) == (
        "F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2\n"
        "F0 F1 F2 f0 f1 f2 b0 b1 b2 B0 B1 B2"
    )  # fmt: skip


def test_zero_bubble_v():
    assert picture(zero_bubble_v, Placement.v(3), 5) == (
        "F0 F1 F2 F3 F4 f0 i0 w0 f1 i1 w1 f2 i2 w2 I0 W0 f3 i3 w3 I1 W1 f4 i4 w4 I2 W2 I3 W3 I4 W4\n"
        "F0 F1 F2 f0 F3 f1 i0 w0 f2 i1 w1 F4 I0 W0 f3 i2 w2 I1 W1 f4 i3 w3 I2 i4 I3 W2 I4 W3 w4 W4\n"
        "F0 f0 F1 f1 F2 f2 i0 w0 F3 I0 W0 f3 i1 w1 F4 I1 W1 f4 i2 w2 I2 i3 I3 i4 I4 W2 w3 w4 W3 W4"
    )  # fmt: skip


def test_zero_bubble_v_with_fewer_microbatches_than_it_needs():
    assert picture(zero_bubble_v, Placement.v(3), 2) == (
        "F0 F1 f0 i0 w0 f1 i1 w1 I0 W0 I1 W1\n"
        "F0 F1 f0 f1 i0 w0 i1 w1 I0 W0 I1 W1\n"
        "F0 f0 F1 f1 i0 w0 I0 W0 i1 w1 I1 W1"
    )  # fmt: skip


def test_dualpipe_v():
    assert picture(dualpipe_v, Placement.v(2), 5) == (
        "F0 F1 F2 f0 i0 w0 f1 F3 b1 f2 B0 F4 b2 f3 B1 b3 f4 B2 b4 I3 W3 I4 W4\n"
        "F0 f0 F1 f1 F2 b0 f2 B0 F3 b1 f3 B1 F4 b2 f4 B2 b3 B3 i4 I4 w4 W4"
    )  # fmt: skip


def test_dualpipe_v_with_fewer_microbatches_than_it_needs():
    assert picture(dualpipe_v, Placement.v(2), 2) == (
        "F0 F1 f0 i0 w0 f1 b1 B0 B1\n"
        "F0 f0 F1 f1 b0 B0 b1 B1"
    )  # fmt: skip


def test_v_half():
    assert picture(v_half, Placement.v(3), 4) == (
        "F0 F1 f0 i0 w0 F2 f1 i1 w1 I0 W0 F3 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 I3 W3\n"
        "F0 f0 F1 i0 w0 f1 F2 I0 i1 W0 f2 w1 F3 I1 i2 W1 f3 w2 I2 i3 W2 w3 I3 W3\n"
        "F0 f0 F1 f1 i0 w0 I0 W0 F2 f2 i1 w1 I1 W1 F3 f3 i2 w2 I2 W2 i3 w3 I3 W3"
    )  # fmt: skip


def test_v_min():
    assert picture(v_min, Placement.v(3), 4) == (
        "F0 f0 F1 i0 w0 f1 F2 I0 i1 W0 w1 f2 F3 I1 i2 W1 w2 f3 I2 i3 W2 w3 I3 W3\n"
        "F0 f0 F1 i0 f1 w0 I0 F2 W0 i1 f2 w1 I1 F3 W1 i2 f3 w2 I2 W2 i3 w3 I3 W3\n"
        "F0 f0 F1 f1 i0 I0 w0 W0 F2 f2 i1 I1 w1 W1 F3 f3 i2 I2 w2 W2 i3 I3 w3 W3"
    )  # fmt: skip


def test_hanayo_of_one_wave():
    assert picture(hanayo, Placement.v(3), 3) == (
        "F0 F1 F2 f0 b0 f1 b1 f2 b2 B0 B1 B2\n"
        "F0 F1 f0 F2 f1 b0 f2 b1 B0 b2 B1 B2\n"
        "F0 f0 F1 f1 F2 f2 b0 B0 b1 B1 b2 B2"
    )  # fmt: skip


def test_hanayo_of_two_waves_has_four_chunks_a_rank():
    assert " ".join(map(str, hanayo(0, 2, 1, waves=2))) == "0F0 3F0 4F0 7F0 7B0 4B0 3B0 0B0"


def test_a_looped_schedule_with_one_chunk_is_the_schedule_without():
    one = Placement.loop(4)
    assert picture(partial(looped_breadth_first, chunks=1), one, 6) == picture(gpipe, one, 6)
    assert picture(partial(interleaved_one_f_one_b, chunks=1), one, 6) == picture(eager_one_f_one_b, one, 6)


def test_a_pattern_is_one_f_one_b():
    for p, m in ((1, 3), (3, 2), (4, 9)):
        offsets = tuple((stage, 2 * p - 1 - stage) for stage in range(p))
        pipeline = Placement.loop(p)
        assert picture(partial(pattern, offsets=offsets, period=2), pipeline, m) == picture(one_f_one_b, pipeline, m)


def test_a_pattern_places_weight_gradients_where_it_is_told_or_where_there_is_room():
    told = pattern(0, 1, 2, offsets=((0, 1, 5),), period=3)
    assert " ".join(map(str, told)) == "0F0 0I0 0F1 0I1 0W0 0W1"
    room = pattern(0, 1, 2, offsets=((0, 1, None),), period=2)
    assert " ".join(map(str, room)) == "0F0 0I0 0F1 0I1 0W0 0W1"


def test_a_pattern_names_the_actions_that_collide():
    with pytest.raises(ScheduleError, match=r"rank 1 cannot run 1F1 and 1B0 in the same slot 3"):
        pattern(1, 2, 4, offsets=((0, 4), (1, 3)), period=2)


def test_a_pattern_that_does_not_fit_its_stages_is_refused():
    with pytest.raises(ScheduleError, match=r"for 3 stages"):
        pattern(0, 3, 4, offsets=((0, 3), (1, 2)), period=2)
    with pytest.raises(ScheduleError, match=r"groups of 0"):
        pattern(0, 1, 4, offsets=((0, 1),), period=2, group=0)


def test_groups_that_would_deadlock_are_refused():
    with pytest.raises(ScheduleError, match=r"groups of 2 .* on 4 ranks with 2 chunks.* at least 3"):
        interleaved_one_f_one_b(0, 4, 8, group_size=2)
    assert len(list(interleaved_zero_bubble(0, 4, 8, group_size=3))) == 8 * 2 * 3
    with pytest.raises(ScheduleError, match=r"groups of 0"):
        interleaved_zero_bubble(0, 1, 8, chunks=1, group_size=0)


def test_one_rank_needs_no_pipeline():
    one, v = Placement.loop(1), Placement.v(1)
    assert picture(zero_bubble_h1, one, 2) == picture(zero_bubble_h2, one, 2) == "F0 I0 W0 F1 I1 W1"
    assert picture(zero_bubble_v, v, 2) == "F0 f0 i0 w0 F1 I0 W0 f1 i1 w1 I1 W1"
    assert picture(dualpipe_v, v, 2) == "F0 f0 F1 b0 f1 B0 b1 I1 W1"
    assert picture(v_min, v, 1) == "F0 f0 i0 I0 w0 W0"
    assert picture(hanayo, v, 2) == "F0 f0 b0 B0 F1 f1 b1 B1"
