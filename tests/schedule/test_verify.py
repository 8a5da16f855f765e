import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdistpackage.errors import DeadlockError, ScheduleError
from torchdistpackage.schedule import Op, Plan, add_communication, build, verify


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0B0 0F0", "reaches 0B0 before 0F0"),
        ("0F0 0F1 0B0", "micro-batch 1 on stage 0 needs one B"),
        ("0F0 0F0 0B0", "0F0 stands 2 times"),
        ("0F0 0B0 0W0", "1 B, 0 I and 1 W"),
        ("0F0 0W0 0I0", "reaches 0W0 before 0I0"),
        ("0F0 0B0 0F2 0B2", "0F1 is missing"),
        ("0F0 0REDUCE_GRAD 0B0", "reaches 0REDUCE_GRAD before 0B0"),
        ("0F0 0B0 0SEND_F0", "sends what no other rank takes"),
        ("0F0 0SEND_F0 0B0\n1F0 1B0", "1SEND_B0 is missing"),
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1F0 1B0 1SEND_B0", "the receiver at None"),
    ],
)
def test_wrong_plans_are_refused_with_the_reason(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        verify(Plan.from_text(text))


def test_the_error_shows_the_marked_grid():
    with pytest.raises(ScheduleError, match="rank 0: >>0B0<< 0F0"):
        verify(Plan.from_text("0B0 0F0"))


def test_a_deadlock_names_who_waits_for_whom():
    plan = Plan.from_text("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0")
    with pytest.raises(DeadlockError, match="rank 0 at 0B0 waits for 1B0; rank 1 at 1F1 waits for 0F1"):
        verify(plan)
    with pytest.raises(DeadlockError):
        verify(add_communication(plan))


def test_split_backwards_are_accepted():
    verify(add_communication(Plan.from_text("0F0 0F1 0I0 0I1 0W0 0W1\n1F0 1I0 1F1 1I1 1W0 1W1")))


def test_the_memory_bound():
    verify(build("1f1b", 4, 16), max_activations=4)
    with pytest.raises(ScheduleError, match="rank 0 holds 16 forwards"):
        verify(build("gpipe", 4, 16), max_activations=4)


def test_messages_out_of_order_on_an_edge_are_refused():
    text = build("gpipe", 2, 2, forward_only=True).to_text()
    swapped = text.replace("1RECV_F0 1F0 1RECV_F1 1F1", "1RECV_F1 1F1 1RECV_F0 1F0")
    with pytest.raises(ScheduleError, match="the sends and the receives differ"):
        verify(Plan.from_text(swapped))


@given(st.data())
def test_a_dropped_or_doubled_action_is_always_noticed(data):
    plan = build("1f1b", data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)))
    rank = data.draw(st.integers(0, plan.placement.num_ranks - 1))
    index = data.draw(st.integers(0, len(plan.actions[rank]) - 1))
    rows = [list(row) for row in plan.actions]
    if data.draw(st.booleans()):
        rows[rank].insert(data.draw(st.integers(0, len(rows[rank]))), rows[rank][index])
    elif rows[rank].pop(index).op is Op.REDUCE_GRAD:
        return  # reducing is optional
    with pytest.raises(ScheduleError):
        verify(plan.with_actions(rows))
