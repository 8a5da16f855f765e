"""`torchdistpackage.split.parts.gemma`, under the path that SplitLearn has it at."""

from __future__ import annotations

from torchdistpackage.split.parts.gemma import GemmaBottomModel, GemmaTopModel, GemmaTrunkModel

__all__ = ["GemmaBottomModel", "GemmaTopModel", "GemmaTrunkModel"]
