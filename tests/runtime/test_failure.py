import time

import pytest
import torch
import torch.distributed as dist
from loopback_pipeline import mse, on_every_rank, run_step, stage_functions, stage_inputs
from torch import nn

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.board import StoreBoard
from torchdistpackage.runtime.failure import FailureReport, is_torn
from torchdistpackage.schedule import build, names


class Planted(Exception):
    pass


def failing(function, at):
    calls = []

    def forward(arguments):
        calls.append(1)
        if len(calls) == at:
            raise Planted("planted failure")
        return function(arguments)

    return forward


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_rank_raises_and_names_the_cause(name, bad, forward_only):
    plan = build(name, 3, 4, forward_only=forward_only)
    stages = [nn.Linear(4, 4) for _ in plan.placement.owners]
    functions = stage_functions(stages, None if forward_only else mse)
    stage = plan.placement.local_stages(bad)[-1]
    functions[stage] = failing(functions[stage], at=2)
    y = None if forward_only else torch.randn(8, 4)
    began = time.monotonic()
    results = run_step(plan, functions, stage_inputs(len(stages), torch.randn(8, 4), y))
    assert time.monotonic() - began < 5
    for rank, result in enumerate(results):
        assert isinstance(result, Planted if rank == bad else PipelineError), (rank, result)
        if rank != bad:
            assert (
                f"(global rank {bad}) failed at {stage}F1 (forward of micro-batch 1 on stage {stage}): Planted("
                in str(result)
            )
            assert "test_failure.py" in str(result), "the traceback of the other rank"
        else:
            assert f">>{stage}F1<<" in "".join(result.__notes__)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failing_backward(bad):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Planted("in backward")

    stages = [nn.Linear(4, 4) for _ in range(3)]
    functions = stage_functions(stages)
    good = functions[bad]
    functions[bad] = lambda arguments: Bad.apply(good(arguments))
    results = run_step(build("1f1b", 3, 4), functions, stage_inputs(3, torch.randn(8, 4), torch.randn(8, 4)))
    assert [type(result) for result in results] == [Planted if rank == bad else PipelineError for rank in range(3)]
    assert all(f"failed at {bad}B0" in str(result) for rank, result in enumerate(results) if rank != bad)


def test_the_same_objects_run_the_next_step():
    stages = [nn.Linear(4, 4) for _ in range(3)]
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    plan = build("1f1b", 3, 4)
    outcomes = []

    def rank_steps(rank, transport):
        executor, functions = Executor(plan, transport), stage_functions(stages)
        mine = [functions[rank], failing(functions[rank], at=3) if rank == 1 else functions[rank], functions[rank]]
        for number, function in enumerate(mine):
            try:
                executor.run([ChunkWork(function, inputs=stage_inputs(3, x, y)[rank])])
                outcomes.append((number, "ok"))
            except (Planted, PipelineError):
                outcomes.append((number, "raised"))

    assert on_every_rank(3, rank_steps) == [None] * 3
    assert sorted(outcomes) == [(0, "ok")] * 3 + [(1, "raised")] * 3 + [(2, "ok")] * 3


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([None, None, torch.randn(4, 4)], "the first stage got no input"),
        ([torch.randn(0, 4), None, torch.randn(4, 4)], "inputs have 0 rows"),
        ([torch.randn(4, 4), None, torch.randn(5, 4)], "4 rows on the first stage, but the inputs of stage 2"),
        ([[torch.randn(4, 4), torch.randn(3)], None, torch.randn(4, 4)], "must have the same number of rows"),
    ],
)
def test_wrong_inputs_are_one_clear_error_on_every_rank(inputs, reason):
    stages = [nn.Linear(4, 4) for _ in range(3)]
    results = run_step(build("1f1b", 3, 2), stage_functions(stages), inputs)
    assert all(isinstance(result, PipelineError) and reason in str(result) for result in results), results


@pytest.mark.parametrize(
    "plans",
    [
        [("1f1b", 4, False), ("1f1b", 8, False), ("1f1b", 4, False)],
        [("1f1b", 4, False), ("1f1b", 4, False), ("gpipe", 4, False)],
        [("1f1b", 4, True), ("1f1b", 4, True), ("1f1b", 4, False)],
        [("gpipe", 4, True), ("gpipe", 4, False), ("gpipe", 4, False)],
        [("gpipe", 2, True), ("gpipe", 6, True), ("gpipe", 2, True)],
    ],
)
def test_ranks_that_disagree_about_the_plan_all_raise(plans):
    stages = [nn.Linear(4, 4) for _ in range(3)]
    x, y = torch.randn(8, 4), torch.randn(8, 4)

    def rank_step(rank, transport):
        name, m, forward_only = plans[rank]
        plan = build(name, 3, m, forward_only=forward_only)
        executor = Executor(plan, transport)
        function = stage_functions(stages)[rank]
        return executor.run([ChunkWork(function, inputs=stage_inputs(3, x, y)[rank])])

    results = on_every_rank(3, rank_step, timeout=5)
    assert all(isinstance(result, PipelineError) for result in results), results
    assert all("ranks disagree about the step" in str(result) for result in results), results


