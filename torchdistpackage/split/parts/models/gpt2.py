"""`torchdistpackage.split.parts.gpt2`, under the path that SplitLearn has it at."""

from __future__ import annotations

from torchdistpackage.split.parts.gpt2 import GPT2BottomModel, GPT2TopModel, GPT2TrunkModel

__all__ = ["GPT2BottomModel", "GPT2TopModel", "GPT2TrunkModel"]
