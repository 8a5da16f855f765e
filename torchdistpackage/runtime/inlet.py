"""The receiving end of an edge: takes frames apart, and keeps what comes before it is asked for. See `edge.py`."""

from __future__ import annotations

import json
import struct
import zlib
from collections import deque
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import layout as layouts
from torchdistpackage.runtime import message as wire
from torchdistpackage.runtime.edge import BROKEN, MAX_DESCRIPTION, MIN_SLOT, Handle, Key
from torchdistpackage.runtime.failure import FailureReport, RemoteFailure, raise_lost
from torchdistpackage.runtime.hand_over import version_of
from torchdistpackage.runtime.layout import ALIGNMENT, Layout, TensorLayout, Travel
from torchdistpackage.runtime.message import Header, Kind, Message

if TYPE_CHECKING:
    from torchdistpackage.runtime.transport import Transport

__all__ = ["Inlet", "report_in"]


class Inlet:
    """The receiving end: posts receives ahead, takes messages in any order.

    Args:
        transport: This rank's transport.
        sender: The rank at the other end.
    """

    def __init__(self, transport: Transport, sender: int) -> None:
        self._transport, self._sender, self._watch = transport, sender, transport.watch
        self._awaited = transport.global_ranks[sender]
        self._slots, self._bulk = transport.receiver(sender), transport.receiver(sender, bulk=True)
        self._slot = self._longest = MIN_SLOT
        self._posted: deque[tuple[Tensor, Handle]] = deque()
        self._mail: dict[Key, Message] = {}
        self._layouts: dict[int, Layout] = {}
        self._texts: dict[int, str] = {}
        self._kept: dict[tuple[int, int], dict[int, Tensor]] = {}  # (kind, stage) -> place among the leaves -> value
        self._versions: dict[int, int] = {}  # id of a value that is kept -> its version when it came

    def begin_step(self) -> None:
        """Adopts the slot length that the earlier frames ask for, and the signature of this step."""
        self._slot = self._longest
        self.sign()

    def sign(self) -> None:
        """From here on, frames must say what the transport's signature says."""
        self._signature = zlib.crc32(self._transport.signature.encode())

    def end_step(self) -> None:
        """Lets go of the values that repeat."""
        self._kept, self._versions = {}, {}

    def post(self) -> None:
        """Starts receiving the next message of the edge, whichever it is."""
        buffer = torch.empty(self._slot, dtype=torch.uint8)
        try:
            self._posted.append((buffer, self._slots(buffer)))
        except BROKEN as error:
            self._lost(error)

    def take(self, kind: Kind, stage: int, microbatch: int) -> Message:
        """Waits for one message and hands it over; messages that arrive before it are kept.

        Args:
            kind: What it is for.
            stage: The sender's stage.
            microbatch: Which micro-batch.

        Raises:
            RemoteFailure: The other rank reports a failure.
            ConnectionLost: The other rank is gone.
            PipelineError: The other rank runs another plan, or a value that repeats was changed in place.
            TransportError: The bytes are not a message of ours.
        """
        key = (kind, stage, microbatch)
        mail = self._mail
        while key not in mail:
            self._receive_next()
        message = mail.pop(key)
        if self._versions:
            self._check_unchanged(message, stage)
        return message

    def _receive_next(self) -> None:
        watch = self._watch
        watch.awaits = self._awaited
        try:
            if self._posted:
                buffer, handle = self._posted.popleft()
            else:
                buffer = torch.empty(self._slot, dtype=torch.uint8)
                handle = self._slots(buffer)
            handle.wait()
        except BROKEN as error:
            self._lost(error)
        watch.awaits = -1
        header = wire.read_header(buffer.numpy())
        kind, flags, signature, stage, microbatch, rows, number, description_bytes, length = header
        if description_bytes or flags or signature != self._signature:
            self._receive_unusual(header, buffer)
            return
        layout = self._layouts.get(number)
        if layout is None or length != layout.frame_bytes:
            raise self._wrong_length(length, layout)
        tensors = layout.read(buffer, self._transport.device)
        if layout.keeps:
            tensors = self._with_kept(kind, stage, layout, tensors)
        self._mail[kind, stage, microbatch] = Message(layout, tensors, rows)

    def _receive_unusual(self, header: Header, slot: Tensor) -> None:
        if header.kind == Kind.FAILURE:
            text = slot[ALIGNMENT : ALIGNMENT + header.payload_bytes].numpy().tobytes()
            raise RemoteFailure(FailureReport.from_bytes(text))
        if header.description_bytes:
            self._read_description(header)
        if header.signature != self._signature:
            theirs = self._texts.get(header.signature, "something else")
            transport = self._transport
            raise PipelineError(
                f"ranks disagree about the step: {transport.name(transport.rank)} runs {transport.signature}, but "
                f"{transport.name(self._sender)} runs {theirs}. Call forward_backward with the same arguments on every "
                "rank"
            )
        message = Message(None, [], header.rows)
        if not header.flags & wire.EMPTY:
            layout = self._layouts.get(header.layout)
            if layout is None:
                raise self._wrong_length(header.payload_bytes, None)
            payload = self._payload(header, layout, slot)
            tensors = layout.read(payload, self._transport.device)
            if layout.keeps:
                tensors = self._with_kept(header.kind, header.stage, layout, tensors)
            message = Message(layout, tensors, header.rows)
        self._mail[header.kind, header.stage, header.microbatch] = message

    def _with_kept(self, kind: int, stage: int, layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
        """The message's tensors and those that earlier ones have brought; keeps what later ones will leave out."""
        kept, arrived = self._kept.setdefault((kind, stage), {}), iter(tensors)
        found = []
        for place, about in enumerate(layout.leaves):  # of all leaves: the other end counts those, too
            if not isinstance(about, TensorLayout):
                continue
            if about.travel == Travel.KEPT and place not in kept:
                raise TransportError(f"rank {self._sender} leaves out a value that it has not sent in this step")
            tensor = kept[place] if about.travel == Travel.KEPT else next(arrived)
            if about.travel == Travel.KEEP:
                tensor = tensor.data  # counts its own changes, not those of what came in the same frame
                self._versions.pop(id(kept.get(place)), None)  # another tensor may get that id
                kept[place] = tensor
                self._versions[id(tensor)] = version_of(tensor)
            found.append(tensor)
        return found

    def _check_unchanged(self, message: Message, stage: int) -> None:
        """Raises if what an earlier micro-batch has brought for all of them is not as it came."""
        for tensor in message.tensors:
            version = version_of(tensor)
            if self._versions.get(id(tensor), version) != version:
                raise PipelineError(
                    f"a value that stage {stage} sends with every micro-batch, and that travels once a step, was "
                    "changed in place by the stage that got it, and the next micro-batch would see that: change a clone"
                )

    def _read_description(self, header: Header) -> None:
        if header.description_bytes > MAX_DESCRIPTION:
            raise TransportError(f"a message announces a description of {header.description_bytes} bytes")
        text = self._receive_bulk(header.description_bytes, "cpu")
        try:
            data = json.loads(text.numpy().tobytes())
            self._texts[header.signature] = data["signature"]
        except (ValueError, LookupError, TypeError) as error:
            raise TransportError(f"rank {self._sender} describes a message in a way that cannot be read") from error
        if data["layout"] is not None:
            self._layouts[header.layout] = Layout.from_description(data["layout"])

    def _payload(self, header: Header, layout: Layout, slot: Tensor) -> Tensor:
        """The message's frame: the slot itself, or the spilled one; a tensor group's shares are gathered."""
        transport = self._transport
        shard = transport.shard if header.flags & wire.SLICED else None
        size = 1 if shard is None else shard.size
        share = layouts.share_bytes(layout, size)
        if header.payload_bytes != ALIGNMENT + share:
            raise self._wrong_length(header.payload_bytes, layout)
        on_device = layout.is_cuda and transport.carries(header.kind, self._sender)
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
        try:
            with self._transport.receiving(device):
                buffer = torch.empty(length, dtype=torch.uint8, device=device)
                handle = self._bulk(buffer)
            self._watch.awaits = self._awaited
            handle.wait()
            self._watch.awaits = -1
        except BROKEN as error:
            self._lost(error)
        if buffer.is_cuda:
            buffer.record_stream(torch.cuda.current_stream(buffer.device))
        return buffer

    def _wrong_length(self, length: int, layout: Layout | None) -> TransportError:
        known = "it never described" if layout is None else f"needs {layout.frame_bytes}"
        return TransportError(f"rank {self._sender} announces a message of {length} bytes whose layout {known}")

    def _lost(self, error: Exception) -> NoReturn:
        raise_lost(error, self._transport, self._sender, "receiving from")


def report_in(data: bytes) -> FailureReport | None:
    """The report, if a frame is one."""
    try:
        header = wire.read_header(data)
    except (TransportError, struct.error):
        return None
    if header.kind != wire.Kind.FAILURE:
        return None
    return FailureReport.from_bytes(data[ALIGNMENT : ALIGNMENT + header.payload_bytes])
