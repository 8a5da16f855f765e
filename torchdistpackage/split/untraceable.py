"""A forward that cannot be recorded, and what to say about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torchdistpackage.errors import SplitError

__all__ = ["Untraceable", "reason_of", "refusals"]


class Untraceable(Exception):
    """A module's own forward could not be recorded.

    Attributes:
        path: Name of the module in the model; "" for the model itself.
        where: File and line.
        reason: What it was.
    """

    def __init__(self, path: str, where: str, reason: str) -> None:
        super().__init__(f"{path or 'the model'} ({where}): {reason}")
        self.path, self.where, self.reason = path, where, reason


def reason_of(error: BaseException) -> str:
    """The first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextmanager
def refusals(model: nn.Module) -> Iterator[None]:
    """Says what to do about a forward that cannot be recorded.

    Raises:
        SplitError: In the place of `Untraceable`.
    """
    try:
        yield
    except Untraceable as error:
        raise SplitError(
            f"the forward of {error.path or type(model).__name__} cannot be recorded: {error.reason}, at "
            f"{error.where}. Two ways on: put that code into a module of its own, or name the one around it in "
            "leaf_modules (a function in leaf_functions), so that it runs as it is; or list the layers by hand, "
            "flatten_model(model, layer_list) and partition_uniform"
        ) from error
