"""One stage of a cut model, with its place: what a high-level trainer hands around.

The module knows how to compute, this record knows where it stands. `trainer/` makes them; nothing below needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import nn

from torchdistpackage.errors import SplitError

__all__ = ["PipelineStage"]


@final
@dataclass(frozen=True, eq=False)
class PipelineStage:
    """A part of the model and its place in the pipeline.

    Attributes:
        submod: The part: it gets what the stage before returned.
        stage_index: Its global index, from 0.
        num_stages: How many stages the model has.
        device: Where it computes; None where nobody has said.
        group: The process group of the pipeline; None where there is none.

    Raises:
        SplitError: There is no such stage.

    Example:
        >>> stage = PipelineStage(nn.Linear(2, 2), 3, 4)
        >>> stage.is_first, stage.is_last
        (False, True)
    """

    submod: nn.Module
    stage_index: int
    num_stages: int
    device: Any = None
    group: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.stage_index < self.num_stages:
            raise SplitError(f"there is no stage {self.stage_index}: {self.num_stages} stages are numbered from 0")

    @property
    def is_first(self) -> bool:
        """Whether the batch enters here."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage_index == self.num_stages - 1
