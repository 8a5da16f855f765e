"""`torchdistpackage.split.parts.qwen2`, under the path that SplitLearn has it at."""

from __future__ import annotations

from torchdistpackage.split.parts.qwen2 import Qwen2BottomModel, Qwen2TopModel, Qwen2TrunkModel

__all__ = ["Qwen2BottomModel", "Qwen2TopModel", "Qwen2TrunkModel"]
