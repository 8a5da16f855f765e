"""`pipe_split()`: a mark in a forward, heard by whoever records it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "pipe_split"]

_listeners: list[Callable[[], None]] = []  # the last one hears


def pipe_split() -> None:
    """Marks a place in a forward where a stage ends; does nothing when the model runs.

    `pipeline(module, example)` cuts at the marks, at whatever depth they stand.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         x = x + 1
        ...         pipe_split()
        ...         return x * 2
        >>> Model()(torch.ones(1))
        tensor([4.])
    """
    if _listeners:
        _listeners[-1]()


@contextmanager
def listening(mark: Callable[[], None]) -> Iterator[None]:
    """Inside, a function is called at every mark."""
    _listeners.append(mark)
    try:
        yield
    finally:
        _listeners.pop()
