"""Evaluations: every row once, in its order, in any layout; alone, before and after training, of few rows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.distributed_harness import run_distributed
from tests.trainer_runs import Rows, losses_of, make_trainer, tiny_llama, trained
from torchdistpackage.errors import TrainerError
from torchdistpackage.topology import tpc


class Numbered(Rows):
    """The last token of a row is its number; rows of a batch are cut to its longest."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {"input_ids": row["input_ids"], "labels": row["labels"].index_fill(0, torch.tensor([9]), index)}


def cut(rows):
    longest = 7 + int(rows[0]["labels"][-1]) % 3
    return {name: torch.stack([row[name][-longest:] for row in rows]) for name in rows[0]}


def order_of(found):
    """The numbers of the rows in the order in which they came."""
    numbers = [row[row >= 0][-1] for row in found.label_ids]
    assert len(found.predictions) == len(found.label_ids)
    return {"in_order": float(numbers == list(range(len(numbers)))), "rows": len(numbers)}


class Stream(IterableDataset):
    def __iter__(self):
        return (Rows()[index] for index in range(13))


def evaluated(rank, world, output, layouts):
    """Metrics of several evaluations in each layout."""
    found = []
    for layout in layouts:
        if tpc._is_inited("global") and tpc.get_dp_size() != layout.get("data_parallel_size", 1):
            tpc.reset()
        options = {"compute_metrics": order_of, "data_collator": cut, "per_device_eval_batch_size": 3}
        trainer = make_trainer(output, **layout, **options, train_dataset=None, eval_dataset=Numbered(11))
        alone = trainer.evaluate()
        one = trainer.evaluate(Numbered(1), "one")
        two = trainer.evaluate({"a": Numbered(2), "b": Numbered(5)})
        found.append((alone, one, two))
        with pytest.raises(TrainerError, match="no train_dataset"):
            trainer.train()
    return found


@pytest.mark.timeout(80)
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rows_count_once_and_keep_their_order(world, tmp_path):
    pytest.importorskip("transformers")
    layouts = [{}, {"schedule": "zb-v"}, *([{"data_parallel_size": 2}] if world == 2 else [])]
    every_rank = run_distributed(evaluated, world, str(tmp_path), layouts, timeout=70)
    assert all(found == every_rank[0] for found in every_rank)
    for alone, one, two in every_rank[0]:
        assert (alone["eval_in_order"], alone["eval_rows"], alone["eval_samples"]) == (1.0, 11.0, 11)
        assert (one["one_rows"], two["eval_a_rows"], two["eval_b_rows"]) == (1.0, 2.0, 5.0)


def around_training(rank, world, output):
    """Evaluations before, in and after training leave no mark; a stream trains for as long as it is told."""
    options = {"max_steps": 6, "model_init": tiny_llama}
    wanted = losses_of(trained(output, **options))
    options |= {"eval_dataset": Rows(5), "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trainer = make_trainer(output, **options)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    again = trainer.train().global_step
    stream = trained(output, train_dataset=Stream(), max_steps=5)
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5, factor=0.5)
    falling = trained(output, **options, lr_scheduler_factory=plateau)  # never better by so much
    return {
        "same": losses_of(trainer) == wanted,
        "first": history[:2] == [first, first],
        "learnt": history[-1] < first,
        "again": again,
        "stream": (stream.state.global_step, np.isfinite(losses_of(stream)).all(), stream.state.epoch),
        "rates": [row["learning_rate"] for row in falling.state.log_history if "loss" in row],
        "tokens": trainer.state.num_input_tokens_seen,
    }


@pytest.mark.timeout(80)
def test_evaluation_leaves_training_as_it_is(tmp_path):
    pytest.importorskip("transformers")
    for found in run_distributed(around_training, 2, str(tmp_path), timeout=70):
        assert (found["same"], found["first"], found["learnt"]) == (True, True, True)
        assert found["again"] == 6
        assert found["stream"][:2] == (5, True)
        assert found["tokens"] == 44 * 10
        assert found["rates"] == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]


def sizes(rank, world, output):
    """Few rows, beside replicas and micro-batches; and fractions of epochs."""
    few = {"data_parallel_size": 2, "per_device_train_batch_size": 4}
    runs = [
        {**few, "train_dataset": Rows(1), "num_train_epochs": 2},
        {**few, "train_dataset": Rows(3), "num_train_epochs": 2},
        {**few, "train_dataset": Rows(11), "num_train_epochs": 1.5},
        {**few, "train_dataset": Rows(11), "data_parallel": "zero1", "gradient_accumulation_steps": 2},
        {**few, "train_dataset": DataLoader(Rows(9 + 8 * rank), 4), "num_train_epochs": 2},
    ]
    found = [trained(output, **run) for run in runs]
    return [(each.state.global_step, bool(np.isfinite(losses_of(each)).all())) for each in found], [
        losses_of(each) for each in found[:4]
    ]


def one_process(rank, world, output):
    runs = [
        {"train_dataset": Rows(1), "num_train_epochs": 2},
        {"train_dataset": Rows(3), "num_train_epochs": 2},
        {"train_dataset": Rows(11), "num_train_epochs": 1.5},
        {"train_dataset": Rows(11), "gradient_accumulation_steps": 2},
    ]
    return [losses_of(trained(output, **run)) for run in runs]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_few_rows_train_as_in_one_process(tmp_path):
    pytest.importorskip("transformers")
    every_rank = run_distributed(sizes, 2, str(tmp_path), timeout=70)
    wanted = run_distributed(one_process, 1, str(tmp_path), timeout=50)[0]
    for ended, losses in every_rank:
        assert ended == [(2, True), (2, True), (3, True), (1, True), (6, True)]
        torch.testing.assert_close(losses, wanted, rtol=0, atol=2e-6)


class Unlabelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x))


def mistakes(rank, world, output):
    """What is said of batches without labels, with labels of another shape, and of losses that are no loss."""
    rows = [{"x": torch.randn(4)} for _ in range(8)]
    wrong = [{"x": torch.randn(4), "labels": torch.ones(7)} for _ in range(8)]
    right = [{"x": torch.randn(4), "labels": 1} for _ in range(8)]
    said = []
    for options in (
        {"train_dataset": rows},
        {"train_dataset": wrong},
        {"train_dataset": right, "compute_loss_func": lambda logits, labels: logits},
        {"train_dataset": right, "optimizer_factory": lambda named: None},
        {"train_dataset": right, "lr_scheduler_factory": torch.optim.lr_scheduler.ReduceLROnPlateau},
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            make_trainer(output, model_init=Unlabelled, max_steps=1, **options).train()
        said.append(str(caught.value))
    nan = {"train_dataset": right, "compute_loss_func": lambda logits, labels: logits.sum() * float("nan")}
    return said, losses_of(trained(output, model_init=Unlabelled, max_steps=2, **nan))


@pytest.mark.slow
@pytest.mark.timeout(80)
def test_mistakes_are_said_on_every_rank(tmp_path):
    texts = ["has no labels", "", "must return the mean loss", "optimizer_factory must return", "eval_strategy"]
    for said, losses in run_distributed(mistakes, 2, str(tmp_path), timeout=70):
        for text, wanted in zip(said, texts, strict=True):
            assert wanted in text, said
        assert np.isnan(losses).all()
