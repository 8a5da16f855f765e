"""What `AutoPipeline` says about itself: names, counts and a summary, for people.

What concerns the whole model is counted while it is cut, when every rank sees all of it: nothing is asked of other
ranks later, and a parameter that several stages share counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage.parallel.naive_ddp import NaiveDDP
from torchdistpackage.split.pipeline_stage import PipelineStage

__all__ = ["ParameterCounts", "count_parameters", "describe_stages", "stage_modules"]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a whole model.

    Attributes:
        total: Elements of all parameters.
        trainable: Elements of those that want a gradient.
    """

    total: int = 0
    trainable: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCounts:
        """Counts a model.

        Example:
            >>> ParameterCounts.of(nn.Linear(2, 3))
            ParameterCounts(total=9, trainable=9)
        """
        return cls(count_parameters(model), count_parameters(model, trainable_only=True))


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Elements of a module's parameters; one that has several names counts once.

    Example:
        >>> count_parameters(nn.Linear(2, 3))
        9
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def stage_modules(part: nn.Module) -> list[str]:
    """Names of the modules that a stage holds, as they are in the whole model, from the outside inwards."""
    return [name for name, _ in _without_wrapper(part).named_modules() if name]


def describe_stages(stages: Sequence[PipelineStage], most: int, trainable_only: bool) -> str:
    """A few lines a stage: its place, its parameters, its modules.

    Args:
        stages: This rank's.
        most: Modules to show.
        trainable_only: Count parameters that want a gradient only.
    """
    return "\n".join(line for stage in stages for line in _lines(stage, most, trainable_only))


def _lines(stage: PipelineStage, most: int, trainable_only: bool) -> Iterator[str]:
    ends = ",".join(word for word, here in (("first", stage.is_first), ("last", stage.is_last)) if here)
    count = count_parameters(stage.submod, trainable_only)
    yield f"Stage {stage.stage_index}{f' ({ends})' if ends else ''}: params={count:,}"
    names = _outermost(stage.submod)
    yield from (f"  - {name}" for name in names[:most])
    if len(names) > most:
        yield "  - ..."


def _outermost(part: nn.Module) -> list[str]:
    """Modules that are not looked into: containers with parameters are, down to layers and what is beside them."""
    whole = _without_wrapper(part)
    layers = max(
        (name for name, module in whole.named_modules() if isinstance(module, nn.ModuleDict)), key=len, default=""
    )
    opened = {"", *(layers[:at] for at, letter in enumerate(layers) if letter == "."), layers}
    names = (name for name, _ in whole.named_modules() if name not in opened)
    return [name for name in names if name.rpartition(".")[0] in opened]


def _without_wrapper(part: nn.Module) -> nn.Module:
    return part.module if isinstance(part, (DistributedDataParallel, NaiveDDP)) else part
