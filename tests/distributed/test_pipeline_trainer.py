"""`PipelineTrainer` in every layout: the losses of the plain loop, and a stopped run that goes on to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.distributed_harness import run_distributed
from tests.trainer_runs import losses_of, make_trainer
from torchdistpackage.topology import tpc

LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"schedule": "zb-v"}),
    (2, {"stages_per_rank": 2}),
    (2, {"data_parallel_size": 2}),
    (2, {"data_parallel_size": 2, "data_parallel": "zero1"}),
    (2, {"data_parallel_size": 2, "data_parallel": "zero2"}),
    (4, {"data_parallel_size": 2, "data_parallel": "fsdp2"}),
]


def curves(rank: int, world: int, output: str, runs: list[dict]) -> list[list[float]]:
    found = []
    for options in runs:
        tpc.reset()
        replicas = options.get("data_parallel_size", 1)
        trainer = make_trainer(output, per_device_train_batch_size=8 // replicas, **options)
        trainer.train()
        found.append(losses_of(trainer))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_has_one_loss_curve(world, tmp_path):
    runs = [options for size, options in LAYOUTS if size == world]
    [wanted] = run_distributed(curves, 1, str(tmp_path), [{"max_steps": 8}], timeout=60)[0]
    every_rank = run_distributed(curves, world, str(tmp_path), [{**run, "max_steps": 8} for run in runs], timeout=120)
    assert all(found == every_rank[0] for found in every_rank)
    for run, found in zip(runs, every_rank[0], strict=True):
        if "data_parallel_size" in run:  # replicas are summed in another order
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        else:
            assert found == wanted
