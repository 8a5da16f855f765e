import math

import pytest

from torchdistpackage.errors import DeadlockError, ScheduleError
from torchdistpackage.schedule import CostModel, Placement, Plan, build, simulate, without_communication

SIZES = [(2, 4), (3, 7), (4, 8), (4, 12), (5, 20), (8, 32)]


def timed(name, p, m, *, forward_only=False, chunks=1, **costs):
    plan = build(name, p, m, forward_only=forward_only, chunks=chunks)
    return simulate(plan, CostModel.uniform(p * chunks, chunks=chunks, **costs))


def times(timeline, rank):
    return " ".join(f"{span.action}@{span.start:g}-{span.end:g}" for span in timeline.spans[rank])


def test_a_picture_computed_by_hand():
    timeline = timed("1f1b", 2, 2, hop=0.5)
    assert times(timeline, 0) == "0F0@0-1 0F1@1-2 0B0@5-7 0B1@8-10"
    assert times(timeline, 1) == "1F0@1.5-2.5 1B0@2.5-4.5 1F1@4.5-5.5 1B1@5.5-7.5"
    assert timeline.peak_bytes == (2, 1)
    assert timeline.bubble == (4, 4)


def test_a_split_picture_with_unequal_stages():
    plan = Plan.from_text("0F0 0F1 0I0 0W0 0I1 0W1\n1F0 1I0 1F1 1I1 1W0 1W1")
    timeline = simulate(plan, CostModel((1, 2), (1, 1), (0.5, 1), hop=(0.25,)))
    assert times(timeline, 0) == "0F0@0-1 0F1@1-2 0I0@4.5-5.5 0W0@5.5-6 0I1@7.5-8.5 0W1@8.5-9"
    assert times(timeline, 1) == "1F0@1.25-3.25 1I0@3.25-4.25 1F1@4.25-6.25 1I1@6.25-7.25 1W0@7.25-8.25 1W1@8.25-9.25"


def test_a_hop_within_a_rank_costs_nothing():
    plan = Plan("v", Placement.v(1), 1, Plan.from_text("0F0 1F0 1B0 0B0").actions)
    assert simulate(plan, CostModel.uniform(2, hop=9, chunks=2)).makespan == 3


def test_messages_cost_latency_and_bytes():
    costs = CostModel((1, 1), (1, 1), (1, 1), hop=0.5, message_bytes=(30,), bandwidth=20)
    assert simulate(build("gpipe", 2, 1), costs).makespan == 6 + 2 * 2


def test_the_whole_backward_has_a_price_of_its_own():
    assert timed("gpipe", 1, 4, backward=1.5).makespan == 4 * 2.5
    assert timed("zb-h1", 1, 4, backward=1.5).makespan == 4 * 3


def test_memory_is_counted_in_bytes_with_what_is_always_there():
    costs = CostModel((1, 1), (1, 1), (1, 1), activation_bytes=(3, 5), static_bytes=(100, 200))
    assert simulate(build("1f1b", 2, 4), costs).peak_bytes == (106, 205)


def test_evaluation_holds_one_micro_batch():
    timeline = timed("1f1b", 4, 8, forward_only=True, hop=0.5)
    assert timeline.makespan == 8 + 3 * 1.5
    assert timeline.peak_bytes == (1, 1, 1, 1)


@pytest.mark.parametrize("name", ["1f1b", "zb-h2"])
def test_communication_changes_nothing(name):
    plan, costs = build(name, 4, 8), CostModel.uniform(4, hop=0.2)
    assert simulate(plan, costs) == simulate(without_communication(plan), costs)


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("gpipe", lambda r, p, m: m),
        ("1f1b", lambda r, p, m: min(m, p - r)),
        ("eager-1f1b", lambda r, p, m: min(m, 2 * (p - r) - 1)),
    ],
)
def test_one_chunk_a_rank(name, peak, p, m):
    timeline = timed(name, p, m, forward=1.0, input_grad=1.25, weight_grad=0.75)
    assert timeline.bubble == ((p - 1) * 3,) * p
    assert timeline.peak_bytes == tuple(peak(r, p, m) for r in range(p))


@pytest.mark.parametrize("f", [1.0, 1.5])
@pytest.mark.parametrize("w", [0.5, 1.0])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 12), (5, 20), (8, 32)])
def test_zero_bubble_h1(p, m, w, f):
    timeline = timed("zb-h1", p, m, forward=f, input_grad=f, weight_grad=w)
    assert timeline.makespan == m * (2 * f + w) + (p - 1) * (2 * f - w)
    assert timeline.peak_bytes == (p,) * p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 12), (5, 20), (8, 32)])
def test_zero_bubble_h2(p, m):
    timeline = timed("zb-h2", p, m)
    assert timeline.makespan == 3 * m + p - 1
    # No rank idles between its first and its last action.
    assert all(row[-1].end - row[0].start == 3 * m for row in timeline.spans)
    assert timeline.peak_bytes == (2 * p - 1,) * p


@pytest.mark.parametrize("times", [(1, 2, 1), (1, 3, 1), (2, 1, 1), (1, 1.25, 0.75), (1, 1, 2)])
def test_zero_bubble_h2_of_other_costs(times):
    f, i, w = times
    timeline = timed("zb-h2", 4, 16, forward=f, input_grad=i, weight_grad=w)
    assert max(timeline.bubble) == pytest.approx(3 * max(f, f + i - 2 * w))


@pytest.mark.parametrize("p", [3, 4, 6, 8])
def test_little_memory_costs_a_part_of_the_bubble_of_one_f_one_b(p):
    whole = max(timed("1f1b", p, 4 * p).bubble)
    assert 0.58 < max(timed("v-half", p, 4 * p, chunks=2).bubble) / whole < 0.67
    assert 0.6 < max(timed("v-min", p, 4 * p, chunks=2).bubble) / whole <= 0.75


