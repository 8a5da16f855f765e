from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistpackage.errors import DeadlockError, ScheduleError
from torchdistpackage.schedule import (
    Op,
    Plan,
    add_communication,
    build,
    describe,
    names,
    verify,
    without_communication,
)


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
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1F0 1B0 1SEND_B0", "at the message for 1RECV_F0, the receiver at its end"),
        ("0F0 0B0 0RECV_F0", "0RECV_F0 has no stage to receive from"),
        ("0F0 0B0 0RECV_B0", "0RECV_B0 has no stage to receive from"),
        ("0F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0", "0SEND_F0 is missing: another rank needs the result"),
    ],
)
def test_wrong_plans_are_refused_with_the_reason(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        verify(Plan.from_text(text))


def test_a_micro_batch_that_the_step_does_not_have_is_refused():
    plan = replace(Plan.from_text("0F0 0B0 0F1 0B1"), num_microbatches=1)
    with pytest.raises(ScheduleError, match="0F1 is outside of the 1 micro-batches"):
        verify(plan)


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


def runs(plan):
    """An independent judge: counts, then lets every rank go as far as it can, with a queue for each directed edge."""
    owner, m = plan.placement.owners, plan.num_microbatches
    everything = [action for row in plan.actions for action in row]
    if len(set(everything)) != len(everything):
        return False
    for rank, row in enumerate(plan.actions):
        if any(not 0 <= a.stage < len(owner) or owner[a.stage] != rank for a in row):
            return False
    present = {str(action) for action in everything}
    for s in range(len(owner)):
        for i in range(m):
            if f"{s}F{i}" not in present:
                return False
            if not plan.forward_only and (f"{s}B{i}" in present, f"{s}I{i}" in present, f"{s}W{i}" in present) not in (
                (True, False, False),
                (False, True, True),
            ):
                return False
    queues, done, at, talks = {}, set(), [0] * len(plan.actions), plan.has_communication

    def grad(s, i):
        return f"{s}B{i}" in done or f"{s}I{i}" in done

    def possible(rank, action):
        s, op, i = action
        up = talks and s + 1 < len(owner) and owner[s + 1] != rank
        down = talks and s > 0 and owner[s - 1] != rank
        match op:
            case Op.FORWARD:
                return s == 0 or (f"{s}RECV_F{i}" if down else f"{s - 1}F{i}") in done
            case Op.BACKWARD | Op.INPUT_GRAD:
                arrived = s + 1 == len(owner) or (f"{s}RECV_B{i}" in done if up else grad(s + 1, i))
                return arrived and f"{s}F{i}" in done
            case Op.WEIGHT_GRAD:
                return f"{s}I{i}" in done
            case Op.SEND_F:
                return up and f"{s}F{i}" in done
            case Op.SEND_B:
                return down and grad(s, i)
            case Op.RECV_F:
                return down and queues.get((owner[s - 1], rank), [None])[0] == f"{s}RECV_F{i}"
            case Op.RECV_B:
                return up and queues.get((owner[s + 1], rank), [None])[0] == f"{s}RECV_B{i}"
            case Op.REDUCE_GRAD:
                return all(f"{s}B{i}" in done or f"{s}W{i}" in done for i in range(m))

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(plan.actions):
            while at[rank] < len(row) and possible(rank, row[at[rank]]):
                action = row[at[rank]]
                s, op, i = action
                if op is Op.SEND_F:
                    queues.setdefault((rank, owner[s + 1]), []).append(f"{s + 1}RECV_F{i}")
                elif op is Op.SEND_B:
                    queues.setdefault((rank, owner[s - 1]), []).append(f"{s - 1}RECV_B{i}")
                elif op is Op.RECV_F:
                    queues[owner[s - 1], rank].pop(0)
                elif op is Op.RECV_B:
                    queues[owner[s + 1], rank].pop(0)
                if (owner[s - 1] if op is Op.RECV_F else owner[s + 1] if op is Op.RECV_B else rank) != rank:
                    edge = (owner[s - 1] if op is Op.RECV_F else owner[s + 1], rank)
                    if not queues[edge]:
                        del queues[edge]
                done.add(str(action))
                at[rank] += 1
                moved = True
    return all(position == len(row) for position, row in zip(at, plan.actions, strict=True)) and not queues


def mutate(rows, data):
    """Swaps, drops, doubles or moves one action."""
    rank = data.draw(st.integers(0, len(rows) - 1))
    row = rows[rank]
    index = data.draw(st.integers(0, len(row) - 1))
    kind = data.draw(st.sampled_from(["swap", "neighbours", "drop", "double", "move", "other rank"]))
    if kind in ("swap", "neighbours"):
        other = min(index + 1, len(row) - 1) if kind == "neighbours" else data.draw(st.integers(0, len(row) - 1))
        row[index], row[other] = row[other], row[index]
    elif kind == "drop":
        row.pop(index)
    elif kind == "double":
        row.insert(data.draw(st.integers(0, len(row))), row[index])
    else:
        action = row.pop(index)
        target = rows[data.draw(st.integers(0, len(rows) - 1))] if kind == "other rank" else row
        target.insert(data.draw(st.integers(0, len(target))), action)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_mutated_plans_are_rejected_exactly_when_they_are_wrong(data):
    plan = build(data.draw(st.sampled_from(names())), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)))
    if data.draw(st.booleans()):
        plan = without_communication(plan)
    rows = [list(row) for row in plan.actions]
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(rows, data)
    mutant = plan.with_actions(rows)
    expected = runs(mutant)
    try:
        verify(mutant)
    except ScheduleError:
        assert not expected
    else:
        assert expected


@pytest.mark.parametrize("name", names())
def test_the_catalogue_is_accepted(name):
    for p in range(1, 7):
        for m in range(1, 4 * p + 2):
            assert runs(build(name, p, m)) if p < 4 else build(name, p, m)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_the_whole_catalogue_is_accepted(name):
    chunks = [v for v in range(1, 5) if describe(name).runs(v)]
    for p in range(1, 17):
        for m in range(1, 4 * p + 2):
            for v in chunks:
                build(name, p, m, chunks=v)
                build(name, p, m, chunks=v, forward_only=True)
