"""The schedules of torch.distributed.pipelining, as text: read, proved, run, and as fast as the catalogue's."""

import copy

import pytest
import torch
from loopback_pipeline import plain_loop, train
from torch import nn

from torchdistpackage.schedule import CostModel, Plan, build, complete, simulate

visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")


# Not 1F1B: for a rank by itself, which is how the visualizer asks for it, torch numbers its forwards from the stage on.
@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("GPipe", 1),
        ("Interleaved1F1B", 2),
        ("LoopedBFS", 2),
        ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
def test_torchs_text_is_read_proved_and_run(name, chunks, p, m):
    rows = visualizer.get_schedule_ops(name, p, m, chunks)
    text = "\n".join(",".join("" if action is None else str(action) for action in row) for row in rows)
    plan, ours = complete(Plan.from_csv(text, name=name)), build(name, p, m)
    assert plan.placement == ours.placement
    costs = CostModel.uniform(plan.placement.num_stages, chunks=chunks)
    assert simulate(ours, costs).makespan <= simulate(plan, costs).makespan
    torch.manual_seed(0)
    stages = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in plan.placement.owners])
    reference = copy.deepcopy(stages)
    x, y = torch.randn(2 * m + 1, 4), torch.randn(2 * m + 1, 4)
    assert torch.allclose(train(plan, stages, x, y, m), plain_loop(reference, x, y, m))
    for mine, theirs in zip(stages.parameters(), reference.parameters(), strict=True):
        # torch's LoopedBFS goes backward through the micro-batches in reverse: another order of summation.
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-7)
