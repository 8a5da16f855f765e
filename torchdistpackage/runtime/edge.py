"""The two ends of a directed edge between ranks: what turns pytrees into a stream of frames and back.

::

    Outlet (rank a)                                              Inlet (rank b)
    layout known, fits the slot    | header | tensors |   ->     one message, nothing else: the steady state
    layout known, too long         | header |             ->     then the frame itself on the bulk stream
    new layout                     | header |             ->     then its description, then the frame, as bulk

Receives are posted before their message is looked at, so both ends must know how long a slot is. It is the longest
frame of all *earlier steps* on this edge: both ends have seen the same frames, so no word is needed. A longer frame (a
bigger batch, the very first step) spills for one step and is a plain slot from the next. A shorter one is no trouble.
Nothing is ever negotiated ahead, no shape is inferred by running the model, and a layout may change at any message.

The steady state is kept short on purpose: two ranks of a pipeline wait for each other's Python in turn, and every
microsecond here is paid by all of them.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import message as wire
from torchdistpackage.runtime.failure import ConnectionLost, FailureReport, RemoteFailure
from torchdistpackage.runtime.message import ALIGNMENT, Frame, Header, Kind, Layout, Message

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from torchdistpackage.runtime.transport import Transport

__all__ = ["COPIED", "Handle", "Inlet", "Mover", "Outlet"]

MIN_SLOT = 4096  # bytes; has room for a failure report
MAX_LAYOUTS = 1024  # then numbers start again: a new sequence length every batch must not grow a table for ever
MAX_DESCRIPTION = 1 << 24
MAX_FRAME = 1 << 40
_BROKEN = (RuntimeError, OSError)  # what torch.distributed and what sockets raise when the other end is gone

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


class _Known:
    """A layout that has a number on this edge, with the frames that wait to be used again."""

    __slots__ = ("layout", "number", "only", "spare", "told")

    def __init__(self, number: int, layout: Layout) -> None:
        self.number, self.layout = number, layout
        self.only = layout.tensors[0] if layout.spec is None else None
        self.spare: list[Frame] = []
        self.told = False  # whether the other side has its description


class _Sent(NamedTuple):
    """A message under way: its memory must not change until the other side has it."""

    handles: list[Handle]
    buffers: list[Tensor]
    frame: Frame | None
    known: _Known | None

    def take_back(self) -> None:
        if self.frame is not None and self.frame.memory is None:
            for handle in self.handles:
                handle.wait()  # CUDA: the next packing must stand behind this send on the stream; no host waits
        if self.frame is not None and self.known is not None:
            self.known.spare.append(self.frame)


class Outlet:
    """The sending end. Frames are recycled: the steady state allocates nothing.

    Args:
        transport: This rank's transport.
        receiver: The rank at the other end.
    """

    def __init__(self, transport: Transport, receiver: int) -> None:
        self._transport, self._receiver = transport, receiver
        self._slots, self._bulk = transport.sender(receiver), transport.sender(receiver, bulk=True)
        self._slot = self._longest = MIN_SLOT
        self._known: dict[Any, list[_Known]] = {}
        self._recent: dict[tuple[int, int], _Known] = {}  # (kind, stage) -> the layout of its last message
        self._count = 0
        self._under_way: dict[Key, _Sent] = {}
        self._last_values: list[_Sent] = []
        self._told: set[int] = set()  # signatures whose text the other side has

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and what this step is about."""
        transport = self._transport
        self._slot = self._longest
        self._signature = zlib.crc32(transport.signature.encode())
        self._plain = transport.shard is None and self._signature in self._told
        about = (transport.training, transport.wire_dtype, transport.shard is None)
        if getattr(self, "_about", about) != about:
            self._recent = {}
        self._about = about

    def send(
        self, kind: Kind, stage: int, microbatch: int, rows: int, leaves: list[Any], spec: TreeSpec | None = None
    ) -> None:
        """Sends a message and returns at once; the tensors may be changed or freed right after.

        Args:
            kind: What it is for.
            stage: This rank's stage.
            microbatch: Which micro-batch.
            rows: Rows of the whole step's batch.
            leaves: Tensors and constants, as `message.flatten` gives them.
            spec: Their structure; None for one bare tensor.

        Raises:
            TransportError: Something among the leaves cannot travel.
            ConnectionLost: The other rank is gone.
        """
        known = self._recent.get((kind, stage))
        if known is None or spec is not None or not wire.is_like(leaves[0], known.only):
            known = self._recent[kind, stage] = self._find(leaves, spec)
            leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        length = known.layout.frame_bytes
        if not (self._plain and known.told) or length > self._slot or known.layout.is_cuda:
            self._send_unusual(known, (kind, stage, microbatch), rows, leaves)
            return
        frame = known.spare.pop() if known.spare else self._new_frame(known.layout)
        frame.pack(leaves)
        wire.write_header(frame.memory, (kind, 0, self._signature, stage, microbatch, rows, known.number, 0, length))
        handle = self._start(self._slots, frame.buffer)
        if handle is COPIED:
            known.spare.append(frame)
        else:
            self._under_way[kind, stage, microbatch] = _Sent([handle], [], frame, known)

    def send_empty(self, kind: Kind, stage: int, microbatch: int, rows: int) -> None:
        """Sends a header alone: an empty micro-batch, or a token."""
        description = self._description(None)
        header = Header(kind, wire.EMPTY, self._signature, stage, microbatch, rows, 0, len(description), 0)
        self._under_way[kind, stage, microbatch] = self._send_parts(header, description, None, None, None)

    def send_failure(self, report: FailureReport) -> None:
        """Sends a report in place of whatever message the other rank waits for."""
        text = report.to_bytes()
        buffer = torch.zeros(ALIGNMENT + len(text), dtype=torch.uint8)
        wire.write_header(buffer.numpy(), Header(Kind.FAILURE, 0, 0, 0, 0, 0, 0, 0, len(text)))
        buffer[ALIGNMENT:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._under_way[Kind.FAILURE, 0, 0] = _Sent([self._start(self._slots, buffer)], [buffer], None, None)

    def release(self, key: Key) -> None:
        """Takes back the memory of a message that the other side has provably taken."""
        sent = self._under_way.pop(key, None)
        if sent is not None:
            sent.take_back()

    def release_all(self) -> None:
        """Takes back the memory of all messages of the plan: the step is over on every rank.

        A send that is let go of before the other side has taken it is lost on gloo. What is exchanged outside of the
        plan (values) has not been taken for certain before the *next* step is over, so it is kept until then.
        """
        for sent in self._last_values:
            sent.take_back()
        self._last_values = [sent for key, sent in self._under_way.items() if key[0] == Kind.VALUE]
        for key, sent in self._under_way.items():
            if key[0] != Kind.VALUE:
                sent.take_back()
        self._under_way = {}

    def outstanding(self) -> list[Handle]:
        """Sends that the other side may not have taken yet."""
        return [handle for sent in (*self._last_values, *self._under_way.values()) for handle in sent.handles]

    def _find(self, leaves: list[Any], spec: TreeSpec | None) -> _Known:
        """The layout of these leaves; a new one gets a number."""
        transport = self._transport
        keys = tuple([wire.leaf_key(leaf, training=transport.training) for leaf in leaves])
        about = (transport.wire_dtype, transport.shard is None, keys)
        for known in self._known.get(about, ()):
            if known.layout.spec == spec:
                return known
        if self._count == MAX_LAYOUTS:
            self._known, self._recent, self._count = {}, {}, 0
        known = _Known(self._count, Layout(spec, tuple(map(wire.dense, keys)), transport.wire_dtype))
        self._known.setdefault(about, []).append(known)
        self._count += 1
        return known

    def _new_frame(self, layout: Layout) -> Frame:
        transport = self._transport
        size = 1 if transport.shard is None else transport.shard.size
        device = transport.device if layout.is_cuda and transport.carries_cuda() else "cpu"
        length = ALIGNMENT + size * wire.share_bytes(layout, size)
        with torch.inference_mode(False):  # a frame first used under inference mode is used again in training
            if device == "cpu":
                return Frame(layout, transport.allocate(self._receiver, length))
            return Frame(layout, torch.empty(length, dtype=torch.uint8, device=device))

    def _send_unusual(self, known: _Known, key: Key, rows: int, leaves: list[Tensor]) -> None:
        """Everything but the steady state: something to describe, a long frame, CUDA memory, a tensor group's share."""
        layout, shard = known.layout, self._transport.shard
        frame = known.spare.pop() if known.spare else self._new_frame(layout)
        frame.pack(leaves)
        payload, flags = frame.buffer, 0
        if shard is not None and layout.tensors:
            share = wire.share_bytes(layout, shard.size)
            start = ALIGNMENT + shard.rank * share
            payload, flags = torch.cat([payload[:ALIGNMENT], payload[start : start + share]]), wire.SLICED
        description = self._description(None if known.told else layout)
        known.told = True
        length = payload.numel()
        if description or payload.is_cuda or length > self._slot:
            flags |= wire.SPILLED
        kind, stage, microbatch = key
        header = Header(kind, flags, self._signature, stage, microbatch, rows, known.number, len(description), length)
        self._under_way[key] = self._send_parts(header, description, payload, frame, known)
        if not payload.is_cuda:
            self._longest = max(self._longest, length)

    def _description(self, layout: Layout | None) -> bytes:
        """What the other side has yet to hear: a new layout, the text of a new signature, or nothing."""
        if layout is None and self._signature in self._told:
            return b""
        self._told.add(self._signature)
        self._plain = self._transport.shard is None
        described = None if layout is None else layout.describe()
        return json.dumps({"signature": self._transport.signature, "layout": described}).encode()

    def _send_parts(
        self, header: Header, description: bytes, payload: Tensor | None, frame: Frame | None, known: _Known | None
    ) -> _Sent:
        """The payload as one slot, or header, description and payload one after the other."""
        if payload is not None and not header.flags & wire.SPILLED:
            wire.write_header(payload.numpy(), header)
            return _Sent([self._start(self._slots, payload)], [payload], frame, known)
        slot = torch.zeros(ALIGNMENT, dtype=torch.uint8)
        wire.write_header(slot.numpy(), header)
        buffers, handles = [slot], [self._start(self._slots, slot)]
        if description:
            buffers.append(torch.frombuffer(bytearray(description), dtype=torch.uint8))
            handles.append(self._start(self._bulk, buffers[-1]))
        if payload is not None:
            buffers.append(payload)
            handles.append(self._start(self._bulk, payload))
        return _Sent(handles, buffers, frame, known)

    def _start(self, stream: Mover, buffer: Tensor) -> Handle:
        try:
            return stream(buffer)
        except _BROKEN as error:
            raise ConnectionLost(self._receiver, "sending to") from error


class Inlet:
    """The receiving end: posts receives ahead, takes messages in any order.

    Args:
        transport: This rank's transport.
        sender: The rank at the other end.
    """

    def __init__(self, transport: Transport, sender: int) -> None:
        self._transport, self._sender = transport, sender
        self._slots, self._bulk = transport.receiver(sender), transport.receiver(sender, bulk=True)
        self._slot = self._longest = MIN_SLOT
        self._posted: deque[tuple[Tensor, Handle]] = deque()
        self._mail: dict[Key, Message] = {}
        self._layouts: dict[int, Layout] = {}
        self._texts: dict[int, str] = {}

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and the signature of this step."""
        self._slot = self._longest
        self._signature = zlib.crc32(self._transport.signature.encode())

    def post(self) -> None:
        """Starts receiving the next message of the edge, whichever it is."""
        buffer = torch.empty(self._slot, dtype=torch.uint8)
        try:
            self._posted.append((buffer, self._slots(buffer)))
        except _BROKEN as error:
            raise ConnectionLost(self._sender, "receiving from") from error

    def take(self, kind: Kind, stage: int, microbatch: int) -> Message:
        """Waits for one message and hands it over; messages that arrive before it are kept.

        Args:
            kind: What it is for.
            stage: The sender's stage.
            microbatch: Which micro-batch.

        Raises:
            RemoteFailure: The other rank reports a failure.
            ConnectionLost: The other rank is gone.
            PipelineError: The other rank runs another plan.
            TransportError: The bytes are not a message of ours.
        """
        key = (kind, stage, microbatch)
        mail = self._mail
        while key not in mail:
            self._receive_next()
        return mail.pop(key)

    def _receive_next(self) -> None:
        try:
            if self._posted:
                buffer, handle = self._posted.popleft()
            else:
                buffer = torch.empty(self._slot, dtype=torch.uint8)
                handle = self._slots(buffer)
            handle.wait()
        except _BROKEN as error:
            raise ConnectionLost(self._sender, "receiving from") from error
        header = wire.read_header(buffer.numpy())
        kind, flags, signature, stage, microbatch, rows, number, description_bytes, length = header
        if description_bytes or flags or signature != self._signature:
            self._receive_unusual(header, buffer)
            return
        layout = self._layouts[number]
        if length != layout.frame_bytes:
            raise self._wrong_length(length, layout.frame_bytes)
        self._mail[kind, stage, microbatch] = Message(layout, layout.read(buffer, self._transport.device), rows)

    def _receive_unusual(self, header: Header, slot: Tensor) -> None:
        if header.kind == Kind.FAILURE:
            text = slot[ALIGNMENT : ALIGNMENT + header.payload_bytes].numpy().tobytes()
            raise RemoteFailure(FailureReport.from_bytes(text))
        if header.description_bytes:
            self._read_description(header)
        if header.signature != self._signature:
            theirs = self._texts.get(header.signature, "something else")
            raise PipelineError(
                f"ranks disagree about the step: rank {self._transport.rank} runs {self._transport.signature}, but "
                f"rank {self._sender} runs {theirs}. Call forward_backward with the same arguments on every rank"
            )
        message = Message(None, [], header.rows)
        if not header.flags & wire.EMPTY:
            layout = self._layouts[header.layout]
            payload = self._payload(header, layout, slot)
            message = Message(layout, layout.read(payload, self._transport.device), header.rows)
        self._mail[header.kind, header.stage, header.microbatch] = message

    def _read_description(self, header: Header) -> None:
        if header.description_bytes > MAX_DESCRIPTION:
            raise TransportError(f"a message announces a description of {header.description_bytes} bytes")
        text = self._receive_bulk(header.description_bytes, "cpu")
        data = json.loads(text.numpy().tobytes())
        self._texts[header.signature] = data["signature"]
        if data["layout"] is not None:
            self._layouts[header.layout] = Layout.from_description(data["layout"])

    def _payload(self, header: Header, layout: Layout, slot: Tensor) -> Tensor:
        """The message's frame: the slot itself, or the spilled one; a tensor group's shares are gathered."""
        transport = self._transport
        shard = transport.shard if header.flags & wire.SLICED else None
        size = 1 if shard is None else shard.size
        share = wire.share_bytes(layout, size)
        if header.payload_bytes != ALIGNMENT + share or header.payload_bytes > MAX_FRAME:
            raise self._wrong_length(header.payload_bytes, ALIGNMENT + share)
        on_device = layout.is_cuda and transport.carries_cuda()
        if not on_device:
            self._longest = max(self._longest, header.payload_bytes)
        payload = slot
        if header.flags & wire.SPILLED:
            payload = self._receive_bulk(header.payload_bytes, transport.device if on_device else "cpu")
        if shard is not None:
            full = payload.new_empty(ALIGNMENT + size * share)
            shard.gather(full[ALIGNMENT:], payload[ALIGNMENT : ALIGNMENT + share])
            payload = full
        return payload

    def _receive_bulk(self, length: int, device: torch.device | str) -> Tensor:
        buffer = torch.empty(length, dtype=torch.uint8, device=device)
        try:
            self._bulk(buffer).wait()
        except _BROKEN as error:
            raise ConnectionLost(self._sender, "receiving from") from error
        return buffer

    def _wrong_length(self, length: int, expected: int) -> TransportError:
        return TransportError(
            f"rank {self._sender} announces a message of {length} bytes where its layout needs {expected}"
        )