@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 9), (4, 8), (8, 32)])
def test_interleaved(p, m, v):
    work, memory = 3 * m, p + (p - 1) / v
    interleaved = timed("interleaved-1f1b", p, m, chunks=v)
    assert interleaved.makespan == pytest.approx(work + (p - 1) * 3 / v)
    assert max(interleaved.peak_bytes) == pytest.approx(memory)
    split = timed("interleaved-zb", p, m, chunks=v)
    assert split.makespan == pytest.approx(work + (p - 1) / v)
    assert max(split.peak_bytes) == pytest.approx(memory)
    breadth_first = timed("looped-bfs", p, m, chunks=v)
    assert breadth_first.makespan == pytest.approx(work + (p - 1) * 3 / v)
    assert max(breadth_first.peak_bytes) == m


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 12), (5, 20), (8, 32)])
def test_v_placed(p, m):
    zero_bubble = timed("zb-v", p, m, chunks=2)
    assert zero_bubble.makespan == 3 * m + (p - 1) / 2
    assert max(zero_bubble.peak_bytes) == p
    dual = timed("dualpipe-v", p, m, chunks=2)
    assert dual.makespan == 3 * m + (p - 1) / 2
    assert max(dual.peak_bytes) == p + 0.5
    assert max(timed("v-half", p, m, chunks=2).peak_bytes) == (p + 2) // 2
    assert max(timed("v-min", p, m, chunks=2).peak_bytes) == (p + 4) // 3


@pytest.mark.parametrize("waves", [1, 2])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_hanayo_is_packed_where_forward_and_backward_cost_the_same(p, waves):
    timeline = timed("hanayo", p, p, chunks=2 * waves, input_grad=1.0, weight_grad=0.0)
    assert timeline.makespan == 2 * p + (p - 1) / waves
    assert max(timeline.peak_bytes) == p


COMPARISON = [  # p = 8, m = 32: F = I = W = 1; the same with hops of 0.05; F 1, I 1.2, W 0.8 with those hops; peak
    ("gpipe", 1, 117.0, 117.7, 117.7, 32),
    ("1f1b", 1, 117.0, 120.4, 120.4, 8),
    ("eager-1f1b", 1, 117.0, 117.7, 117.7, 15),
    ("interleaved-1f1b", 2, 106.5, 108.0, 108.0, 11.5),
    ("interleaved-1f1b", 4, 101.25, 104.35, 104.35, 9.75),
    ("interleaved-zb", 2, 99.5, 100.6, 102.0, 11.5),
    ("interleaved-zb", 4, 97.75, None, None, 9.75),
    ("zb-h1", 1, 103.0, 104.4, 107.2, 8),
    ("zb-h2", 1, 103.0, 103.35, 103.35, 15),
    ("zb-v", 2, 99.5, 101.15, 101.85, 8),
    ("v-half", 2, 109.0, 110.8, 113.3, 5),
    ("v-min", 2, 109.5, 118.9, 138.7, 4),
    ("dualpipe-v", 2, 99.5, 101.1, 103.2, 8.5),
    ("hanayo", 2, 131.0, 136.9, 136.9, 8),
    ("hanayo", 4, 113.5, 125.0, 125.0, 8),
]


@pytest.mark.parametrize(("name", "chunks", "plain", "hops", "unequal", "peak"), COMPARISON)
def test_the_comparison_of_schedules(name, chunks, plain, hops, unequal, peak):
    timeline = timed(name, 8, 32, chunks=chunks)
    assert timeline.makespan == pytest.approx(plain)
    assert max(timeline.peak_bytes) == peak
    if hops is not None:
        assert timed(name, 8, 32, chunks=chunks, hop=0.05).makespan == pytest.approx(hops)
        costs = {"input_grad": 1.2, "weight_grad": 0.8, "hop": 0.05}
        assert timed(name, 8, 32, chunks=chunks, **costs).makespan == pytest.approx(unequal)


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ({"forward": ()}, "at least one stage"),
        ({"weight_grad": (1.0,)}, "weight_grad has 1 entries for 2 stages"),
        ({"input_grad": (1.0, -1.0)}, r"input_grad\[1\] is -1.0"),
        ({"forward": (math.nan, 1.0)}, r"forward\[0\] is nan"),
        ({"hop": (1.0, 1.0)}, "hop has 2 entries for 1 boundaries"),
        ({"message_bytes": (1.0,)}, "belong together"),
        ({"message_bytes": (1.0,), "bandwidth": 0.0}, "above 0"),
    ],
)
def test_wrong_costs_are_refused(costs, reason):
    good = {"forward": (1.0, 1.0), "input_grad": (1.0, 1.0), "weight_grad": (1.0, 1.0)}
    with pytest.raises(ScheduleError, match=reason):
        CostModel(**{**good, **costs})


def test_costs_of_another_number_of_stages_are_refused():
    with pytest.raises(ScheduleError, match="costs are those of 4 stages, the plan has 2 on 2 ranks"):
        simulate(build("1f1b", 2, 2), CostModel.uniform(4))


def test_a_deadlock_is_shown():
    with pytest.raises(DeadlockError, match="wait for each other"):
        simulate(Plan.from_text("0F0 0B0 0F1 0B1\n1F1 1B1 1F0 1B0"), CostModel.uniform(2))


def test_equal_stages_are_whole_chunks_of_ranks():
    with pytest.raises(ScheduleError, match="5 stages are not 2 chunks on each of some ranks"):
        CostModel.uniform(5, chunks=2)
