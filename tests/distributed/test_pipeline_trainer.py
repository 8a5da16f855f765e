"""`PipelineTrainer` in every layout: the numbers of the plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.distributed_harness import run_distributed
from tests.trainer_runs import Rows, curves, losses_of, plain_losses, tiny_llama, token_loss, trained

pytest.importorskip("transformers")

LAYOUTS = {
    1: [{"schedule": "zb-v"}, {"stages_per_rank": 2}, {"n_microbatches": 1}, {"gradient_checkpointing": True}],
    2: [{}, {"schedule": "zb-v"}, {"stages_per_rank": 2}, {"schedule": "auto"}, {"model_splitter": None}],
    4: [
        {},
        {"data_parallel_size": 2},
        {"data_parallel_size": 2, "data_parallel": "zero1"},
        {"data_parallel_size": 2, "data_parallel": "zero2", "schedule": "zb-v"},
        {"data_parallel_size": 2, "data_parallel": "fsdp2"},
    ],
}
SHORT = {"max_steps": 7}  # an epoch has six: the last batch of the first one is short


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return run_distributed(curves, 1, str(tmp_path_factory.mktemp("one")), [SHORT], timeout=60)[0][0]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.timeout(150)
def test_every_layout_has_one_loss_curve(world, wanted, tmp_path):
    runs = [{**SHORT, **options} for options in LAYOUTS[world]]
    every_rank = run_distributed(curves, world, str(tmp_path), runs, timeout=140)
    assert all(found == every_rank[0] for found in every_rank)
    for run, found in zip(runs, every_rank[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6, msg=lambda text, run=run: f"{run}: {text}")


def ragged(rows):
    """Batches of different lengths."""
    longest = 4 + max(int(row["input_ids"][0]) for row in rows) % 6
    return {name: torch.stack([row[name][-longest:] for row in rows]) for name in rows[0]}


def hugging_face_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def plain_numbers(rank, world, output):
    """Losses and norms of the plain loop; and of trainers that must equal it."""
    norms = []
    losses = plain_losses(7, 8, norms=norms)
    loader = DataLoader(Rows(), 8)
    plain = trained(output, train_dataset=loader, n_microbatches=1, **SHORT)
    rows = [row for row in plain.state.log_history if "loss" in row]
    others = [
        {},
        {"gradient_accumulation_steps": 2, "train_dataset": DataLoader(Rows(), 4)},
        {"gradient_accumulation_steps": 2, "train_dataset": DataLoader(Rows(), 4), "schedule": "gpipe"},
        {"compute_loss_func": token_loss},
        {"compute_loss_func": hugging_face_loss},
    ]
    return {
        "losses": (losses, losses_of(plain)),
        "norms": (norms, [row["grad_norm"] for row in rows]),
        "others": [losses_of(trained(output, **{"train_dataset": loader, **SHORT, **each})) for each in others],
        "row": rows[-1],
    }


@pytest.mark.timeout(100)
def test_one_micro_batch_has_the_bits_of_the_plain_loop(tmp_path):
    found = run_distributed(plain_numbers, 1, str(tmp_path), timeout=90)[0]
    assert found["losses"][0] == found["losses"][1]
    torch.testing.assert_close(found["norms"][1], found["norms"][0])
    for other in found["others"]:
        torch.testing.assert_close(other, found["losses"][0], rtol=0, atol=1e-6)
    row = found["row"]
    assert 0 <= row["bubble_share"] < 1
    assert row["tokens_per_second"] > 10
    assert row["peak_memory_bytes"] > 1e7
    assert row["step"] == 7


def accumulated(rank, world, output):
    """Three batches of different lengths a step, and the loss over all their tokens."""
    options = {"data_collator": ragged, "train_dataset": DataLoader(Rows(24), 4, collate_fn=ragged)}
    found = trained(output, gradient_accumulation_steps=3, max_steps=2, **options)
    torch.manual_seed(42)
    model, losses = tiny_llama(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batches = list(DataLoader(Rows(24), 4, collate_fn=ragged))
    for step in range(2):
        mine = batches[step * 3 : step * 3 + 3]
        pairs = [(model(each["input_ids"]).logits, each["labels"]) for each in mine]
        logits = torch.cat([logits[:, :-1].flatten(0, 1) for logits, _ in pairs])
        loss = functional.cross_entropy(logits, torch.cat([labels[:, 1:].flatten() for _, labels in pairs]))
        optimizer.param_groups[0]["lr"] = 1e-2 * (2 - step) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses_of(found), losses, len({each["input_ids"].shape for each in batches})


@pytest.mark.slow
@pytest.mark.timeout(70)
def test_accumulated_batches_of_different_lengths_are_one_big_batch(tmp_path):
    for found, wanted, shapes in run_distributed(accumulated, 2, str(tmp_path), timeout=60):
        assert shapes > 1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def precisions(rank, world, output):
    return [losses_of(trained(output, **SHORT, **each)) for each in ({"bf16": True}, {"fp16": True}, {})]


@pytest.mark.slow
@pytest.mark.timeout(70)
def test_half_precision_is_near_the_curve(tmp_path):
    for bf16, fp16, full in run_distributed(precisions, 2, str(tmp_path), timeout=60):
        torch.testing.assert_close(bf16, full, rtol=0, atol=0.05)
        torch.testing.assert_close(fp16, full, rtol=0, atol=0.05)
        assert bf16 != full != fp16
