"""Whatever goes wrong on one rank: every rank says what, and the next step is right."""

import pytest
import torch
from distributed_harness import run_distributed
from fault_pipeline import FaultyPipeline, outcome

TRAINING = ["forward", "hook", "backward", "bwd_fn", "exit", "output", "dtype", "shape", "detached", "nan"]
EVALUATION = ["forward", "hook", "exit", "output", "dtype", "shape"]
SCHEDULES = ["1f1b", "interleaved-1f1b", "zb-v"]


def soft_faults(rank, world, schedule, forward_only, same_host):
    """One fault after the other on every rank in turn, and a good step after each."""
    pipeline = FaultyPipeline(schedule, forward_only, same_host=same_host)
    expected, gradients = pipeline.step(), pipeline.gradients()
    results = {}
    for fault in EVALUATION if forward_only else TRAINING:
        for bad in range(world):
            found = outcome(pipeline.step, fault if rank == bad else None)
            again, same = pipeline.step(), pipeline.gradients()
            assert torch.equal(again, expected), (fault, bad)
            assert all(map(torch.equal, same, gradients)), (fault, bad)
            results[fault, bad] = found
    return results, pipeline.last_stage, list(pipeline.stages)


@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_error_is_named_by_every_rank_and_the_next_step_is_right(schedule, forward_only, same_host):
    everyone = run_distributed(soft_faults, 3, schedule, forward_only, same_host, timeout=120)
    last_stage, stages = everyone[0][1], [of_rank for _, _, of_rank in everyone]
    for fault, bad in everyone[0][0]:
        found = [results[fault, bad] for results, _, _ in everyone]
        assert all(seconds < 5 for *_, seconds in found), (fault, bad, found)
        victim = max(stages[bad])
        check = {"nan": check_nan, "dtype": check_layout, "shape": check_layout}.get(fault, check_error)
        if fault == "detached" and victim == 0:
            assert [kind for kind, *_ in found] == ["ok"] * 3  # a frozen first stage is nobody's error
        else:
            check(fault, bad, victim, last_stage, found)


def check_error(fault, bad, victim, last_stage, found):
    """The bad rank raises its own exception, the others say whose and where."""
    kind, text, place, notes, _ = found[bad]
    planted = fault in ("forward", "hook", "backward", "bwd_fn")
    own = ["Planted"] if planted else ["SystemExit"] if fault == "exit" else ["TransportError", "PipelineError"]
    assert kind in own, (fault, found)
    if fault == "output" and victim == last_stage and kind == "PipelineError" and ">>" not in notes:
        return check_end(bad, found)  # in evaluation anything may be an output; only together they do not fit
    assert f">>{victim}" in notes, (fault, bad, notes)
    for rank, (kind, told, place, _, _) in enumerate(found):
        if rank != bad:
            assert kind == "PipelineError", (fault, bad, found)
            assert text in told or "planted" in told
            assert "Its traceback:" in told
            assert place["global_rank"] == bad
            assert place["stage"] == victim
            assert place["action"] == f"{victim}{place['action'][1]}{place['microbatch']}"


def check_end(bad, found):
    assert all(
        kind == "PipelineError" and "different types" in text and (rank == bad or place["global_rank"] == bad)
        for rank, (kind, text, place, _, _) in enumerate(found)
    ), found


def check_layout(fault, bad, victim, last_stage, found):
    """What arrives in another layout is what the stage sent: the next stage's own code objects, if it does."""
    kinds = [kind for kind, *_ in found]
    if victim == last_stage:
        assert set(kinds) == {"ok"} or kinds.count("PipelineError") >= 2, (fault, bad, found)
        return
    assert sorted(kinds) == ["PipelineError", "PipelineError", "RuntimeError"], (fault, bad, found)
    culprit = kinds.index("RuntimeError")
    assert all(place["global_rank"] == culprit and place["stage"] == victim + 1 for _, _, place, *_ in found if place)


def check_nan(fault, bad, victim, last_stage, found):
    assert all(kind == "RuntimeError" and "norm" in text and "on every rank" in text for kind, text, *_ in found), found


def hard_fault(rank, world, schedule, forward_only, same_host, fault, bad):
    """A fault that the bad rank does not tell of; then what the others hear if they go on all the same."""
    slow = fault in ("stopped", "stuck")
    pipeline = FaultyPipeline(schedule, forward_only, same_host=same_host, watchdog=1.0, timeout=6.0 if slow else None)
    pipeline.step()
    found = outcome(pipeline.step, fault if rank == bad else None)
    return found, None if slow and same_host else outcome(pipeline.step)


def check_hard_fault(schedule, forward_only, same_host, fault, bad):
    everyone = run_distributed(hard_fault, 3, schedule, forward_only, same_host, fault, bad, may_die=[bad])
    for rank, result in enumerate(everyone):
        if rank == bad:
            continue
        (kind, text, place, _, seconds), again = result
        assert kind == "PipelineError", (rank, result)
        assert place["global_rank"] == bad, (rank, result)
        assert seconds < (6.0 + 5.0 if fault in ("stopped", "stuck") else 5.0), (rank, result)
        if fault in ("killed", "gone"):
            assert "killed" in text, (rank, result)
        elif fault == "stuck":
            assert f"rank {bad} of the pipeline (global rank {bad}) is at" in text, text
            assert "in _sleep (" in text, text
            assert place["microbatch"] == 1
        else:
            assert f"rank {bad} of the pipeline says nothing" in text, text
            assert "is stopped" in text or not same_host, text
        if again is not None:
            assert again[0] == "NotWhole", (rank, again)
            assert "start all ranks again" in again[1]
            assert again[-1] < 2


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("fault", ["killed", "gone", "stopped", "stuck"])
def test_a_rank_that_says_nothing_is_named_by_the_others(fault, bad):
    check_hard_fault("1f1b", False, bad != 1, fault, bad)


@pytest.mark.slow
@pytest.mark.parametrize("same_host", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("fault", ["killed", "gone", "stopped", "stuck"])
@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_under_every_kind_of_schedule(schedule, forward_only, fault, bad, same_host):
    check_hard_fault(schedule, forward_only, same_host, fault, bad)


def comes_back(rank, world, bad):
    pipeline = FaultyPipeline("1f1b", watchdog=1.0, timeout=6.0)
    expected = pipeline.step()
    found = outcome(pipeline.step, "late" if rank == bad else None)
    return found, torch.equal(pipeline.step(), expected)


@pytest.mark.parametrize("bad", [0, 2])
def test_a_rank_that_comes_back_too_late_is_told_and_the_next_step_is_right(bad):
    for kind, text, place, *_, same in [(*found, same) for found, same in run_distributed(comes_back, 3, bad)]:
        assert kind == "PipelineError"
        assert "in _late (" in text
        assert place["global_rank"] == bad
        assert same
