"""What travels between two ranks: any pytree of tensors and plain constants, as one self-describing frame.

::

    frame   | header 64 B | tensor 0 | tensor 1 | ...        every tensor starts at a multiple of 64 bytes
    header  | what it is for | how many rows the step has | which layout the rest has | how long it is |

Packing is one copy per tensor, which makes it contiguous, casts it and detaches it from whatever the user does with it
next. Neighbours: `layout.py` says what is in a frame, `outlet.py` and `inlet.py` are its two ends.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Size, Tensor
from torch.utils import _pytree as pytree

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.layout import Layout

__all__ = ["Frame", "Header", "Kind", "Message", "flatten", "read_header", "write_header"]

_MAGIC = 0x54445031  # "TDP1"


class Kind(enum.IntEnum):
    """What a frame is for."""

    FORWARD = 0
    BACKWARD = 1
    DONE = 2  # the step is over, see `transport.finish_step`
    VALUE = 3  # outside of the plan: the loss, a tied gradient
    FAILURE = 4  # the sender has failed; the rest of the frame says why
    SKIP = 5  # past the neighbour: values to a later stage, gradients to an earlier one, see `skips.py`


class Header(NamedTuple):
    """The first 64 bytes of a frame.

    Attributes:
        kind: What the frame is for.
        flags: Sum of the `Header.*` flags.
        signature: Checksum of what both ranks must agree on (schedule, micro-batches, ...).
        stage: The sender's stage; of a SKIP its number, which has both ends.
        microbatch: Which micro-batch.
        rows: Rows of the whole step's batch; 0 where nobody needs to know.
        layout: The number of the layout on this edge.
        description_bytes: Length of the layout's description that follows; 0 if it is known.
        payload_bytes: Length of the frame that holds the tensors, its own header included.
    """

    kind: int
    flags: int
    signature: int
    stage: int
    microbatch: int
    rows: int
    layout: int
    description_bytes: int
    payload_bytes: int


EMPTY = 1  # a micro-batch without rows: skipped on every stage
SPILLED = 2  # the tensors follow in a message of their own
SLICED = 4  # this is one rank's share; the tensor group gathers the rest

_HEADER = struct.Struct("<IIIIIIQQQQ")
_pack, _unpack = _HEADER.pack_into, _HEADER.unpack_from


def write_header(memory: Any, header: tuple[int, ...]) -> None:
    """Writes a header (the fields of `Header`, in their order) into the first bytes of a writable buffer."""
    _pack(memory, 0, _MAGIC, *header)


def read_header(memory: Any) -> Header:
    """Reads a header.

    Raises:
        TransportError: These bytes are not a frame of ours.
    """
    fields = _unpack(memory, 0)
    if fields[0] != _MAGIC:
        raise TransportError(
            "received bytes that are not a pipeline message: something else sends on the pipeline's process group, "
            "or the ranks run different versions of this library"
        )
    return Header._make(fields[1:])


class Message(NamedTuple):
    """A message on arrival.

    Attributes:
        layout: What it is; None for an empty micro-batch.
        tensors: Its tensors, without any autograd history.
        rows: Rows of the whole step's batch.
    """

    layout: Layout | None
    tensors: list[Tensor]
    rows: int


class Frame:
    """The memory of a message to send, with a window on it for each tensor.

    Args:
        layout: What the frame holds.
        buffer: 1-D uint8 memory of at least `layout.frame_bytes`.
    """

    __slots__ = ("buffer", "memory", "views")

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        self.buffer = buffer
        self.memory = None if buffer.is_cuda else buffer.numpy()
        self.views = layout.views(buffer)

    def pack(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors in: contiguous, cast, without history."""
        for view, tensor in zip(self.views, tensors, strict=True):
            view.copy_(tensor.detach())


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec | None]:
    """Leaves and structure; a bare tensor, the common case, has no structure."""
    if isinstance(tree, Tensor):
        return [tree], None
    return pytree.tree_flatten(tree, is_leaf=_is_size)


def _is_size(node: Any) -> bool:
    """A size is a constant; some versions of torch would take it apart, and give a plain tuple back."""
    return type(node) is Size
