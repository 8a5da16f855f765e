"""Small runs of `PipelineTrainer`, and the plain loop that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchdistpackage.topology import tpc
from torchdistpackage.trainer import PipelineTrainer, PipelineTrainingArguments

VOCABULARY = 40
ROWS = 44
OBJECTS = (
    "model model_init train_dataset eval_dataset model_splitter compute_loss_func compute_metrics data_collator "
    "optimizer_factory optimizer_cls_and_kwargs lr_scheduler_factory pipe_schedule_factory processing_class callbacks"
).split()


class Rows(Dataset):
    """Sequences of tokens; of each a different number is padding that does not count."""

    def __init__(self, count: int = ROWS, length: int = 10) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(0, VOCABULARY, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(self.length) < index % 7, -100)}


class Pictures(Dataset):
    """Small pictures, each with a class."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)), index % 5


def tiny_llama(dropout: float = 0.0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "attention_dropout": dropout}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **heads))


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def plain_losses(
    steps: int,
    batch: int,
    max_norm: float = 1.0,
    *,
    make: Callable[[], nn.Module] = tiny_llama,
    rows: Any = None,
    norms: list[float] | None = None,
    collate: Any = None,
) -> list[float]:
    """The loop that a user writes: one process, one model, one loss over all tokens of a step."""
    torch.manual_seed(42)
    model, losses = make(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loader = DataLoader(rows or Rows(), batch, collate_fn=collate, generator=torch.Generator())
    batches = [each for _ in range(steps) for each in loader][:steps]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (steps - step) / steps
        optimizer.zero_grad()
        loss = token_loss(model(rows["input_ids"]).logits, rows["labels"])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
        if norms is not None:
            norms.append(norm.item())
    return losses


def make_trainer(output: str | Path, **options: Any) -> PipelineTrainer:
    parts = {name: options.pop(name) for name in OBJECTS if name in options}
    how = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "max_grad_norm": 1.0}
    how |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "output_dir": str(output), **options}
    parts = {"train_dataset": Rows(), **({} if "model" in parts else {"model_init": tiny_llama}), **parts}
    trainer = PipelineTrainer(args=PipelineTrainingArguments(**how), **parts)
    trainer.remove_callback(_shown())
    return trainer


def _shown() -> type:
    from torchdistpackage.trainer import ProgressCallback

    return ProgressCallback


def trained(output: str | Path, *, resume: Any = None, **options: Any) -> PipelineTrainer:
    """A trainer after its training; process groups are made anew where they must be others."""
    if tpc._is_inited("global") and tpc.get_dp_size() != options.get("data_parallel_size", 1):
        tpc.reset()
    trainer = make_trainer(output, **options)
    trainer.train(resume)
    return trainer


def losses_of(trainer: PipelineTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def curves(rank: int, world: int, output: str, runs: list[dict[str, Any]]) -> list[list[float]]:
    """The losses of several runs, one after the other; the rows of a step are the same in all."""
    found = []
    for options in runs:
        rows = 8 // options.get("data_parallel_size", 1)
        found.append(losses_of(trained(output, **{"per_device_train_batch_size": rows, **options})))
    return found


def weights_of(trainer: PipelineTrainer) -> dict[str, torch.Tensor]:
    """This rank's weights by name, sharded ones gathered."""
    found = {}
    for index, stage in trainer.stages.items():
        for name, tensor in stage.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[f"{index}.{name}"] = whole.clone()
    return found
