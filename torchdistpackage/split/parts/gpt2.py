"""GPT-2: learned positions are added in the Bottom, the head is tied to the embedding of tokens."""

from __future__ import annotations

from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel, CausalLMTopModel, CausalLMTrunkModel
from torchdistpackage.split.parts.registry import ModelRegistry

__all__ = ["GPT2BottomModel", "GPT2TopModel", "GPT2TrunkModel"]


@ModelRegistry.register("gpt2", "bottom")
class GPT2BottomModel(CausalLMBottomModel):
    r"""Embeddings of tokens and positions, and the first layers, of GPT-2.

    Example:
        >>> from transformers import GPT2Config
        >>> bottom = GPT2BottomModel(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10), end_layer=2)
        >>> bottom.get_layer_name_pattern(), list(bottom.state_dict())[:2]
        ('\\.h\\.[0-9]+', ['transformer.wte.weight', 'transformer.wpe.weight'])
    """

    model_types = ("gpt2",)


@ModelRegistry.register("gpt2", "trunk")
class GPT2TrunkModel(CausalLMTrunkModel):
    """Layers from the middle of GPT-2."""

    model_types = ("gpt2",)


@ModelRegistry.register("gpt2", "top")
class GPT2TopModel(CausalLMTopModel):
    """The last layers, `ln_f` and the head of GPT-2."""

    model_types = ("gpt2",)
