"""A stop watch that is pressed whenever another module takes over; each press says who had the time since the last.

::

    root starts        fc starts        fc ends          root ends
        |---- root ----|---- fc --------|---- root ------|

Nothing is counted twice, and whatever is not inside a module's own submodules is the module's own. On a CUDA device a
press records an event instead of reading the clock, so that the device is never waited for while the model runs; the
times are those of the device, in which waiting for the next kernel counts as well. Several devices, or one of another
kind, are waited for at every press.

Why not torch.profiler: its ranges measure each operation at the price of several microseconds an operation, which would
be most of what small modules cost, and its memory is what is allocated meanwhile, not what is kept for the backward
pass.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Hashable
from typing import final

import torch

__all__ = ["Laps"]


@final
class Laps:
    """Presses, and the seconds that they make.

    Args:
        devices: What computes besides the CPU.

    Example:
        >>> laps = Laps()
        >>> laps.press(None)
        >>> laps.press("fc")
        >>> list(laps.seconds()), list(laps.seconds())
        (['fc'], [])
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        self._devices = devices
        self._by_events = [device.type for device in devices] == ["cuda"]
        self._presses: list[tuple[Hashable, float | torch.cuda.Event]] = []

    def press(self, owner: Hashable) -> None:
        """The time since the last press was the owner's; nobody's, if it is None."""
        if self._by_events:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            (device,) = self._devices
            event.record(torch.cuda.current_stream(device))
            self._presses.append((owner, event))
            return
        for device in self._devices:
            torch.accelerator.synchronize(device)
        self._presses.append((owner, time.perf_counter()))

    def seconds(self) -> dict[Hashable, float]:
        """The sums by owner; starts anew. On CUDA it waits for the last press."""
        presses, self._presses = self._presses, []
        if presses and isinstance(presses[-1][1], torch.cuda.Event):
            presses[-1][1].synchronize()
        sums: dict[Hashable, float] = {}
        for (_, start), (owner, end) in itertools.pairwise(presses):
            if owner is not None:
                sums[owner] = sums.get(owner, 0.0) + _between(start, end)
        return sums


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
