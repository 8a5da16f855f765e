"""Plans from files, measured steps, and plans that are made from measured costs, over gloo with real processes."""

import copy
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, loss_step, make_layers, mse, own_inputs, start
from torch import nn

from torchdistpackage import PipelineError, ScheduleError, forward_backward, partition_uniform, tpc
from torchdistpackage.parallel import draw_last_step, last_plan, last_timeline, profile_stage_costs
from torchdistpackage.schedule import Op, Plan, build, without_communication


def halves(pipe):
    """The whole model, this rank's stage, a batch of nine rows, and the whole batch's loss, with its gradients."""
    start(pipe)
    reference = make_layers()
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=pipe, stage=tpc.get_pp_rank()))
    x, y = torch.randn(9, 6).double(), torch.randn(9, 6).double()
    whole = mse(reference(x), y)
    whole.backward()
    return stage, part, x, y, whole


def step(stage, x, y, m=4, **options):
    stage.zero_grad()
    return forward_backward(None, loss_step(stage), None, own_inputs(x, y), m, broadcast_loss=True, **options)


def plans_of_the_users(rank, world, folder):
    stage, part, x, y, whole = halves(2)
    compute = without_communication(build("zb-h2", 2, 4))
    # A file as torch.distributed.pipelining writes it: idle cells, an overlapped pair, what it notes of sharding.
    torchs = "0UNSHARD,0F0,0F1,,0B0,0F2,0B1,0F3,0B2,,0B3,0RESHARD\n,1F0,1B0,(1F1;1B1)OVERLAP_F_B,1F2,1B2,1F3,1B3,,,,\n"
    files = {"mine.csv": compute.to_csv(), "lowered.csv": build("zb-h1", 2, 4).to_csv(), "torch.csv": torchs}
    if rank == 0:
        for name, text in files.items():
            (folder / name).write_text(text)
    dist.barrier()
    for schedule in (compute, folder / "mine.csv", str(folder / "lowered.csv"), str(folder / "torch.csv")):
        for _ in range(2):
            assert torch.allclose(step(stage, x, y, schedule=schedule), whole)
            assert close(stage.parameters(), part.parameters())
        outputs = forward_backward(
            None, stage, None, x if rank == 0 else None, 4, forward_only=True, schedule=schedule, broadcast_loss=True
        )
        assert outputs.shape == (9, 6)
    with pytest.raises(ScheduleError, match="made for 2 ranks and 4 micro-batches; .* num_microbatches is 3"):
        step(stage, x, y, m=3, schedule=compute)


def test_plans_of_the_users(tmp_path):
    run_distributed(plans_of_the_users, 2, tmp_path)


def measured_steps(rank, world, folder):
    stage, part, x, y, whole = halves(2)
    step(stage, x, y)
    with pytest.raises(PipelineError, match="no step was recorded"):
        draw_last_step(folder / "step.png")
    assert torch.allclose(step(stage, x, y, schedule="zb-h1", record_timeline=True), whole)
    assert close(stage.parameters(), part.parameters())
    timeline = last_timeline()
    ran = [[span.action for span in row if span.action.op.is_compute] for row in timeline.spans]
    assert ran == [list(row) for row in without_communication(build("zb-h1", 2, 4)).actions]
    begins = {span.action: span.start for row in timeline.spans for span in row}
    ends = {span.action: span.end for row in timeline.spans for span in row}
    assert min(begins.values()) == 0.0
    for row in timeline.spans:
        assert all(a.end <= b.start for a, b in itertools.pairwise(row)), "a rank does one thing at a time"
    for action, end in ends.items():  # clocks are aligned: no message arrives before it was sent
        if action.op is Op.RECV_F:
            assert end > begins[action._replace(stage=action.stage - 1, op=Op.SEND_F)] - 1e-3
    step(stage, x, y, record_timeline=True)
    assert last_plan().name == "1f1b"
    if rank == 1:
        return
    for name in ("step.json", "step.png", "step.svg"):
        draw_last_step(folder / name)
    assert json.loads((folder / "step.json").read_text())["traceEvents"]
    assert (folder / "step.png").stat().st_size > 10_000
    assert "<svg" in (folder / "step.svg").read_text()


def test_measured_steps_are_gathered_on_one_clock_and_drawn(tmp_path):
    run_distributed(measured_steps, 2, tmp_path)


def profiles(rank, world):
    start(2)
    stage = nn.Sequential(nn.Linear(64, 64 * (8 if rank else 1)), nn.Dropout(), nn.BatchNorm1d(64 * (8 if rank else 1)))
    stage.append(nn.Linear(stage[0].out_features, 64))
    x, y = torch.randn(256, 64), torch.randn(256, 64)
    stage(x).sum().backward()
    before = copy.deepcopy(stage.state_dict())
    gradients = [p.grad.clone() for p in stage.parameters()]
    random = torch.get_rng_state()
    costs = profile_stage_costs(loss_step(stage), own_inputs(x, y), 4, repeats=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, stage.state_dict()[key]) for key, value in before.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(stage.parameters(), gradients, strict=True))
    assert costs.num_stages == 2
    assert costs.forward[1] > costs.forward[0]
    assert costs.backward[1] > costs.backward[0]
    assert costs.message_bytes == (64 * 64 * 4.0,)
    assert costs.activation_bytes[1] > 4 * costs.activation_bytes[0]
    return (costs.forward, costs.input_grad, costs.weight_grad, costs.hop)


def test_a_profile_leaves_no_trace():
    first, second = run_distributed(profiles, 2)
    assert first == second, "every rank has the same costs"


def automatic(rank, world):
    stage, part, x, y, whole = halves(2)
    plans = []
    for _ in range(9):
        assert torch.allclose(step(stage, x, y, schedule="auto"), whole)
        assert close(stage.parameters(), part.parameters())
        plans.append(last_plan())
    assert [plan.name for plan in plans[:6]] == ["1f1b"] * 6
    assert plans[6].name.startswith("auto: ")
    assert plans[6] is plans[7] is plans[8], "planned once"
    step(stage, x[:5], y[:5], schedule="auto")
    assert last_plan().name == "1f1b", "another shape is measured anew"
    step(stage, x, y, schedule="auto")
    assert last_plan() is plans[6], "and the first one is kept"
    outputs = forward_backward(None, stage, None, x if rank == 0 else None, 4, forward_only=True, schedule="auto")
    assert outputs is None or outputs.shape == (9, 6)
    for _ in range(5):
        step(stage, x, y, schedule="auto", memory_limit=1)
    with pytest.raises(ScheduleError, match="no schedule could be planned: .*1"):
        step(stage, x, y, schedule="auto", memory_limit=1)
    return Plan.to_csv(plans[6])


def test_a_plan_from_measured_costs():
    first, second = run_distributed(automatic, 2)
    assert first == second
