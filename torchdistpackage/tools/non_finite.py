"""What is said about a NaN or Inf that was found: one record, one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchdistpackage.errors import NonFiniteError
from torchdistpackage.tools.finite import Trouble, trouble_in
from torchdistpackage.tools.values import plain_tensors

__all__ = ["Count", "NonFinite", "count", "words"]


@dataclass(frozen=True)
class Count:
    """How bad one tensor is.

    Attributes:
        nan: Elements that are NaN.
        inf: Elements that are infinite.
        elements: All of them.
        shape: Of the tensor.
        dtype: Likewise.
        first: Index of the first NaN, or if there is none of the first Inf; None for sparse and wrapping tensors.

    Example:
        >>> print(count([torch.tensor([1.0, 2.0]), torch.tensor([[1.0, float("nan")]])]))
        1 NaN and 0 Inf in 2 elements, shape (1, 2), float32, the first at (0, 1)
    """

    nan: int
    inf: int
    elements: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: tuple[int, ...] | None

    def __str__(self) -> str:
        where = "" if self.first is None else f", the first at {self.first}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.nan} NaN and {self.inf} Inf in {self.elements} elements, shape {self.shape}, {dtype}{where}"


@torch.no_grad()
def count(tensors: Sequence[torch.Tensor]) -> Count:
    """Counts in the worst of some tensors."""
    worst = max(tensors, key=lambda tensor: trouble_in([tensor])).detach()
    parts = [part.float() if part.element_size() == 1 else part for part in plain_tensors(worst)]  # 8-bit types
    nans = sum(int(part.isnan().sum()) for part in parts)
    infs = sum(int(part.isinf().sum()) for part in parts)
    first = None
    if len(parts) == 1 and parts[0].shape == worst.shape:
        bad = parts[0].isnan() if nans else parts[0].isinf()
        first = tuple(bad.nonzero()[0].tolist())
    return Count(nans, infs, sum(part.numel() for part in parts), tuple(worst.shape), worst.dtype, first)


@dataclass(frozen=True)
class NonFinite:
    """A NaN or Inf, and where it arose; `str` is the message.

    Attributes:
        trouble: "NaN" or "Inf".
        phase: "forward" or "backward"; "forward, recomputed" where checkpointing computed again.
        what: What holds it, in words.
        module: Name of the module in which it arose, "root" for the model; None if it came from outside.
        inside: The modules around that, from the inside out, each with its class.
        count: Of the tensor that holds it.
        advice: What was seen around it, and what to look at.
        parameter: Name of the parameter or buffer that holds it, or that it is the gradient of; None for others.
        operation: Name of the autograd node that computed it; None in the forward pass.

    Example:
        >>> where = ("block (Block)", "root (Net)")
        >>> found = NonFinite("NaN", "forward", "the output of block.fc (Linear)", "block.fc", where,
        ...                   count([torch.tensor([float("nan")])]), "its inputs were finite")
        >>> print(found)
        NaN in the output of block.fc (Linear), inside block (Block) < root (Net) [forward]:
        1 NaN and 0 Inf in 1 elements, shape (1,), float32, the first at (0,); its inputs were finite
    """

    trouble: str
    phase: str
    what: str
    module: str | None
    inside: tuple[str, ...]
    count: Count
    advice: str
    parameter: str | None = None
    operation: str | None = None

    def __str__(self) -> str:
        inside = f", inside {' < '.join(self.inside)}" if self.inside else ""
        return f"{self.trouble} in {self.what}{inside} [{self.phase}]: {self.count}; {self.advice}"

    def as_error(self) -> NonFiniteError:
        """What is raised."""
        error = NonFiniteError(str(self))
        error.module = self.module
        return error


def words(trouble: Trouble, what: str) -> str:
    """How some tensors were."""
    return f"{what} were finite" if not trouble else f"{what} held {trouble.words} already"
