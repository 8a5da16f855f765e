"""A directed edge between two ranks of one machine: a socket of the kernel, and memory that both processes see.

::

    up to 8 KiB    | the frame |  ---- socket ---->            the kernel has a copy: the sender is done with it
    longer         | which memory, how long |  ---- socket ---->
                   shared memory: packed once by the sender, copied out once by the receiver

Beside gloo this has no network stack, no thread that wakes up for every message (where ranks fill the cores, that
thread is what a small message costs) and one copy less. A receiver asks for a moment, giving way to other processes,
and then sleeps until the kernel wakes it. When the sender's process ends, however it ends, the receiver reads the end
of the stream at once; and a signal (Ctrl-C) ends a wait.

The sockets are AF_UNIX, SOCK_SEQPACKET: packets keep their bounds and their order. A packet of 16 bytes or less is a
word between the two ends, messages are longer. `topology/same_host.py` connects the two ends.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.edge import COPIED, Handle

__all__ = ["INLINE", "ReceivingLink", "SendingLink"]

INLINE = 8192  # bytes; above, shared memory is cheaper than two more copies through the kernel
_SPIN = 50e-6  # seconds: about what it costs to be put to sleep and woken up again
_KEPT = 8  # steps that shared memory waits idle for a message of its size
_PAGE = 4096
_CHECK = struct.pack("ll", 0, 250_000)  # a timeval: how often a receiver that sleeps looks for a reason to give up
_WORD = struct.Struct("<IIQ")
# What a word says, followed by a segment's number and a length:
_LIES = 1  # the message lies at the start of that segment
_SHARED = 2  # the next packet carries the descriptor of that segment
_FORGET = 3  # that segment is not used again
_PIECES = 4  # a message of that length follows in several packets
_T = TypeVar("_T")
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


class _Segment:
    """A piece of shared memory, at its sender."""

    __slots__ = ("descriptor", "idle_since", "memory", "number")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.descriptor = os.memfd_create("torchdistpackage", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, size)
            self.memory = _mapped(self.descriptor, size)
        except (OSError, RuntimeError):
            self.close()
            raise
        self.idle_since = 0

    def close(self) -> None:
        """Ends the descriptor; the memory lives as long as a tensor or another process uses it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class _Packet(NamedTuple):
    """What the socket had no room for yet."""

    data: bytes
    descriptor: int


