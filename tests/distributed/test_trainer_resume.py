"""Runs that were stopped: they go on to the bit in their layout, and on their curve in any other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed_harness import run_distributed
from tests.trainer_runs import Rows, losses_of, make_trainer, tiny_llama, trained, weights_of
from torchdistpackage.errors import CheckpointError
from torchdistpackage.trainer import TrainerCallback

pytest.importorskip("transformers")

LONG = {"num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
DROPPING = partial(tiny_llama, dropout=0.2)


class StopAt(TrainerCallback):
    """Stops on one rank only, at a step; as one that looks at a clock."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step and torch.distributed.get_rank() == self.rank


def same_weights(mine, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def resumed(rank, world, output, options, stops):
    """For each stop: whether the rest of the losses, the rates and the weights are those of an undisturbed run."""
    options = {**LONG, "model_init": DROPPING, **options}
    whole = trained(f"{output}/whole", **options)
    verdicts = []
    for stop in stops:
        at = f"{output}/{stop}"
        callbacks = [StopAt(stop, world - 1)] if rank == world - 1 else None
        stopped = trained(at, **{**options, "save_steps": 100}, callbacks=callbacks)
        stopped.save_checkpoint(f"{at}/mine")
        again = trained(f"{output}/again", **options, resume=f"{at}/mine")
        rows = [[(row["loss"], row["learning_rate"], row["epoch"]) for row in t.state.log_history if "loss" in row]
                for t in (whole, again)]  # fmt: skip
        equal = same_weights(weights_of(again), weights_of(whole))
        verdicts.append((stopped.state.global_step, rows[0] == rows[1], equal))
    return verdicts, losses_of(whole)


@pytest.mark.parametrize(
    ("world", "options", "stops"),
    [
        (2, {"async_save": False}, [3]),
        pytest.param(2, {}, [1, 6, 8], marks=pytest.mark.slow),  # 6: the end of an epoch; 8: the last step but one
        pytest.param(1, {"fp16": True}, [3], marks=pytest.mark.slow),
        pytest.param(2, {"schedule": "zb-v", "logging_steps": 3}, [4], marks=pytest.mark.slow),
        pytest.param(2, {"data_parallel_size": 2, "data_parallel": "zero2"}, [4], marks=pytest.mark.slow),
        pytest.param(4, {"data_parallel_size": 2}, [3], marks=pytest.mark.slow),
        pytest.param(4, {"data_parallel_size": 2, "data_parallel": "fsdp2"}, [3], marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(180)
def test_a_stopped_run_goes_on_to_the_bit(world, options, stops, tmp_path):
    for verdicts, _ in run_distributed(resumed, world, str(tmp_path), options, stops, timeout=170):
        assert verdicts == [(stop, True, True) for stop in stops]


def begun(rank, world, output, options):
    return losses_of(trained(output, **{**LONG, "save_total_limit": 2, **options}, max_steps=9))


def continued(rank, world, output, options):
    """From the newest of the run, and from one of its steps, to elsewhere."""
    first = trained(f"{output}-2", **{**LONG, **options}, max_steps=9, resume=f"{output}/step-00000008")
    return losses_of(first)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_another_layout_goes_on_along_the_curve(tmp_path):
    output = str(tmp_path / "run")
    halved = {"data_parallel_size": 2, "per_device_train_batch_size": 4}
    wanted = run_distributed(begun, 2, output, {}, timeout=60)[0]
    assert sorted(path.name for path in Path(output).glob("step-*")) == ["step-00000008", "step-00000009"]
    for world, options in ((1, {}), (2, {**halved, "data_parallel": "zero1"})):
        for found in run_distributed(continued, world, output, options, timeout=60):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"), [(2, {"schedule": "zb-v"}), (4, {"data_parallel_size": 2, "data_parallel": "fsdp2"})]
)
def test_more_layouts_go_on_along_the_curve(world, options, tmp_path):
    output = str(tmp_path / "run")
    wanted = run_distributed(begun, 1, output, {}, timeout=60)[0]
    rows = {"per_device_train_batch_size": 8 // options.get("data_parallel_size", 1)}
    for found in run_distributed(continued, world, output, {**options, **rows}, timeout=90):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Embedding(40, 8), nn.Linear(8, 40)

    def forward(self, input_ids):
        return self.outer(self.inner(input_ids))


def refusals(rank, world, output):
    short = {**LONG, "max_steps": 2, "num_train_epochs": 1}
    nothing = trained(output, **short, resume=True)  # there is nothing: it begins
    messages = []
    trainer = make_trainer(output, **short, model_init=Other)
    for resume in (f"{output}/not-there", f"{output}/step-00000002"):
        with pytest.raises(CheckpointError) as caught:
            trainer.train(resume)
        messages.append(str(caught.value))
    trained(output, **short)
    aside = sorted(path.name for path in Path(output).iterdir())
    return nothing.state.global_step, messages, aside


@pytest.mark.slow
@pytest.mark.timeout(70)
def test_wrong_checkpoints_are_named_and_earlier_runs_kept(tmp_path):
    for steps, (missing, other), aside in run_distributed(refusals, 2, str(tmp_path), timeout=60):
        assert steps == 2
        assert "not-there has no complete checkpoint" in missing
        assert "inner.weight" in other
        assert {"earlier-run-1", "step-00000002"} <= set(aside)


def best_of(rank, world, output):
    from transformers import EarlyStoppingCallback

    options = {**LONG, "num_train_epochs": 20, "learning_rate": 0.3, "eval_dataset": Rows(8), "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "load_best_model_at_end": True, "callbacks": [EarlyStoppingCallback(2)]}
    trainer = trained(output, **options, compute_metrics=lambda found: {"rows": len(found.label_ids)})
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    steps, best = trainer.state.global_step, trainer.state.best_metric
    return steps, evaluated, best, trainer.evaluate()["eval_loss"]


@pytest.mark.timeout(70)
def test_early_stopping_ends_with_the_best_weights(tmp_path):
    for steps, evaluated, best, last in run_distributed(best_of, 2, str(tmp_path), timeout=60):
        assert best == min(evaluated)
        assert last == pytest.approx(best, abs=1e-6)
        assert steps == 2 * len(evaluated) < 120
        assert evaluated.index(best) == len(evaluated) - 3  # two evaluations without a better one
