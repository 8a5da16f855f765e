import os
import socket
import subprocess
import sys

import pytest
import torch

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime import link
from torchdistpackage.runtime.edge import COPIED
from torchdistpackage.runtime.link import INLINE, ReceivingLink, SendingLink

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="links are Linux's")

LONG = 5 * INLINE + 3


@pytest.fixture
def ends():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sending, receiving = SendingLink(a), ReceivingLink(lambda: b)
    yield sending, receiving
    sending.close()
    receiving.close()


def numbers(length, start=0):
    return (torch.arange(length) + start).to(torch.uint8)


def receive(receiving, length, room=None):
    buffer = torch.zeros(room or length, dtype=torch.uint8)
    receiving(buffer).wait()
    return buffer[:length]


def send(sending, data):
    frame = sending.allocate(len(data))
    frame.copy_(data)
    return frame, sending(frame)


@pytest.mark.parametrize("length", [17, 64, INLINE - 1, INLINE, INLINE + 1, LONG, 1 << 20])
def test_every_length_arrives_in_a_buffer_that_may_be_longer(ends, length):
    sending, receiving = ends
    _, handle = send(sending, numbers(length))
    assert (handle is COPIED) == (length <= INLINE)
    handle.wait()
    assert torch.equal(receive(receiving, length, room=length + 100), numbers(length))


@pytest.mark.parametrize("length", [INLINE + 1, INLINE + 16, 2 * INLINE, LONG])
def test_memory_that_is_not_shared_goes_in_pieces(ends, length):
    sending, receiving = ends
    data = numbers(length)
    assert sending(data) is COPIED
    data.zero_()
    assert torch.equal(receive(receiving, length), numbers(length))


def test_a_short_message_may_be_overwritten_at_once(ends):
    sending, receiving = ends
    frame, _ = send(sending, numbers(100))
    frame.zero_()
    assert torch.equal(receive(receiving, 100), numbers(100))


def test_long_and_short_messages_keep_their_order(ends):
    sending, receiving = ends
    lengths = [64, LONG, 100, LONG + 1, INLINE, 2 * LONG, 65]
    for start, length in enumerate(lengths):
        send(sending, numbers(length, start))
    for start, length in enumerate(lengths):
        assert torch.equal(receive(receiving, length), numbers(length, start))


def test_memory_is_shared_once_and_used_again(ends):
    sending, receiving = ends
    for start in range(20):
        frame, _ = send(sending, numbers(LONG, start))
        assert torch.equal(receive(receiving, LONG), numbers(LONG, start))
        sending.recycle(frame)
    assert sending._count == 1
    assert len(receiving._segments) == 1


def test_idle_memory_is_given_back_on_both_sides(ends):
    sending, receiving = ends
    frame, _ = send(sending, numbers(LONG))
    receive(receiving, LONG)
    sending.recycle(frame)
    for _ in range(20):
        sending.begin_step()
        send(sending, numbers(64))
        receive(receiving, 64)
    assert not sending._segments
    assert not receiving._segments


def test_a_sender_far_ahead_neither_waits_nor_loses_anything(ends):
    sending, receiving = ends
    for start in range(3000):
        send(sending, numbers(2000 if start % 7 else LONG, start))
    assert sending._backlog
    for start in range(3000):
        length = 2000 if start % 7 else LONG
        assert torch.equal(receive(receiving, length), numbers(length, start)), start
    sending.finish(5.0)
    assert not sending._backlog
    assert sending._thread is None


def test_no_descriptor_stays_open(ends):
    sending, receiving = ends
    before = len(os.listdir("/proc/self/fd"))
    for start in range(500):
        send(sending, numbers(LONG, start))
    for _ in range(500):
        receive(receiving, LONG)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_backlog_leaves_no_descriptor_and_no_thread():
    before = len(os.listdir("/proc/self/fd"))
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sending = SendingLink(a)
    for start in range(1000):
        send(sending, numbers(LONG, start))
    thread = sending._thread
    assert thread is not None
    sending.close()
    thread.join(5.0)
    assert not thread.is_alive()
    b.close()
    del sending
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_sent_before_the_end_is_still_read(ends):
    sending, receiving = ends
    send(sending, numbers(LONG))
    send(sending, numbers(64))
    sending.close()
    assert torch.equal(receive(receiving, LONG), numbers(LONG))
    assert [len(data) for data in receiving.waiting()] == [64]
    with pytest.raises(ConnectionResetError, match="ended"):
        receive(receiving, 64)


def test_a_receiver_that_is_gone_is_noticed(ends):
    sending, receiving = ends
    send(sending, numbers(64))
    receive(receiving, 64)
    receiving.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        send(sending, numbers(64))


def test_a_message_that_does_not_fit_is_refused(ends):
    sending, receiving = ends
    send(sending, numbers(LONG))
    with pytest.raises(TransportError, match=f"{LONG} bytes came for a buffer of {INLINE}"):
        receive(receiving, INLINE)


def test_a_message_that_comes_late_wakes_the_receiver():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"import socket, time; time.sleep({20 * link._SPIN}); socket.socket(fileno=0).send(bytes(range(64)))"
    receiving = ReceivingLink(lambda: b)
    with subprocess.Popen([sys.executable, "-c", code], stdin=a) as child:
        a.close()
        assert torch.equal(receive(receiving, 64), numbers(64))
        assert child.wait() == 0
    with pytest.raises(ConnectionResetError, match="ended"):
        receive(receiving, 64)


def no_descriptors(*_):
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("lacking", ["memfd_create", "ftruncate"])
def test_where_no_shared_memory_is_left_the_socket_takes_it_all(ends, monkeypatch, lacking):
    sending, receiving = ends
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, lacking, no_descriptors)
    _, handle = send(sending, numbers(LONG))
    assert handle is COPIED
    assert torch.equal(receive(receiving, LONG), numbers(LONG))
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_has_come_and_is_not_wanted_any_more_can_still_be_looked_at(ends):
    sending, receiving = ends
    assert receiving.waiting() == []  # nobody has called yet
    send(sending, numbers(100))
    receive(receiving, 100)
    for start in (1, 2):
        send(sending, numbers(64, start))
    send(sending, numbers(LONG))  # lies in shared memory: a word says so, which is passed over
    assert receiving.waiting() == [bytes(numbers(64, start).tolist()) for start in (1, 2)]
