import itertools
import json

import pytest

from torchdistpackage.schedule import Action, CostModel, Op, Span, Timeline, build, names, peak_activations, simulate
from torchdistpackage.visualize import chrome_trace, write_trace


def timeline(name, ranks=4, microbatches=6, **costs):
    plan = build(name, ranks, microbatches)
    return simulate(plan, CostModel.uniform(plan.placement.num_stages, hop=0.25, **costs))


def events(trace, phase):
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize("name", names())
def test_the_format_is_kept(name):
    trace = json.loads(json.dumps(chrome_trace(timeline(name)), allow_nan=False))
    assert {event["ph"] for event in trace["traceEvents"]} == set("MXsfC")
    for event in trace["traceEvents"]:
        assert event["name"]
        assert event["pid"] == 1
        assert event["tid"] >= 0
        assert event["ph"] == "M" or event["ts"] >= 0
    slices = {}
    for event in events(trace, "X"):
        slices.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for row in slices.values():
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(row))


@pytest.mark.parametrize("name", names())
def test_every_message_between_ranks_is_an_arrow(name):
    plan, trace = build(name, 4, 6), chrome_trace(timeline(name))
    starts, ends = events(trace, "s"), events(trace, "f")
    sends = sum(action.op in (Op.SEND_F, Op.SEND_B) for row in plan.actions for action in row)
    assert len(starts) == len(ends) == sends
    assert len({event["id"] for event in starts}) == sends
    slices = events(trace, "X")
    for start, end in zip(starts, ends, strict=True):
        assert start["id"] == end["id"]
        assert start["ts"] < end["ts"]
        assert start["tid"] != end["tid"]
        for point in (start, end):
            inside = [s for s in slices if s["tid"] == point["tid"] and s["ts"] <= point["ts"] < s["ts"] + s["dur"]]
            assert len(inside) == 1


@pytest.mark.parametrize("name", names())
def test_the_counters_reach_the_peak_and_end_at_zero(name):
    counters = events(chrome_trace(timeline(name)), "C")
    for rank, peak in enumerate(peak_activations(build(name, 4, 6))):
        values = [event["args"]["activations"] for event in counters if event["tid"] == rank + 1]
        assert max(values) == peak
        assert values[-1] == 0


def test_ranks_and_processes_have_names():
    simulated = timeline("1f1b", 2, 2)
    trace = chrome_trace(simulated, measured=Timeline("1f1b, measured", simulated.spans))
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events(trace, "M") if e["name"].endswith("_name")}
    assert named[1, 0] == "1f1b"
    assert named[2, 0] == "1f1b, measured"
    assert named[1, 1] == named[2, 1] == "rank 0"
    assert len({event["id"] for event in events(trace, "s")}) == len(events(trace, "s"))


def test_times_are_microseconds(tmp_path):
    waiting = Span(Action(0, Op.RECV_F, 0), 0.0, 0.5)
    measured = Timeline("measured", ((waiting, Span(Action(0, Op.FORWARD, 0), 0.5, 0.75)),), unit="s")
    write_trace(tmp_path / "trace.json", measured)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert [(e["cat"], e["ts"], e["dur"]) for e in events(trace, "X")] == [
        ("communication", 0, 500_000),
        ("compute", 500_000, 250_000),
    ]
    assert trace["otherData"]["measured"]["makespan"] == 0.75


def test_evaluation_has_no_counters():
    plan = build("1f1b", 2, 2, forward_only=True)
    assert not events(chrome_trace(simulate(plan, CostModel.uniform(2))), "C")
