"""Gemma: the embedding is scaled by the square root of the width, the head is tied to it."""

from __future__ import annotations

from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel, CausalLMTopModel, CausalLMTrunkModel
from torchdistpackage.split.parts.registry import ModelRegistry

__all__ = ["GemmaBottomModel", "GemmaTopModel", "GemmaTrunkModel"]


@ModelRegistry.register("gemma", "bottom")
class GemmaBottomModel(CausalLMBottomModel):
    """The scaled embedding and the first layers of Gemma.

    Example:
        >>> from transformers import GemmaConfig
        >>> config = GemmaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10, head_dim=4,
        ... )
        >>> bottom = GemmaBottomModel(config, end_layer=1)
        >>> bottom.model_types, list(bottom.state_dict())[0]
        (('gemma',), 'model.embed_tokens.weight')
    """

    model_types = ("gemma",)


@ModelRegistry.register("gemma", "trunk")
class GemmaTrunkModel(CausalLMTrunkModel):
    """Layers from the middle of Gemma.

    Example:
        >>> from transformers import GemmaConfig
        >>> config = GemmaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10, head_dim=4,
        ... )
        >>> trunk = GemmaTrunkModel(config, start_layer=1, end_layer=3)
        >>> trunk.num_layers, list(trunk.state_dict())[0]
        (2, 'model.layers.1.self_attn.q_proj.weight')
    """

    model_types = ("gemma",)


@ModelRegistry.register("gemma", "top")
class GemmaTopModel(CausalLMTopModel):
    """The last layers, norm and head of Gemma.

    Example:
        >>> from transformers import GemmaConfig
        >>> config = GemmaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10, head_dim=4,
        ... )
        >>> top = GemmaTopModel(config, start_layer=3)
        >>> top.num_layers, list(top.state_dict())[-1]
        (1, 'lm_head.weight')
    """

    model_types = ("gemma",)
