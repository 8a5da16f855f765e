"""The base classes, under the path that SplitLearn has them at: its users change the name of the package only."""

from __future__ import annotations

from torchdistpackage.split.parts.base import BaseBottomModel, BaseSplitModel, BaseTopModel, BaseTrunkModel

__all__ = ["BaseBottomModel", "BaseSplitModel", "BaseTopModel", "BaseTrunkModel"]
