"""Two stages of one rank: what goes from one to the other is handed over, not sent."""

import copy

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, plain_loop, run_step, stage_functions, stage_inputs, train
from torch import nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.schedule import build, complete
from torchdistpackage.schedule.plan import Plan

ONE_RANK = complete(Plan.from_text("0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1"))


def test_it_is_the_same_memory_and_no_message():
    seen = []

    def first(x):
        seen.append((x * w).data_ptr())
        output = x * w
        seen[-1] = output.data_ptr()
        return output

    w = torch.ones(3, requires_grad=True)
    transport = loopback(1)[0]
    work = [ChunkWork(first, inputs=torch.randn(2, 3)), ChunkWork(lambda h: (seen.append(h.data_ptr()), h.mean())[1])]
    Executor(ONE_RANK, transport).run(work)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert not transport._outlets


def test_a_stage_may_begin_with_an_operation_in_place():
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    reference = copy.deepcopy(stages)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    train(ONE_RANK, stages, x, y, 2)
    plain_loop(reference, x, y, 2)
    assert_same_gradients(stages, reference)


def test_what_the_plain_loop_refuses_is_refused():
    """Tanh's backward needs its output, which the next stage overwrites: wrong gradients if nobody noticed."""
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))]
    [result] = run_step(ONE_RANK, stage_functions(stages), stage_inputs(2, torch.randn(4, 4), torch.randn(4, 4)))
    assert isinstance(result, RuntimeError)
    assert "modified by an inplace operation" in str(result)


@pytest.mark.parametrize("name", ["zb-v", "hanayo"])
def test_structures_are_handed_over(name):
    plan = build(name, 2, 3)
    torch.manual_seed(0)
    stages = nn.ModuleList([nn.Linear(4, 4) for _ in plan.placement.owners])
    reference = copy.deepcopy(stages)

    def functions(stages):
        found = [lambda d, stage=stage: {"h": stage(d["h"]), "n": d["n"] + 1, "note": None} for stage in stages]
        found[0] = lambda x: {"h": stages[0](x), "n": 1, "note": "text"}
        found[-1] = lambda ins: mse(stages[-1](ins[0]["h"]), ins[1]) * ins[0]["n"]
        return found

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    results = run_step(plan, functions(stages), stage_inputs(len(stages), x, y))
    assert not any(isinstance(result, Exception) for result in results), results
    for a, b in zip(x.split(2), y.split(2), strict=True):
        chain = functions(reference)
        value = chain[0](a)
        for function in chain[1:-1]:
            value = function(value)
        (chain[-1]([value, b]) / 3).backward()
    assert_same_gradients(stages, reference)


def test_what_is_changed_before_it_is_taken_is_refused():
    count, w = torch.tensor(0), torch.ones(3, requires_grad=True)
    functions = [lambda x: (x * w, count.add_(1)), lambda given: given[0].sum() * given[1]]
    work = [ChunkWork(functions[0], inputs=torch.randn(3, 3)), ChunkWork(functions[1])]
    with pytest.raises(PipelineError, match="stage 0 returned a tensor and changed it in place"):
        Executor(build("looped-bfs", 1, 3, chunks=2), loopback(1)[0]).run(work)


def test_a_result_waits_for_a_send_that_comes_later():
    plan = complete(
        Plan.from_text(
            "0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n1RECV_F0 1F0 1B0 1RECV_F1 1F1 1B1 1SEND_B0 1SEND_B1"
        )
    )
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reference = copy.deepcopy(stages)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    train(plan, stages, x, y, 2)
    plain_loop(reference, x, y, 2)
    assert_same_gradients(stages, reference)
