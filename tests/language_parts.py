"""A small language model on disk, and the Bottom, Trunk and Top that are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_models import language_model
from torch import Tensor

POINTS = (1, 3)


@dataclass(frozen=True)
class Parts:
    """A whole model, as `from_pretrained` gives it, and its parts.

    Attributes:
        whole: The model.
        directory: Where it is.
        bottom: Its first layer.
        trunk: The next two.
        top: The others.
    """

    whole: Any
    directory: Path
    bottom: Any
    trunk: Any
    top: Any

    def __iter__(self) -> Any:
        return iter((self.bottom, self.trunk, self.top))


def saved(directory: Path, family: str, *, sharded: bool = False, dtype: Any = None, **options: Any) -> Any:
    """Writes a model, and gives it as `from_pretrained` reads it."""
    import transformers

    transformers.logging.disable_progress_bar()
    model: Any = language_model(family, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # biases and norms that are not zeros and ones
    model.save_pretrained(directory, max_shard_size="20KB" if sharded else "1GB")
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def parts_of(directory: Path, family: str, *, factory: Any = None, **options: Any) -> Parts:
    """A model on disk and its parts.

    Args:
        directory: Where to write it.
        family: See `language_models`.
        factory: More arguments of `create_split_models`.
        **options: Of `saved`.
    """
    from torchdistpackage.split.parts import ModelFactory

    whole = saved(directory, family, **options)
    return Parts(whole, directory, *ModelFactory.create_split_models("auto", directory, *POINTS, **(factory or {})))


def through(parts: Any, ids: Tensor, labels: Tensor | None = None, **arguments: Any) -> Any:
    """What the Top returns."""
    bottom, trunk, top = parts
    hidden = trunk(bottom(ids, **arguments), **arguments)
    return top(hidden, labels=labels, **arguments)


def cached(parts: Any, ids: Tensor, caches: list[Any] | None, **arguments: Any) -> tuple[Tensor, list[Any]]:
    """Logits of new tokens, and the caches of the three parts."""
    bottom, trunk, top = parts
    first, second, third = caches or [None] * 3
    hidden, first = bottom(ids, past_key_values=first, use_cache=True, **arguments)
    hidden, second = trunk(hidden, past_key_values=second, use_cache=True, **arguments)
    output = top(hidden, past_key_values=third, use_cache=True, **arguments)
    return output.logits, [first, second, output.past_key_values]