@final
class SendingLink:
    """The sending end: called with a frame, it starts the send and returns.

    Args:
        end: Connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._send = end, end.send
        self._segments: dict[int, _Segment] = {}  # by address
        self._idle: list[_Segment] = []
        self._count = self._step = 0
        self._backlog: deque[_Packet] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, buffer: Tensor) -> Handle:
        """Sends a 1-D uint8 buffer. If `COPIED` comes back its memory is free again at once.

        Raises:
            OSError: The other process is gone.
        """
        length = buffer.numel()
        if length <= INLINE:
            self._put(buffer.numpy())
            return COPIED
        segment = self._segments.get(buffer.data_ptr())
        if segment is None:
            self._send_pieces(buffer)
            return COPIED
        if segment.descriptor >= 0:
            word = _WORD.pack(_SHARED, segment.number, 0)
            self._put(word)
            self._put(word, segment.descriptor)
            segment.descriptor = -1  # whoever sends it closes it
        self._put(_WORD.pack(_LIES, segment.number, length))
        return _LYING

    def begin_step(self) -> None:
        """Gives back memory that no message has needed for some steps."""
        self._step += 1
        for segment in [segment for segment in self._idle if segment.idle_since < self._step - _KEPT]:
            self._idle.remove(segment)
            del self._segments[segment.memory.data_ptr()]
            if segment.descriptor < 0:
                self._put(_WORD.pack(_FORGET, segment.number, 0))
            segment.close()

    def allocate(self, length: int) -> Tensor:
        """Memory for a frame: shared if it is long, and used again if there is some of about that length."""
        if length <= INLINE:
            return torch.empty(length, dtype=torch.uint8)
        fitting = [segment for segment in self._idle if length <= segment.memory.numel() <= 2 * length]
        if fitting:
            segment = min(fitting, key=lambda found: found.memory.numel())
            self._idle.remove(segment)
        else:
            try:
                segment = _Segment(self._count, -(-length // _PAGE) * _PAGE)
            except (OSError, RuntimeError):  # no descriptor or no shared memory left: the socket takes it in pieces
                return torch.empty(length, dtype=torch.uint8)
            self._count += 1
            self._segments[segment.memory.data_ptr()] = segment
        return segment.memory[:length]

    def recycle(self, buffer: Tensor) -> None:
        """Takes memory back that `allocate` gave; the receiver has copied what was in it."""
        segment = self._segments.get(buffer.data_ptr())
        if segment is not None:
            segment.idle_since = self._step
            self._idle.append(segment)

    def finish(self, seconds: float) -> None:
        """Waits until the kernel has all that was sent, for a while."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def close(self) -> None:
        """Ends the stream; what was sent can still be read, what waits for room is dropped."""
        self._drop_backlog()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other end has closed before
        self._socket.close()
        for segment in self._segments.values():
            segment.close()

    def __del__(self) -> None:
        self.close()

    def _send_pieces(self, buffer: Tensor) -> None:
        self._put(_WORD.pack(_PIECES, 0, buffer.numel()))
        for piece in torch.split(buffer, INLINE):
            # A last piece that is as short as a word is no trouble: the receiver counts.
            self._put(piece.numpy())

    def _put(self, packet: Any, descriptor: int = -1) -> None:
        """Hands a packet to the kernel; if the receiver is so far behind that there is no room, to a thread."""
        if not self._backlog:
            try:
                if descriptor < 0:
                    self._send(packet, _DONTWAIT)
                else:
                    _send_descriptor(self._socket, bytes(packet), descriptor, _DONTWAIT)
                return
            except BlockingIOError:
                pass
        with self._lock:
            self._backlog.append(_Packet(bytes(packet), descriptor))
            if self._thread is None:
                self._thread = threading.Thread(target=self._flush, name="torchdistpackage-backlog", daemon=True)
                self._thread.start()

    def _flush(self) -> None:
        """Runs in a thread while there is a backlog: nothing depends on when the rank calls next."""
        while True:
            with self._lock:
                if not self._backlog:
                    self._thread = None
                    return
                packet = self._backlog[0]
            try:
                if packet.descriptor < 0:
                    self._socket.send(packet.data)
                else:
                    _send_descriptor(self._socket, packet.data, packet.descriptor, 0)
            except OSError:  # closed, or the receiver is gone: the rank hears it at its next call on this edge
                self._drop_backlog()
                continue
            with self._lock:
                if self._backlog:  # it may have been closed meanwhile
                    self._backlog.popleft()

    def _drop_backlog(self) -> None:
        with self._lock:
            for packet in self._backlog:
                if packet.descriptor >= 0:
                    os.close(packet.descriptor)
            self._backlog.clear()


class _Lying:
    """A message in shared memory: it was announced, and must stay as it is until it has been taken."""

    def wait(self) -> None:
        return


_LYING = _Lying()


