"""Gemma: the embedding is scaled by the square root of the width, the head is tied to it."""

from __future__ import annotations

from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel, CausalLMTopModel, CausalLMTrunkModel
from torchdistpackage.split.parts.registry import ModelRegistry

__all__ = ["GemmaBottomModel", "GemmaTopModel", "GemmaTrunkModel"]


@ModelRegistry.register("gemma", "bottom")
class GemmaBottomModel(CausalLMBottomModel):
    """The scaled embedding and the first layers of Gemma."""

    model_types = ("gemma",)


@ModelRegistry.register("gemma", "trunk")
class GemmaTrunkModel(CausalLMTrunkModel):
    """Layers from the middle of Gemma."""

    model_types = ("gemma",)


@ModelRegistry.register("gemma", "top")
class GemmaTopModel(CausalLMTopModel):
    """The last layers, norm and head of Gemma."""

    model_types = ("gemma",)
