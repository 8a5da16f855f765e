import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Action, Op, Placement


@pytest.mark.parametrize("text", ["2F0", "0B13", "7I2", "1W1", "3SEND_F0", "3RECV_F0", "0SEND_B5", "0RECV_B5"])
def test_text_and_back(text):
    assert str(Action.parse(text)) == text


def test_reduce_grad_belongs_to_the_whole_step():
    assert Action.parse("4REDUCE_GRAD") == Action(4, Op.REDUCE_GRAD, None)
    assert str(Action(4, Op.REDUCE_GRAD, None)) == "4REDUCE_GRAD"


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "2REDUCE_GRAD3", "2F0 2F1", "-1F0"])
def test_what_is_not_an_action_is_refused_with_the_grammar(text):
    with pytest.raises(ScheduleError, match="write stage, operation and micro-batch"):
        Action.parse(text)


def test_loop_wraps_round_and_v_turns():
    assert [Placement.loop(3, 2).local_stages(r) for r in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert [Placement.v(3).local_stages(r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert Placement.v(2, 3).owners == (0, 1, 1, 0, 0, 1)


def test_the_loss_is_where_the_last_stage_is():
    assert Placement.loop(4, 2).loss_rank == 3
    assert Placement.v(4).loss_rank == 0


@pytest.mark.parametrize("owners", [(0, 2), (0,), (0, 1, 5)])
def test_every_rank_owns_a_stage(owners):
    with pytest.raises(ScheduleError, match="must own at least one stage"):
        Placement(2, owners)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ScheduleError, match="at least 1"):
        Placement.loop(*sizes)
