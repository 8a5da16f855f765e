"""Two replicas in one process each: every kind of data parallelism trains what one process trains."""

import logging
import os

import pytest
import torch
from distributed_harness import run_distributed
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from torchdistpackage import PipelineTrainer, PipelineTrainingArguments
from torchdistpackage.trainer import ProgressCallback

ROWS = [{"x": torch.linspace(-1, 1, 6).roll(number), "labels": number % 3} for number in range(18)]


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3))


def trained(folder, dataset=ROWS, **options):
    """The loss of every step, and the weights' sum at the end."""
    given = {"max_steps": 4, "gradient_accumulation_steps": 2, "n_microbatches": 2, "logging_steps": 1}
    given |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True}
    args = PipelineTrainingArguments(output_dir=folder, **{**given, **options})
    trainer = PipelineTrainer(args=args, model_init=net, train_dataset=dataset)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def every_kind(rank, world, folder):
    kinds = ("ddp", "fsdp2", "zero1", "zero2") if world > 1 else ("ddp",)
    return {
        kind: trained(folder, data_parallel=kind, data_parallel_size=world, per_device_train_batch_size=8 // world)
        for kind in kinds
    }


def test_replicas_train_what_one_process_trains(tmp_path):
    (alone,) = run_distributed(every_kind, 1, str(tmp_path))
    for found in run_distributed(every_kind, 2, str(tmp_path), timeout=120):
        for losses in found.values():
            assert losses == pytest.approx(alone["ddp"], rel=1e-4)


def own_loaders(rank, world, folder):
    """Replicas with 5 and 4 batches an epoch: the shorter one ends it."""
    rows = ROWS[: 10 - 2 * rank]
    loader = DataLoader(rows, batch_size=2)
    sampled = DataLoader(ROWS, batch_size=2, sampler=DistributedSampler(ROWS, world, rank, shuffle=False))
    args = {"data_parallel_size": world, "gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 2}
    return len(trained(folder, loader, **args)), len(trained(folder, sampled, **args))


def test_loaders_of_ones_own_end_together(tmp_path):
    assert run_distributed(own_loaders, 2, str(tmp_path)) == [(8, 10), (8, 10)]


def one_run_after_another(rank, world, folder):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log = logging.getLogger("torchdistpackage.trainer")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    options = {"save_strategy": "steps", "save_steps": 2, "async_save": False}
    debug = dict.fromkeys(("debug_pipeline", "debug_split_model", "debug_model_params", "debug_model_init"), True)
    left = []
    for more in ({}, debug, {"overwrite_output_dir": True}):
        trained(folder, **options, **more)
        left.append(sorted(os.listdir(folder)))
    return left, "\n".join(told)


def test_an_earlier_run_is_set_aside_or_deleted(tmp_path):
    left, told = run_distributed(one_run_after_another, 1, str(tmp_path))[0]
    steps = ["step-00000002", "step-00000004"]
    assert left == [steps, ["earlier-run-1", *steps], ["earlier-run-1", *steps]]
    assert "had 2 checkpoints of an earlier run; they are in earlier-run-1 now" in told
    assert "stage 0 on rank 0 has the parameters\n0.weight (8, 6) torch.float32" in told
    assert "schedule 1f1b, 2 micro-batches, stages of the ranks: [[0]]" in told
    assert "rank 0 has 6 of the model's parameters, 155 in all" in told
