"""Qwen2: rotary positions, attention with biases, in some sizes windows that slide; the small ones have a tied head."""

from __future__ import annotations

from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel, CausalLMTopModel, CausalLMTrunkModel
from torchdistpackage.split.parts.registry import ModelRegistry

__all__ = ["Qwen2BottomModel", "Qwen2TopModel", "Qwen2TrunkModel"]


@ModelRegistry.register("qwen2", "bottom")
class Qwen2BottomModel(CausalLMBottomModel):
    """The embedding and the first layers of Qwen2."""

    model_types = ("qwen2",)


@ModelRegistry.register("qwen2", "trunk")
class Qwen2TrunkModel(CausalLMTrunkModel):
    """Layers from the middle of Qwen2."""

    model_types = ("qwen2",)


@ModelRegistry.register("qwen2", "top")
class Qwen2TopModel(CausalLMTopModel):
    """The last layers, norm and head of Qwen2."""

    model_types = ("qwen2",)
