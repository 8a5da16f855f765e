"""The sending end of an edge: packs messages into frames, which are used again, and says what is new. See `edge.py`."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchdistpackage.runtime import layout as layouts
from torchdistpackage.runtime import message as wire
from torchdistpackage.runtime.edge import BROKEN, COPIED, MAX_LAYOUTS, MIN_SLOT, Handle, Key, Mover
from torchdistpackage.runtime.failure import FailureReport, raise_lost
from torchdistpackage.runtime.layout import ALIGNMENT, Layout, Travel
from torchdistpackage.runtime.message import Frame, Header, Kind
from torchdistpackage.runtime.repeats import Repeats

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from torchdistpackage.runtime.transport import Transport
    from torchdistpackage.schedule.routing import Skips

__all__ = ["Outlet"]

_KEPT = int(Travel.KEPT)
_REPEATING = (Kind.FORWARD, Kind.SKIP)


class _Known:
    """A layout that has a number on this edge, with the frames that wait to be used again."""

    __slots__ = ("layout", "number", "on_device", "only", "spare", "told")

    def __init__(self, number: int, layout: Layout, *, on_device: bool) -> None:
        self.number, self.layout, self.on_device = number, layout, on_device
        self.only = layout.tensors[0] if layout.spec is None else None
        self.spare: list[Frame] = []
        self.told = False  # whether the other side has its description

    def fits(self, leaves: list[Any], spec: TreeSpec | None, travels: tuple[int, ...]) -> bool:
        """Whether a message of several leaves has this layout."""
        entries = self.layout.leaves
        return (
            len(entries) == len(leaves)
            and all(map(layouts.is_leaf_like, leaves, entries, travels))
            and self.layout.spec == spec
        )


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
        self._used: dict[int, _Known] = {}  # layouts of this step
        self._used_before: dict[int, _Known] = {}  # layouts of the step before
        self._repeats = Repeats()
        self._told: set[int] = set()  # signatures whose text the other side has

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and what this step is about."""
        transport = self._transport
        for number, known in self._used_before.items():
            if number not in self._used:  # another shape of batch has come: its frames take the memory of the old ones
                self._drop(known)
        self._used_before, self._used = self._used, {}
        self._repeats.begin_step()
        self._slot = self._longest
        self.sign()
        about = (transport.training, transport.wire_dtype, transport.shard is None)
        if getattr(self, "_about", about) != about:
            self._recent = {}
        self._about = about

    def shrink(self) -> None:
        """Lets go of all frames that wait to be used again: from here on, fewer are under way at once."""
        for alike in self._known.values():
            for known in alike:
                self._drop(known)

    def _drop(self, known: _Known) -> None:
        for frame in known.spare:
            self._transport.recycle(self._receiver, frame.buffer)
        known.spare.clear()

    def sign(self) -> None:
        """From here on, frames say what the transport's signature says."""
        self._signature = zlib.crc32(self._transport.signature.encode())
        self._plain = self._transport.shard is None and self._signature in self._told

    def send(
        self,
        kind: Kind,
        stage: int,
        microbatch: int,
        rows: int,
        leaves: list[Any],
        spec: TreeSpec | None = None,
        skips: Skips = (),
    ) -> None:
        """Sends a message and returns at once; the tensors may be changed or freed right after.

        Args:
            kind: What it is for.
            stage: This rank's stage; of a SKIP its number.
            microbatch: Which micro-batch.
            rows: Rows of the whole step's batch.
            leaves: Tensors and constants, as `message.flatten` gives them.
            spec: Their structure; None for one bare tensor.
            skips: The table of skips that the stage has said; needs a structure.

        Raises:
            TransportError: Something among the leaves cannot travel.
            ConnectionLost: The other rank is gone.
        """
        known = self._recent.get((kind, stage))
        if spec is not None:
            # Gradients and values outside of the plan are new each time; so is a message that is one tensor.
            repeats = kind in _REPEATING and self._transport.shard is None
            travels = self._repeats.travels((kind, stage), leaves) if repeats else (0,) * len(leaves)
            if known is None or known.layout.skips != skips or not known.fits(leaves, spec, travels):
                known = self._find(kind, leaves, spec, travels, skips)
            leaves = [
                leaf
                for leaf, travel in zip(leaves, travels, strict=True)
                if isinstance(leaf, Tensor) and travel != _KEPT
            ]
            self._recent[kind, stage] = known
        elif known is None or not layouts.is_like(leaves[0], known.only):
            known = self._recent[kind, stage] = self._find(kind, leaves, None, (0,))
        self._used[known.number] = known
        length = known.layout.frame_bytes
        if not (self._plain and known.told) or length > self._slot or known.layout.is_cuda:
            self._send_unusual(known, (kind, stage, microbatch), rows, leaves)
            return
        frame = known.spare.pop() if known.spare else self._new_frame(known)
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

    def _find(
        self, kind: Kind, leaves: list[Any], spec: TreeSpec | None, travels: tuple[int, ...], skips: Skips = ()
    ) -> _Known:
        """The layout of these leaves; a new one gets a number."""
        transport = self._transport
        keys = tuple(
            layouts.leaf_key(leaf, training=transport.training, travel=travel)
            for leaf, travel in zip(leaves, travels, strict=True)
        )
        exact = tuple(repr(leaf) for leaf in leaves if type(leaf) in layouts.INEXACT)
        carried = transport.carries(kind, self._receiver)
        about = (transport.wire_dtype, transport.shard is None, keys, exact, skips, carried)
        for known in self._known.get(about, ()):
            if known.layout.spec == spec:
                return known
        if self._count == MAX_LAYOUTS:
            self._known, self._recent, self._used, self._count = {}, {}, {}, 0
        layout = Layout(spec, tuple(map(layouts.dense, keys)), transport.wire_dtype, skips)
        known = _Known(self._count, layout, on_device=carried and layout.is_cuda)
        self._known.setdefault(about, []).append(known)
        self._count += 1
        return known

    def _new_frame(self, known: _Known) -> Frame:
        transport, layout = self._transport, known.layout
        size = 1 if transport.shard is None else transport.shard.size
        device = transport.device if known.on_device else "cpu"
        length = ALIGNMENT + size * layouts.share_bytes(layout, size)
        with torch.inference_mode(False):  # a frame first used under inference mode is used again in training
            if device == "cpu":
                return Frame(layout, transport.allocate(self._receiver, length))
            return Frame(layout, torch.empty(length, dtype=torch.uint8, device=device))

    def _send_unusual(self, known: _Known, key: Key, rows: int, leaves: list[Tensor]) -> None:
        """Everything but the steady state: something to describe, a long frame, CUDA memory, a tensor group's share."""
        layout, shard = known.layout, self._transport.shard
        frame = known.spare.pop() if known.spare else self._new_frame(known)
        frame.pack(leaves)
        payload, flags = frame.buffer, 0
        if shard is not None and layout.tensors:
            share = layouts.share_bytes(layout, shard.size)
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
        except BROKEN as error:
            raise_lost(error, self._transport, self._receiver, "sending to")
