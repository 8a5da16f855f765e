"""A directed edge between ranks: what its two ends agree on. `outlet.py` is the sending end, `inlet.py` the other.

::

    Outlet (rank a)                                              Inlet (rank b)
    layout known, fits the slot    | header | tensors |   ->     one message, nothing else: the steady state
    layout known, too long         | header |             ->     then the frame itself on the bulk stream
    new layout                     | header |             ->     then its description, then the frame, as bulk

Receives are posted before their message is looked at, so both ends must know how long a slot is. It is the longest
frame of all *earlier steps* on this edge: both ends have seen the same frames, so no word is needed. A longer frame (a
bigger batch, the very first step) spills for one step and is a plain slot from the next. A shorter one is no trouble.
Nothing is ever negotiated ahead, no shape is inferred by running the model, and a layout may change at any message.

A value that is the same object in message after message (a mask, a table of positions) travels once a step::

    message 0    | activation | mask, keep it |       from the second step on; in the first one message 0 cannot know
    message 1..  | activation |                       the receiver adds what it has kept

The steady state is kept short on purpose: two ranks of a pipeline wait for each other's Python in turn, and every
microsecond here is paid by all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["BROKEN", "COPIED", "MAX_DESCRIPTION", "MAX_LAYOUTS", "MIN_SLOT", "Handle", "Key", "Mover"]

MIN_SLOT = 4096  # bytes; has room for a failure report
MAX_LAYOUTS = 1024  # then numbers start again: a new sequence length every batch must not grow a table for ever
MAX_DESCRIPTION = 1 << 24
BROKEN = (RuntimeError, OSError)  # what torch.distributed and what sockets raise when the other end is gone

Key = tuple[int, int, int]  # kind, the sender's stage, micro-batch


class Handle(Protocol):
    """A send or receive under way."""

    def wait(self) -> object:
        """Blocks until the buffer may be read (receive) or written (send)."""


Mover = Callable[[Tensor], Handle]


class _Copied:
    def wait(self) -> None:
        return


COPIED = _Copied()
"""The handle of a send that needs its buffer no more."""
