"""A thread beside the step that looks at the clock: the step itself never does.

::

    step        F0   F1   B0 . . . . . . . . . . . .            waits for rank 1, or computes, or is in a collective
    watchdog      |       |       | is there a report? | say what it waits for | end the wait
                  four times a second; costs the step nothing

It does three things. It looks at the board for failures that no message will bring here: those of replicas, or of a
rank whose neighbour is in a long computation. It says, on this rank's log and on the board, what a rank that has not
moved for a while is doing. And where a failure is known while the step is in a wait that nobody can end from inside (a
collective of gloo or NCCL), it closes the groups that are waited for.

All words with the board go through this thread: a store whose host has died may never answer, and only this thread
would hang.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin one from Python 3.11 on
from dataclasses import dataclass
from types import FrameType
from typing import Any, final

import torch

from torchdistpackage.runtime.board import Board
from torchdistpackage.runtime.failure import FailureReport
from torchdistpackage.runtime.program import Instruction
from torchdistpackage.runtime.watch import Watch

__all__ = ["Doing", "Watchdog"]

_log = logging.getLogger(__name__)
_TICK = 0.25  # seconds
_ANSWER = 1.0  # seconds that the step waits for the board to answer; then once more, for a moment
_ASKS = 4000  # a second, of all ranks together: about a tenth of what the store can answer
_GRACE = 1.0  # seconds in which a known failure may end a wait by itself, as messages do
_IDLE = 0.2  # share of the time below which a thread does not compute
_OURS = os.path.dirname(os.path.dirname(__file__))
_LIBRARIES = (_OURS, os.path.dirname(torch.__file__))


@dataclass(frozen=True)
class Doing:
    """What a rank that does not move has said.

    Attributes:
        awaits: The global rank that it waits for; -1 if it does not wait for a message.
        action: The action of the plan that it is at; "" outside of one.
        text: The rest, for people.
    """

    awaits: int
    action: str
    text: str


@final
class Watchdog:
    """Watches one rank.

    Args:
        watch: What it does.
        board: Where it and the others leave word.
        ranks: Global ranks of the pipeline.
        rank: This rank in the pipeline.
        patience: Seconds without a move after which it says what it is doing; then after twice that, and so on.
        world_size: How many ranks look at the same board.
        interrupt: Ends the waits of process groups, for good.
        board_host: The global rank in whose process the board is; None if it is in none of them.
        device_waits: Whether collectives run on a device (NCCL), which waits for them after the step has left its host.

    Attributes:
        watch: What this rank does.
        board_host: As given.
        answers: Whether the board has answered the last question in time.
    """

    def __init__(
        self,
        watch: Watch,
        board: Board,
        *,
        ranks: Sequence[int],
        rank: int,
        patience: float,
        world_size: int,
        interrupt: Callable[[], None],
        board_host: int | None = None,
        device_waits: bool = False,
    ) -> None:
        self.watch, self._board, self._ranks, self._rank = watch, board, ranks, rank
        self.board_host, self.answers, self._device_waits = board_host, True, device_waits
        self._patience, self._pause, self._interrupt = patience, max(_TICK, world_size / _ASKS), interrupt
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._state: object = None
        self._since = self._known_since = self._next_look = time.monotonic()
        self._spoken = 0
        self._processor: tuple[float, float] | None = None
        self._gone = False  # the board

    def start(self) -> None:
        """Begins; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="torchdistpackage-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, if it is not in the middle of something that does not end."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._requests.put(None)
            thread.join(1.0)

    @property
    def waited(self) -> float:
        """Seconds for which the step has not moved, as far as the last look knows."""
        return time.monotonic() - self._since if self._state == self._now() else 0.0

    def publish(self, report: FailureReport) -> None:
        """Leaves a report on the board, or gives up after a moment."""
        epoch = self.watch.epoch
        self._ask(lambda: self._board.publish(epoch, report))

    def look(self) -> None:
        """Looks at the board now: a report is then with the watch."""
        self._ask(self._find)

    def said(self, ranks: Sequence[int]) -> dict[int, Doing]:
        """What those of these global ranks that do not move have said of it."""
        epoch = self.watch.epoch
        found = self._ask(lambda: self._board.said(epoch, ranks)) or {}
        return {rank: Doing(**json.loads(text)) for rank, text in found.items()}

    def _ask(self, function: Callable[[], Any]) -> Any:
        if self._gone:
            return None
        self.start()
        answer: Future[Any] = Future()
        self._requests.put((function, answer))
        try:
            return answer.result(_ANSWER if self.answers else _ANSWER / 10)
        except (FutureTimeoutError, RuntimeError, ValueError):  # its host is stopped, or gone
            self.answers = False
            return None

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        due = time.monotonic() + _TICK
        while True:
            with contextlib.suppress(queue.Empty):
                request = self._requests.get(timeout=max(0.0, due - time.monotonic()))
                if request is None:
                    return
                function, answer = request
                try:
                    answer.set_result(self._of_the_board(function))
                except Exception as error:
                    answer.set_exception(error)
            if time.monotonic() < due:
                continue
            try:
                self._look_around()
            except Exception:  # whatever it was, the next look may find the failure that ends a wait
                _log.exception("the watchdog of global rank %d could not look around", self._ranks[self._rank])
            due = time.monotonic() + _TICK

    def _of_the_board(self, function: Callable[[], Any]) -> Any:
        """Asks the board; this thread waits for it as long as it takes."""
        try:
            result = function()
        except (RuntimeError, ValueError):
            self.answers, self._gone = False, True  # with its host; messages still tell
            raise
        self.answers = True
        return result

    def _look_around(self) -> None:
        watch, now, state = self.watch, time.monotonic(), self._now()
        if state != self._state:
            if self._spoken:
                self._say("")
            self._state, self._since, self._spoken, self._processor = state, now, 0, None
        inside, waited = watch.at is not None, now - self._since
        known = watch.report is not None
        if not known and now >= self._next_look and (waited > 0 or not inside):
            self._next_look = now + self._pause
            self._find_quietly()
            self._known_since = now
        if not inside:
            if known and self._device_waits and now - self._known_since > _GRACE:
                self._close_groups()
        elif known:
            self._end_wait(now)
        elif waited >= self._patience * 2**self._spoken:
            self._speak(waited)

    def _now(self) -> object:
        watch = self.watch
        return (watch.epoch, watch.step, watch.at, watch.awaits)

    def _find(self) -> None:
        epoch = self.watch.epoch
        report = self._board.find(epoch)
        if report is not None:
            self.watch.tell(epoch, report)

    def _find_quietly(self) -> None:
        if not self._gone:
            with contextlib.suppress(RuntimeError, ValueError):
                self._of_the_board(self._find)

    def _end_wait(self, now: float) -> None:
        """Closes the groups if a step that has failed does not end by itself."""
        if now - self._known_since < _GRACE:
            return
        frame = self._frame()
        if frame is None or not frame.f_code.co_filename.startswith(_LIBRARIES):
            if not self._spoken:
                self._spoken = 1
                _log.warning("%s, and the step has failed meanwhile: it will raise when it is back", self._here())
            return
        before, self._processor = self._processor, (now, self._processor_time())
        if before is None:
            return
        computing = self._processor[1] - before[1] > _IDLE * (now - before[0])
        if computing and not torch.cuda.is_available():  # a host that waits for its device looks as if it computed
            return
        self._close_groups()

    def _close_groups(self) -> None:
        if not self.watch.interrupted:
            self.watch.interrupted = True
            _log.warning("%s: the step has failed, and its waits are ended by closing process groups", self._here())
            self._interrupt()

    def _speak(self, waited: float) -> None:
        self._spoken += 1
        text = f"{self._here()}, for {waited:.0f} s now"
        _log.warning("%s%s", text, self._stack() if self.watch.awaits < 0 else "")
        at = self.watch.at
        action = str(at.action) if isinstance(at, Instruction) else ""
        self._say(json.dumps({"awaits": self.watch.awaits, "action": action, "text": text}))

    def _say(self, text: str) -> None:
        if not self._gone:
            with contextlib.suppress(RuntimeError, ValueError):
                self._of_the_board(lambda: self._board.say(self.watch.epoch, self._ranks[self._rank], text))

    # --- what the step is doing ---------------------------------------------------------------------------------------

    def _here(self) -> str:
        at, awaits = self.watch.at, self.watch.awaits
        action = f"{at.action} ({at.action.words})" if isinstance(at, Instruction) else str(at)
        who = f"rank {self._rank} of the pipeline (global rank {self._ranks[self._rank]})"
        if awaits >= 0:
            place = f"rank {self._ranks.index(awaits)}, " if awaits in self._ranks else ""
            return f"{who} waits for {place}global rank {awaits}, at {action}"
        frame = self._frame()
        while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        code = "" if frame is None else f", in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        return f"{who} is at {action}{code}"

    def _stack(self) -> str:
        frame = self._frame()
        return "" if frame is None else "\n" + "".join(traceback.format_stack(frame))

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self.watch.thread)

    def _processor_time(self) -> float:
        """Seconds that the step's thread has computed so far."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        try:
            return time.clock_gettime(time.pthread_getcpuclockid(self.watch.thread))
        except OSError:
            return 0.0
