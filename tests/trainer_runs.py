"""Small runs of `PipelineTrainer`, and the plain loop that they must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from torchdistpackage.trainer import PipelineTrainer, PipelineTrainingArguments

VOCABULARY = 40
ROWS = 44


class Rows(Dataset):
    """Sequences of tokens; of each a different number is padding that does not count."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(0, VOCABULARY, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(10) < index % 7, -100)}


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **heads))


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def plain_losses(steps: int, batch: int, accumulate: int = 1, max_norm: float = 1.0) -> list[float]:
    """The loop that a user writes: one process, one model, one loss over all tokens of a step."""
    torch.manual_seed(42)
    model, losses = tiny_llama(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loader = DataLoader(Rows(), batch * accumulate)
    batches = [each for _ in range(steps) for each in loader][:steps]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (steps - step) / steps
        optimizer.zero_grad()
        loss = token_loss(model(rows["input_ids"]).logits, rows["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_trainer(output: str | Path, callbacks: Any = (), **options: Any) -> PipelineTrainer:
    parts = {name: options.pop(name) for name in ("model_init", "train_dataset", "model_splitter") if name in options}
    parts |= {name: options.pop(name) for name in ("eval_dataset", "compute_loss_func") if name in options}
    how = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "max_grad_norm": 1.0}
    how |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "output_dir": str(output), **options}
    parts = {"model_init": tiny_llama, "train_dataset": Rows(), **parts}
    return PipelineTrainer(args=PipelineTrainingArguments(**how), callbacks=callbacks, **parts)


def losses_of(trainer: PipelineTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights_of(trainer: PipelineTrainer) -> dict[str, torch.Tensor]:
    """This rank's weights by name, sharded ones gathered."""
    found = {}
    for stage in trainer.stages.values():
        for name, tensor in stage.state_dict().items():
            found[name] = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
    return found
