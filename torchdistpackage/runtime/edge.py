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
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import message as wire
from torchdistpackage.runtime.failure import ConnectionLost, FailureReport, RemoteFailure
from torchdistpackage.runtime.message import ALIGNMENT, Frame, Header, Kind, Layout, Message

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from torchdistpackage.runtime.transport import Handle, Transport

__all__ = ["Inlet", "Outlet"]

MIN_SLOT = 4096  # bytes; has room for a failure report
MAX_LAYOUTS = 1024  # then numbers start again: a new sequence length every batch must not grow a table for ever
MAX_DESCRIPTION = 1 << 24
MAX_FRAME = 1 << 40

Key = tuple[int, int, int]  # kind, the sender's stage, micro-batch


class _Known(NamedTuple):
    """A layout that has a number on this edge, with the frames that wait to be used again."""

    number: int
    layout: Layout
    spare: list[Frame]


class _Sent(NamedTuple):
    """A message under way: its memory must not change until the other side has it."""

    handles: list[Handle]
    buffers: list[Tensor]
    frame: Frame | None
    spare: list[Frame] | None

    def take_back(self) -> None:
        for handle in self.handles:
            handle.wait()  # the other side has it: this returns at once
        if self.frame is not None and self.spare is not None:
            self.spare.append(self.frame)


