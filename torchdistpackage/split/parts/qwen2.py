"""Qwen2: rotary positions, attention with biases, in some sizes windows that slide; the small ones have a tied head."""

from __future__ import annotations

from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel, CausalLMTopModel, CausalLMTrunkModel
from torchdistpackage.split.parts.registry import ModelRegistry

__all__ = ["Qwen2BottomModel", "Qwen2TopModel", "Qwen2TrunkModel"]


@ModelRegistry.register("qwen2", "bottom")
class Qwen2BottomModel(CausalLMBottomModel):
    """The embedding and the first layers of Qwen2.

    Example:
        >>> from transformers import Qwen2Config
        >>> config = Qwen2Config(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10,
        ... )
        >>> bottom = Qwen2BottomModel(config, end_layer=1)
        >>> bottom.model_types, list(bottom.state_dict())[0]
        (('qwen2',), 'model.embed_tokens.weight')
    """

    model_types = ("qwen2",)


@ModelRegistry.register("qwen2", "trunk")
class Qwen2TrunkModel(CausalLMTrunkModel):
    """Layers from the middle of Qwen2.

    Example:
        >>> from transformers import Qwen2Config
        >>> config = Qwen2Config(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10,
        ... )
        >>> trunk = Qwen2TrunkModel(config, start_layer=1, end_layer=3)
        >>> trunk.num_layers, list(trunk.state_dict())[0]
        (2, 'model.layers.1.self_attn.q_proj.weight')
    """

    model_types = ("qwen2",)


@ModelRegistry.register("qwen2", "top")
class Qwen2TopModel(CausalLMTopModel):
    """The last layers, norm and head of Qwen2.

    Example:
        >>> from transformers import Qwen2Config
        >>> config = Qwen2Config(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=10,
        ... )
        >>> top = Qwen2TopModel(config, start_layer=3)
        >>> top.num_layers, list(top.state_dict())[-1]
        (1, 'lm_head.weight')
    """

    model_types = ("qwen2",)
