"""What a step gets and what it leaves: the words between the executor and whoever calls it.

::

    one ChunkWork for each local chunk  -> Executor.run ->  StepResult
    StepExtension: comes before the first action and after the last one

Neighbours: `executor.py` runs the step, `parallel/` fills in the work and reads the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from torchdistpackage.runtime.backward import BackwardFn
from torchdistpackage.runtime.stage import ForwardFn, GradientReducer
from torchdistpackage.runtime.transport import Transport

__all__ = ["ChunkWork", "StepExtension", "StepResult"]


@dataclass(frozen=True)
class ChunkWork:
    """What one chunk of this rank does in one step.

    Attributes:
        forward_fn: The user's function; gets one object, or a list when there are several inputs.
        backward_fn: The user's backward, or None for torch's. For a `Routed` it gets a dict: destination -> gradients
            of those of its values that want one, in order.
        inputs: The chunk's own inputs, for the whole batch.
        reducer: Reduces its gradients over data-parallel replicas.
        scale: Scales the loss that its backward starts from, if it is the last one.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(4, 2)
        >>> work = ChunkWork(lambda x: torch.nn.functional.mse_loss(head(x[0]), x[1]), inputs=torch.zeros(8, 2))
        >>> work.forward_fn([torch.ones(2, 4), work.inputs[:2]]).shape  # what a step calls for each micro-batch
        torch.Size([])
    """

    forward_fn: ForwardFn
    backward_fn: BackwardFn | None = None
    inputs: Any = None
    reducer: GradientReducer | None = None
    scale: Callable[[Tensor], Any] | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step left on this rank.

    Attributes:
        outputs: On the rank of the last stage one entry for each micro-batch that has rows: its loss in training, its
            output in evaluation. Elsewhere empty.
        weights: What each of them counts: its share of the batch for a mean, 1 for a sum.
        rows: Rows of the whole step's batch.
        merged: In evaluation, the outputs put together.
        unsplit: For each stage of this rank on which input gradients had to run the whole backward: how often, and why.

    Example:
        >>> import torch
        >>> from torchdistpackage.runtime import Executor, loopback
        >>> from torchdistpackage.schedule import build
        >>> evaluation = Executor(build("1f1b", 1, 2, forward_only=True), loopback(1)[0])
        >>> result = evaluation.run([ChunkWork(lambda x: 2 * x, inputs=torch.tensor([1.0, 2.0, 3.0]))])
        >>> result.outputs, result.rows, result.merged
        ([tensor([2., 4.]), tensor([6.])], 3, tensor([2., 4., 6.]))
    """

    outputs: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    rows: int = 0
    merged: Any = None
    unsplit: dict[int, tuple[int, str]] = field(default_factory=dict)


class StepExtension(Protocol):
    """Exchanges that belong to a step but not to its plan, such as the gradients of tied parameters."""

    def begin_step(self, transport: Transport, *, training: bool) -> None:
        """Comes before the first action."""

    def end_step(self, transport: Transport) -> None:
        """Comes after the last action."""

    def cancel(self) -> None:
        """Comes after a failure."""