class Outlet:
    """The sending end. Frames are recycled: the steady state allocates nothing.

    Args:
        transport: This rank's transport.
        receiver: The rank at the other end.
    """

    def __init__(self, transport: Transport, receiver: int) -> None:
        self._transport, self._receiver = transport, receiver
        self._slot = self._longest = MIN_SLOT
        self._known: dict[Any, list[_Known]] = {}
        self._count = 0
        self._under_way: dict[Key, _Sent] = {}
        self._signature = 0
        self._told: set[int] = set()  # signatures whose text the other side has

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and the signature of this step."""
        self._slot = self._longest
        self._signature = zlib.crc32(self._transport.signature.encode())

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
        transport = self._transport
        known, is_new = self._find(leaves, spec)
        layout = known.layout
        on_device = layout.is_cuda and transport.carries_cuda()
        frame = known.spare.pop() if known.spare else self._new_frame(layout, on_device)
        frame.pack(leaves if spec is None else [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        payload, flags = frame.buffer, 0
        if transport.shard is not None and layout.tensors:
            shard = transport.shard
            share = wire.share_bytes(layout, shard.size)
            start = ALIGNMENT + shard.rank * share
            payload = torch.cat([frame.buffer[:ALIGNMENT], frame.buffer[start : start + share]])
            flags = wire.SLICED
        description = self._description(layout if is_new else None)
        length = payload.numel()
        if description or on_device or length > self._slot:
            flags |= wire.SPILLED
        header = Header(
            kind, flags, self._signature, stage, microbatch, rows, known.number, len(description), length
        )  # fmt: skip
        if not flags & wire.SPILLED:
            wire.write_header(payload.numpy() if flags else frame.memory, header)
            sent = _Sent([self._start(payload)], [payload], frame, known.spare)
        else:
            sent = self._send_spilled(header, description, payload, frame, known.spare)
        self._under_way[kind, stage, microbatch] = sent
        if not on_device and length > self._longest:
            self._longest = length

    def send_empty(self, kind: Kind, stage: int, microbatch: int, rows: int) -> None:
        """Sends a header alone: an empty micro-batch, or a token."""
        description = self._description(None)
        header = Header(kind, wire.EMPTY, self._signature, stage, microbatch, rows, 0, len(description), 0)
        self._under_way[kind, stage, microbatch] = self._send_spilled(header, description, None, None, None)

    def send_failure(self, report: FailureReport) -> None:
        """Sends a report in place of whatever message the other rank waits for."""
        text = report.to_bytes()
        buffer = torch.zeros(ALIGNMENT + len(text), dtype=torch.uint8)
        wire.write_header(buffer.numpy(), Header(Kind.FAILURE, 0, 0, 0, 0, 0, 0, 0, len(text)))
        buffer[ALIGNMENT:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._under_way[Kind.FAILURE, 0, 0] = _Sent([self._start(buffer)], [buffer], None, None)

    def release(self, key: Key) -> None:
        """Takes back the memory of a message that the other side has provably taken."""
        sent = self._under_way.pop(key, None)
        if sent is not None:
            sent.take_back()

    def release_all(self) -> None:
        """Takes back the memory of all messages: the step is over on every rank."""
        for sent in self._under_way.values():
            sent.take_back()
        self._under_way = {}

    def _find(self, leaves: list[Any], spec: Any) -> tuple[_Known, bool]:
        """The layout of these leaves, and whether the other side has yet to hear of it."""
        transport = self._transport
        keys = tuple([wire.leaf_key(leaf, training=transport.training) for leaf in leaves])
        candidates = self._known.setdefault((transport.wire_dtype, transport.shard is None, keys), [])
        for known in candidates:
            if known.layout.spec == spec:
                return known, False
        if self._count == MAX_LAYOUTS:
            self._known, self._count = {}, 0
            candidates = self._known.setdefault((transport.wire_dtype, transport.shard is None, keys), [])
        layout = Layout(spec, tuple(map(wire.dense, keys)), transport.wire_dtype)
        candidates.append(_Known(self._count, layout, []))
        self._count += 1
        return candidates[-1], True

    def _new_frame(self, layout: Layout, on_device: bool) -> Frame:
        size = 1 if self._transport.shard is None else self._transport.shard.size
        device = self._transport.device if on_device else "cpu"
        length = ALIGNMENT + size * wire.share_bytes(layout, size)
        return Frame(layout, torch.empty(length, dtype=torch.uint8, device=device))

    def _description(self, layout: Layout | None) -> bytes:
        """What the other side has yet to hear: a new layout, the text of a new signature, or nothing."""
        if layout is None and self._signature in self._told:
            return b""
        self._told.add(self._signature)
        described = None if layout is None else layout.describe()
        return json.dumps({"signature": self._transport.signature, "layout": described}).encode()

    def _send_spilled(
        self,
        header: Header,
        description: bytes,
        payload: Tensor | None,
        frame: Frame | None,
        spare: list[Frame] | None,
    ) -> _Sent:
        slot = torch.zeros(ALIGNMENT, dtype=torch.uint8)
        wire.write_header(slot.numpy(), header)
        buffers = [slot]
        if description:
            buffers.append(torch.frombuffer(bytearray(description), dtype=torch.uint8))
        if payload is not None:
            buffers.append(payload)
        handles = [self._start(buffer, bulk=number > 0) for number, buffer in enumerate(buffers)]
        return _Sent(handles, buffers, frame, spare)

    def _start(self, buffer: Tensor, *, bulk: bool = False) -> Handle:
        try:
            return self._transport.send(buffer, self._receiver, bulk=bulk)
        except RuntimeError as error:
            raise ConnectionLost(self._receiver, "sending to") from error


class Inlet:
    """The receiving end: posts receives ahead, takes messages in any order.

    Args:
        transport: This rank's transport.
        sender: The rank at the other end.
    """

    def __init__(self, transport: Transport, sender: int) -> None:
        self._transport, self._sender = transport, sender
        self._slot = self._longest = MIN_SLOT
        self._posted: deque[tuple[Tensor, Handle]] = deque()
        self._mail: dict[Key, Message] = {}
        self._layouts: dict[int, Layout] = {}
        self._signature = 0
        self._texts: dict[int, str] = {}

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and the signature of this step."""
        self._slot = self._longest
        self._signature = zlib.crc32(self._transport.signature.encode())

    def post(self) -> None:
        """Starts receiving the next message of the edge, whichever it is."""
        buffer = torch.empty(self._slot, dtype=torch.uint8)
        self._posted.append((buffer, self._start(buffer)))

    def take(self, kind: Kind, stage: int, microbatch: int) -> Message:
        """Waits for one message and hands it over; messages that arrive before it are kept.

        Args:
            kind: What it is for.
            stage: The sender's stage.
            microbatch: Which micro-batch.

        Raises:
            RemoteFailure: The other rank reports a failure.
            PipelineError: The other rank runs another plan.
            TransportError: The bytes are not a message of ours.
        """
        key = (kind, stage, microbatch)
        while key not in self._mail:
            self._receive_next()
        return self._mail.pop(key)

    def _receive_next(self) -> None:
        if not self._posted:
            self.post()
        buffer, handle = self._posted.popleft()
        self._finish(handle)
        header = wire.read_header(buffer.numpy())
        if header.kind == Kind.FAILURE:
            text = buffer[ALIGNMENT : ALIGNMENT + header.payload_bytes].numpy().tobytes()
            raise RemoteFailure(FailureReport.from_bytes(text))
        if header.description_bytes:
            self._read_description(header)
        if header.signature != self._signature:
            theirs = self._texts.get(header.signature, "something else")
            raise PipelineError(
                f"ranks disagree about the step: rank {self._transport.rank} runs {self._transport.signature}, but "
                f"rank {self._sender} runs {theirs}. Call forward_backward with the same arguments on every rank"
            )
        key = (header.kind, header.stage, header.microbatch)
        if header.flags & wire.EMPTY:
            self._mail[key] = Message(None, [], header.rows)
            return
        layout = self._layouts[header.layout]
        frame = self._frame(header, layout, buffer)
        self._mail[key] = Message(layout, frame.unpack(self._transport.device), header.rows)

    def _start(self, buffer: Tensor, *, bulk: bool = False) -> Handle:
        try:
            return self._transport.receive(buffer, self._sender, bulk=bulk)
        except RuntimeError as error:
            raise ConnectionLost(self._sender, "receiving from") from error

    def _finish(self, handle: Handle) -> None:
        try:
            handle.wait()
        except RuntimeError as error:
            raise ConnectionLost(self._sender, "receiving from") from error

    def _read_description(self, header: Header) -> None:
        if header.description_bytes > MAX_DESCRIPTION:
            raise TransportError(f"a message announces a description of {header.description_bytes} bytes")
        text = torch.empty(header.description_bytes, dtype=torch.uint8)
        self._finish(self._start(text, bulk=True))
        data = json.loads(text.numpy().tobytes())
        self._texts[header.signature] = data["signature"]
        if data["layout"] is not None:
            self._layouts[header.layout] = Layout.from_description(data["layout"])

    def _frame(self, header: Header, layout: Layout, slot: Tensor) -> Frame:
        """The message's frame: the slot itself, or the spilled one; slices are gathered."""
        transport = self._transport
        shard = transport.shard if header.flags & wire.SLICED else None
        size = 1 if shard is None else shard.size
        share = wire.share_bytes(layout, size)
        if header.payload_bytes != ALIGNMENT + share or header.payload_bytes > MAX_FRAME:
            raise TransportError(
                f"rank {self._sender} announces a message of {header.payload_bytes} bytes where its layout needs "
                f"{ALIGNMENT + share}"
            )
        on_device = layout.is_cuda and transport.carries_cuda()
        if not on_device:
            self._longest = max(self._longest, header.payload_bytes)
        payload = slot
        if header.flags & wire.SPILLED:
            device = transport.device if on_device else "cpu"
            payload = torch.empty(header.payload_bytes, dtype=torch.uint8, device=device)
            self._finish(self._start(payload, bulk=True))
        if shard is not None:
            full = payload.new_empty(ALIGNMENT + size * share)
            shard.gather(full[ALIGNMENT:], payload[ALIGNMENT : ALIGNMENT + share])
            payload = full
        return Frame(layout, payload)
