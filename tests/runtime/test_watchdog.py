"""The thread beside the step, with a board in memory."""

import logging
import time

import pytest

from torchdistpackage.runtime.failure import FailureReport, RemoteFailure
from torchdistpackage.runtime.watch import Watch
from torchdistpackage.runtime.watchdog import Watchdog

REPORT = FailureReport(1, 5, "1F2", "ValueError('planted')", "")


class MemoryBoard:
    def __init__(self):
        self.reports, self.words, self.looks, self.trouble = {}, {}, 0, None

    def publish(self, epoch, report):
        self.reports.setdefault(epoch, report)

    def find(self, epoch):
        self.looks += 1
        if self.trouble is not None:
            raise self.trouble
        return self.reports.get(epoch)

    def say(self, epoch, rank, text):
        self.words[rank] = text

    def said(self, epoch, ranks):
        return {rank: self.words[rank] for rank in ranks if self.words.get(rank)}


@pytest.fixture
def board():
    return MemoryBoard()


@pytest.fixture
def dog(board):
    closed = []
    dog = Watchdog(Watch(), board, ranks=[4, 5], rank=0, patience=0.5, world_size=2, interrupt=lambda: closed.append(1))
    dog.closed = closed
    dog.start()
    yield dog
    dog.stop()


def until(condition, seconds=8.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_report_on_the_board_ends_the_next_check_of_a_wait(board, dog):
    dog.watch.begin("a step")
    dog.watch.awaits = 5
    board.publish(0, REPORT)
    assert until(lambda: dog.watch.report == REPORT)
    with pytest.raises(RemoteFailure):
        dog.watch.check()
    dog.watch.next_epoch()
    dog.watch.check()  # the failure of another epoch is over


def test_a_rank_that_does_not_move_says_what_it_waits_for_and_takes_it_back(board, dog, caplog):
    with caplog.at_level(logging.WARNING):
        dog.watch.begin("sharing the loss")
        dog.watch.awaits = 5
        assert until(lambda: dog.said([4, 5]))
    assert dog.said([4, 5])[4].awaits == 5
    assert "waits for rank 1, global rank 5, at sharing the loss" in caplog.text
    dog.watch.end()
    assert until(lambda: not dog.said([4, 5]))


def test_user_code_is_named_and_its_groups_are_left_alone(board, dog, caplog):
    board.publish(0, REPORT)
    dog.watch.begin("a forward")
    assert until(lambda: "the step has failed meanwhile" in caplog.text)
    assert "in until (" in caplog.text
    assert not dog.closed


def test_a_wait_in_a_library_is_ended_once(board, dog):
    board.publish(0, REPORT)
    dog.watch.begin("a collective")
    dog.watch.thread = dog._thread.ident  # a thread that waits in this library's code
    assert until(lambda: dog.closed)
    assert dog.watch.interrupted
    time.sleep(0.6)
    assert dog.closed == [1]


def test_trouble_with_the_board_does_not_end_the_watch(board, dog, caplog):
    board.trouble = TypeError("a report of another version")
    assert until(lambda: "could not look around" in caplog.text)
    board.trouble = None
    board.publish(0, REPORT)
    assert until(lambda: dog.watch.report == REPORT)


def test_a_board_that_has_gone_is_not_asked_again(board, dog):
    board.trouble = RuntimeError("connection closed")
    assert until(lambda: not dog.answers)
    looks = board.looks
    dog.look()
    dog.publish(REPORT)
    time.sleep(0.6)
    assert board.looks == looks
    assert not board.reports
