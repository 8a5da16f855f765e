"""A job in a thread of its own, beside the steps, and the copies that it writes from.

::

    save()      copies what this rank will write to host memory, starts the thread, returns
    thread      writes, hashes, renames
    next save, wait, close      waits for the thread, and raises what it has met

The thread is no daemon: an interpreter that ends waits for it, so that a run that ends right after a save has saved.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["Background", "HostCopies"]

_logger = logging.getLogger(__name__)


@final
class Background:
    """At most one job at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Starts a job; the one before has been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by `wait`
                self._error = error
                _logger.error("%s failed: %s", name, error)

        self._thread = threading.Thread(target=run, name=name, daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the job.

        Raises:
            BaseException: What the job has raised, once.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


@final
class HostCopies:
    """Copies of tensors in host memory, which a thread may read while steps go on.

    Of a CUDA tensor the memory is pinned, which makes the copy several times as fast, and is used again by the next
    save; pinning takes longer than copying.
    """

    def __init__(self) -> None:
        self._pinned: list[Tensor | None] = []

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies; all done when it returns."""
        if len(self._pinned) != len(tensors):
            self._pinned = [None] * len(tensors)
        found, devices = [], set()
        for number, tensor in enumerate(tensors):
            if tensor.device.type != "cuda":
                found.append(tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
                continue
            memory = self._pinned[number]
            if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
                memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._pinned[number] = memory
            memory.copy_(tensor.detach(), non_blocking=True)
            devices.add(tensor.device)
            found.append(memory)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return found
