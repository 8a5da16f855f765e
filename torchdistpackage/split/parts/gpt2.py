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
    """Layers from the middle of GPT-2.

    Example:
        >>> from transformers import GPT2Config
        >>> trunk = GPT2TrunkModel(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10), 1, 3)
        >>> list(trunk.state_dict())[0], trunk.num_parameters()
        ('transformer.h.1.ln_1.weight', 1744)
    """

    model_types = ("gpt2",)


@ModelRegistry.register("gpt2", "top")
class GPT2TopModel(CausalLMTopModel):
    """The last layers, `ln_f` and the head of GPT-2.

    Example:
        >>> from transformers import GPT2Config
        >>> top = GPT2TopModel(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10), 3)
        >>> list(top.state_dict())[-3:]
        ['transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight']
    """

    model_types = ("gpt2",)
