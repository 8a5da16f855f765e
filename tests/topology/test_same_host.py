import multiprocessing
import os
import socket

import pytest

from torchdistpackage.topology.same_host import Door

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="these sockets are Linux's")


def doors(*machines):
    made = [Door(rank, machine) for rank, machine in enumerate(machines)]
    for door in made:
        door.notices = [other.notice for other in made]
    return made


def no_reason():
    return


def test_ranks_of_one_machine_reach_each_other():
    a, _, c = doors("one", "one", "two")
    assert a.reaches(1)
    assert not a.reaches(2)
    a.notices = [a.notice, None, c.notice]  # that rank has no door
    assert not a.reaches(1)


def test_a_call_waits_until_it_is_answered():
    a, b = doors("one", "one")
    end = a.call(1, 0)
    end.send(b"hello")
    assert b.answer(0, 0, no_reason).recv(64) == b"hello"


def test_calls_are_told_apart_by_rank_and_epoch():
    a, b, c = doors("one", "one", "one")
    for caller, epoch in ((a, 0), (c, 1), (a, 1), (c, 0)):
        caller.call(1, epoch).send(f"{caller._rank} {epoch}".encode())
    assert b.answer(2, 0, no_reason).recv(64) == b"2 0"
    assert b.answer(0, 1, no_reason).recv(64) == b"0 1"
    assert b.answer(2, 1, no_reason).recv(64) == b"2 1"
    assert (0, 0) not in b._called  # from before the failure


def test_a_wait_asks_whether_there_is_a_reason_to_stop():
    _, b = doors("one", "one")

    def failed():
        raise RuntimeError("rank 0 failed before it called")

    with pytest.raises(RuntimeError, match="before it called"):
        b.answer(0, 0, failed)


def test_a_wait_for_a_dead_rank_ends():
    a, b = doors("one", "one")
    a._listener.close()
    with pytest.raises(OSError, match=r"refused|ended"):
        b.answer(0, 0, no_reason)


def test_somebody_who_does_not_say_who_they_are_is_not_let_in():
    a, b = doors("one", "one")
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect("\0" + b.notice["address"])
    stranger.send(b"what is this")
    stranger.send(b"?")
    stranger.close()
    a.call(1, 3).send(b"me")
    assert b.answer(0, 3, no_reason).recv(64) == b"me"


def _linger(event):
    event.wait(20)


def test_a_forked_worker_does_not_keep_a_connection_alive():
    a, b = doors("one", "one")
    end = a.call(1, 0)
    received = b.answer(0, 0, no_reason)
    context = multiprocessing.get_context("fork")
    event = context.Event()
    worker = context.Process(target=_linger, args=(event,))
    worker.start()
    try:
        end.close()
        received.settimeout(5.0)
        assert received.recv(64) == b""
    finally:
        event.set()
        worker.join(5.0)
    assert worker.exitcode == 0
    assert os.getpid() != worker.pid


def test_a_door_that_is_forgotten_closes_everything():
    before = len(os.listdir("/proc/self/fd"))
    a, b = doors("one", "one")
    a.call(1, 0).close()
    b.answer(0, 0, no_reason).close()
    a.call(1, 1).close()
    b._let_in()
    b._look_after(0)
    assert len(os.listdir("/proc/self/fd")) > before
    del a, b
    assert len(os.listdir("/proc/self/fd")) == before
