"""What fails on one rank of a trainer ends the run on every rank, within seconds, and is named there."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.distributed_harness import run_distributed
from tests.trainer_runs import Rows, make_trainer, token_loss
from torchdistpackage.split import create_manual_causal_lm_splitter
from torchdistpackage.topology import tpc
from torchdistpackage.trainer import TrainerCallback

pytest.importorskip("transformers")


def fails(rank, *args, **kwargs):
    if dist.get_rank() == rank:
        raise ArithmeticError("on purpose")


class FailingRows(Rows):
    """On one rank a row cannot be read."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def __getitem__(self, index):
        if self.index in (None, index):
            fails(1)
        return super().__getitem__(index)


class Failing(TrainerCallback):
    """Fails at one event, on the rank that does not report."""

    def __init__(self, event):
        setattr(self, event, partial(fails, 0))


def failing_splitter(*args, **kwargs):
    fails(1)
    return create_manual_causal_lm_splitter()(*args, **kwargs)


def failing_loss(logits, labels):
    fails(1)
    return token_loss(logits, labels)


def failing_optimizer(named):
    fails(1)
    return torch.optim.SGD([each for _, each in named], lr=0.1)


def failing_schedule(optimizer):
    fails(0)
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def failing_metrics(found):
    fails(0)  # in a pipeline of two nobody calls it there
    fails(1)
    return {}


EVALUATED = {"eval_dataset": Rows(6), "eval_strategy": "steps", "eval_steps": 2}
FAULTS = [
    {"train_dataset": FailingRows(None)},
    {"train_dataset": FailingRows(20)},
    {"model_splitter": failing_splitter},
    {"compute_loss_func": failing_loss},
    {"optimizer_factory": failing_optimizer},
    {"lr_scheduler_factory": failing_schedule},
    {"callbacks": [Failing("on_init_end")]},
    {"callbacks": [Failing("on_step_end")]},
    {"callbacks": [Failing("on_log")]},
    {"callbacks": [Failing("on_evaluate")], **EVALUATED},
    {"eval_dataset": FailingRows(5), "eval_strategy": "steps", "eval_steps": 2},
    {"compute_metrics": failing_metrics, **EVALUATED},
    {"callbacks": [Failing("on_save")], "save_strategy": "steps", "save_steps": 2},
]


def ended(rank, world, output, faults, layout):
    """For each fault: what this rank raised, and after how many seconds; one after the other in the same processes."""
    found = []
    for number, fault in enumerate(faults):
        tpc.reset()  # ranks that wait in a collective get out by closing its group
        began = time.perf_counter()
        try:
            make_trainer(f"{output}/{number}", **layout, **{"max_steps": 4, **fault}).train()
            error = None
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        found.append((error, time.perf_counter() - began))
    return found


def check(results, faults):
    for number, fault in enumerate(faults):
        errors = [result[number][0] for result in results]
        assert all(error is not None and "on purpose" in error for error in errors), (
            fault,
            number,
            [each[:300] for each in errors],
        )
        assert any(error.startswith("ArithmeticError") for error in errors), (
            fault,
            number,
            [each[:300] for each in errors],
        )
        assert any("rank" in error for error in errors), (fault, number, [each[:300] for each in errors])
        assert max(result[number][1] for result in results) < 20, (fault, results)


@pytest.mark.timeout(130)
@pytest.mark.parametrize("faults", [FAULTS[1:8:3], pytest.param(FAULTS, marks=pytest.mark.slow)])
def test_a_failure_on_one_rank_of_a_pipeline_is_named_on_all(faults, tmp_path):
    check(run_distributed(ended, 2, str(tmp_path), faults, {}, timeout=120), faults)


REPLICAS = [fault for fault in FAULTS if "compute_metrics" not in fault]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_a_failure_on_one_replica_is_named_on_all(kind, tmp_path):
    layout = {"data_parallel_size": 2, "data_parallel": kind, "per_device_train_batch_size": 4}
    check(run_distributed(ended, 2, str(tmp_path), REPLICAS, layout, timeout=120), REPLICAS)