def test_a_failing_forward_says_what_it_got():
    def second(arguments):
        return arguments[0] @ arguments

    functions = [lambda x: (x, {"mask": x > 0}), second]
    plan = build("1f1b", 2, 4)
    first, last = run_step(plan, functions, [torch.ones(12, 4), [torch.ones(12), "note"]])
    words = "fwd_fn of stage 1 got a list of 4: float32 (3, 4) from stage 0, {mask: bool (3, 4)} from stage 0, "
    assert words + "float32 (3,) from inputs, 'note' from inputs" in last.__notes__
    assert words in str(first), "the other rank reads it, too"


def test_a_stage_on_the_meta_device_is_said_to_be_there():
    stage = nn.Linear(4, 1, device="meta")
    [result] = run_step(build("1f1b", 1, 2), [lambda x: stage(x).mean()], [torch.ones(4, 4)])
    assert "fwd_fn of stage 0 got float32 (2, 4) from inputs" in result.__notes__
    assert any("on the meta device, where tensors have no values: give it values" in note for note in result.__notes__)


@pytest.mark.parametrize("plan", [build("1f1b", 2, 2), build("zb-v", 1, 2)])
def test_a_packed_sequence_is_refused_on_one_rank_as_on_two(plan):
    def pack(x):
        return "batch", nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 3), batch_first=True)

    first, *others = run_step(plan, [pack, len], [torch.ones(4, 3, 2), None])
    reason = "stage 0 returned a PackedSequence, which other ranks cannot rebuild; return tuple(x) and make the Packed"
    assert isinstance(first, TransportError)
    assert all(reason in str(result) for result in (first, *others))


def test_a_report_fits_into_the_smallest_frame():
    try:
        raise ValueError("x" * 10_000)
    except ValueError as error:
        report = FailureReport.of(error, rank=1, global_rank=5, action="2F0")
    data = report.to_bytes()
    assert len(data) <= 3584
    assert FailureReport.from_bytes(data).action == "2F0"


def test_a_report_of_a_long_error_in_a_script_that_json_escapes_fits_too():
    report = FailureReport(1, 5, "2F0", "ü" * 1000, "")
    assert len(report.to_bytes()) <= 3584
    assert set(FailureReport.from_bytes(report.to_bytes()).error) == {"ü"}


def test_an_exception_that_cannot_be_written_is_reported_by_its_class():
    class Unspeakable(Exception):
        def __repr__(self):
            raise RuntimeError("no words")

    report = FailureReport.of(Unspeakable(), rank=0, global_rank=0, action="the begin of the step")
    assert report.error == "Unspeakable"
    assert str(report.as_error()).startswith(
        "rank 0 of the pipeline (global rank 0) failed at the begin of the step: Unspeakable"
    )


def test_a_rank_outside_of_the_pipeline_is_named_by_its_place_in_the_world():
    error = FailureReport(-1, 7, "", "it was killed", "").as_error()
    assert str(error) == "global rank 7 failed: it was killed"
    assert (error.global_rank, error.action, error.stage) == (7, None, None)


def test_a_rank_that_never_comes_is_given_up_after_the_time_out():
    function, inputs = (lambda x: mse(x[0], x[1])), torch.randn(4, 4)

    def rank_step(rank, transport):
        if rank == 0:
            return None
        return Executor(build("1f1b", 2, 2), transport).run([ChunkWork(function, inputs=inputs)])

    _, error = on_every_rank(2, rank_step, timeout=0.2)
    assert isinstance(error, PipelineError)
    assert "rank 0 of the pipeline" in str(error)
    assert "nothing came from rank 0 within 0.2 s" in str(error)


def test_the_first_report_of_an_epoch_stays_on_the_board():
    board = StoreBoard(dist.HashStore(), "here")
    first, second = (FailureReport(rank, rank, "", "boom", "") for rank in (1, 2))
    assert board.find(0) is None
    board.publish(0, first)
    board.publish(0, second)
    board.publish(1, second)
    assert (board.find(0), board.find(1)) == (first, second)


def test_ranks_say_what_they_do_until_they_go_on():
    board = StoreBoard(dist.HashStore(), "here")
    board.say(0, 1, "waits")
    board.say(0, 2, "computes")
    board.say(0, 2, "")
    assert board.said(0, [0, 1, 2]) == {1: "waits"}


@pytest.mark.parametrize(
    ("error", "torn"),
    [
        (dist.DistNetworkError("the store is gone"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("shapes do not fit"), False),
        (ConnectionResetError("Connection reset"), False),
    ],
)
def test_a_torn_collective_is_told_from_other_errors(error, torn):
    assert is_torn(error) is torn


def test_training_without_gradients_enabled_is_refused():
    stages = [nn.Linear(4, 4) for _ in range(2)]

    def rank_step(rank, transport):
        with torch.no_grad():
            return Executor(build("1f1b", 2, 2), transport).run(
                [
                    ChunkWork(
                        stage_functions(stages)[rank],
                        inputs=stage_inputs(2, torch.randn(4, 4), torch.randn(4, 4))[rank],
                    )
                ]
            )

    assert all("under torch.no_grad()" in str(result) for result in on_every_rank(2, rank_step))