@final
class ReceivingLink:
    """The receiving end: called with a buffer, it returns a handle whose `wait` fills the buffer.

    Args:
        answer: Waits for the sender's call and returns the connected socket. It comes with the first wait and not
            before: a receive that is posted ahead must not wait for a sender who waits for this rank.
        check: Is asked every now and then while a message does not come, with the seconds waited; raises if there is
            no use in waiting.
    """

    def __init__(self, answer: Callable[[], socket.socket], check: Callable[[float], None] | None = None) -> None:
        self._answer, self._check = answer, check
        self._socket: socket.socket | None = None
        self._segments: dict[int, Tensor] = {}

    def __call__(self, buffer: Tensor) -> Handle:
        """Nothing has to be posted: the message is at the door as soon as it is sent."""
        return _Arrival(self, buffer)

    def receive(self, buffer: Tensor) -> None:
        """Waits for the next message.

        Raises:
            OSError: The other process is gone.
            TransportError: The message is longer than the buffer.
        """
        if self._socket is None:
            self._socket = self._answer()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _CHECK)
            self._receive_into = self._socket.recv_into
        memory = buffer.numpy()
        while True:
            if self._next(memory) > _WORD.size:
                return
            says, number, length = _WORD.unpack_from(memory)  # type: ignore[arg-type]
            if says == _FORGET:
                del self._segments[number]
            elif says == _SHARED:
                end = self._socket
                self._segments[number] = self._patiently(lambda: _receive_segment(end))  # noqa: B023, called at once
            elif length > buffer.numel():
                raise TransportError(f"a message of {length} bytes came for a buffer of {buffer.numel()}")
            elif says == _LIES:
                buffer[:length].copy_(self._segments[number][:length])
                return
            else:
                for piece in torch.split(buffer[:length], INLINE):
                    self._next(piece.numpy())
                return

    def waiting(self) -> list[bytes]:
        """The short messages that have come and that nobody will take any more; shared memory is not looked at."""
        found: list[bytes] = []
        if self._socket is None:
            return found
        try:
            while packet := self._socket.recv(INLINE, _DONTWAIT):
                if len(packet) > _WORD.size:
                    found.append(packet)
        except OSError:
            pass  # no more of them
        return found

    def close(self) -> None:
        """Ends the connection; the sender is told at its next message."""
        if self._socket is not None:
            self._socket.close()

    def __del__(self) -> None:
        self.close()

    def _next(self, memory: object) -> int:
        length = self._asked(memory)
        if length < 0:
            length = self._patiently(lambda: self._receive_into(memory))  # type: ignore[arg-type]
        if not length:
            raise ConnectionResetError("the stream has ended")
        return length

    def _patiently(self, receive: Callable[[], _T]) -> _T:
        """Sleeps until there is something to receive. The kernel ends a sleep after a while: a wait costs no more."""
        began = time.monotonic()
        while True:
            try:
                return receive()
            except BlockingIOError:
                if self._check is not None:
                    self._check(time.monotonic() - began)

    def _asked(self, memory: object) -> int:
        """The length of a packet that came within a moment; -1 if none did."""
        receive_into, deadline = self._receive_into, 0.0
        while True:
            try:
                return receive_into(memory, 0, _DONTWAIT)  # type: ignore[arg-type]
            except BlockingIOError:
                now = time.perf_counter()
            if not deadline:
                deadline = now + _SPIN
            elif now > deadline:
                return -1
            os.sched_yield()


class _Arrival:
    """A message to be received."""

    __slots__ = ("_buffer", "_link")

    def __init__(self, link: ReceivingLink, buffer: Tensor) -> None:
        self._link, self._buffer = link, buffer

    def wait(self) -> None:
        self._link.receive(self._buffer)


def _mapped(descriptor: int, size: int) -> Tensor:
    """The memory behind a descriptor. Unlike Python's mmap, torch keeps no descriptor of its own open with it."""
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)


def _receive_segment(end: socket.socket) -> Tensor:
    _, descriptors, _, _ = socket.recv_fds(end, _WORD.size, 1)
    if not descriptors:
        raise ConnectionResetError("the stream has ended")
    try:
        return _mapped(descriptors[0], os.fstat(descriptors[0]).st_size)
    finally:
        os.close(descriptors[0])


def _send_descriptor(end: socket.socket, packet: bytes, descriptor: int, flags: int) -> None:
    socket.send_fds(end, [packet], [descriptor], flags)
    os.close(descriptor)
