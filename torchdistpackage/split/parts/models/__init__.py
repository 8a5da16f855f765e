"""The families, under the paths that SplitLearn has them at: its users change the name of the package only."""

from __future__ import annotations

from torchdistpackage.split.parts.models.gemma import GemmaBottomModel, GemmaTopModel, GemmaTrunkModel
from torchdistpackage.split.parts.models.gpt2 import GPT2BottomModel, GPT2TopModel, GPT2TrunkModel
from torchdistpackage.split.parts.models.qwen2 import Qwen2BottomModel, Qwen2TopModel, Qwen2TrunkModel

__all__ = [
    "GPT2BottomModel",
    "GPT2TopModel",
    "GPT2TrunkModel",
    "GemmaBottomModel",
    "GemmaTopModel",
    "GemmaTrunkModel",
    "Qwen2BottomModel",
    "Qwen2TopModel",
    "Qwen2TrunkModel",
]
