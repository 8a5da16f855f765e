"""`test_comm`: does every group and every pipeline link of the topology work, and how fast is it?

Run it right after `tpc.setup_process_groups`: a wrong network interface shows here, by name and in seconds, and not as
a hang in step 1. The check goes in rounds. In round 0 every rank only says that it is there. Then each round tests
things that do not share a rank: all groups of one mode, or every second link of all pipelines in one direction::

    round    0 roll call    1 global    2 data    3 pipe    4: 0->1 2->3    5: 1->0 3->2    6: 1->2 3->0    7: 2->1 0->3

After each round the ranks tell global rank 0 what failed, and it tells all the verdict, over the key-value store that
torch.distributed was started with: the store does not depend on the links under test. So all ranks raise the same.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from torchdistpackage.errors import TopologyError, TransportError
from torchdistpackage.topology.context import ParallelContext, tpc
from torchdistpackage.topology.process_groups import communication_device, initialised_world

__all__ = ["CommReport", "CommRow", "test_comm"]

_logger = logging.getLogger(__name__)
_SLACK = timedelta(seconds=5)  # for the key-value store itself
_calls = 0  # keys in the store must be new at every call; every rank counts alike


@dataclass(frozen=True)
class CommRow:
    """One measurement.

    Attributes:
        name: the group or link, with its global ranks.
        operation: "all_reduce", "all_gather", "broadcast" or "send".
        num_bytes: size of the large message.
        latency_us: microseconds of one operation on one element.
        bandwidth_gb_s: `num_bytes` over the time of one operation, in 1e9 bytes a second.
    """

    name: str
    operation: str
    num_bytes: int
    latency_us: float
    bandwidth_gb_s: float


@dataclass(frozen=True)
class CommReport:
    """What `test_comm` measured, the same on every rank; `str(report)` is a table.

    Attributes:
        rows: one a group and operation, then one a link and direction.

    Example:
        >>> group = CommRow("group pipe (global ranks 0, 1)", "all_reduce", 4194304, 55.1, 2.405)
        >>> link = CommRow("link pipe 0 -> 1 (global ranks 0 -> 1)", "send", 4194304, 27.3, 4.31)
        >>> print(CommReport((group, link)))
        what                                    operation     bytes  latency us  bandwidth GB/s
        group pipe (global ranks 0, 1)          all_reduce  4194304        55.1           2.405
        link pipe 0 -> 1 (global ranks 0 -> 1)  send        4194304        27.3           4.310
    """

    rows: tuple[CommRow, ...]

    def __str__(self) -> str:
        """An aligned table, one measurement a line."""
        header = ("what", "operation", "bytes", "latency us", "bandwidth GB/s")
        cells = [
            (row.name, row.operation, str(row.num_bytes), f"{row.latency_us:.1f}", f"{row.bandwidth_gb_s:.3f}")
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
        aligned = [
            [
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            for line in [header, *cells]
        ]
        return "\n".join("  ".join(line).rstrip() for line in aligned)


@dataclass(frozen=True)
class _Check:
    """What this rank does in a round: `run` raises if it is broken, and gives the rows that this rank reports."""

    name: str
    run: Callable[[], list[CommRow]]


@dataclass(frozen=True)
class _Setting:
    numel: int
    iterations: int
    timeout: timedelta


def test_comm(
    numel: int = 1 << 16, iterations: int = 5, *, timeout: float = 30.0, context: ParallelContext = tpc
) -> CommReport:
    """Check every group and every link between pipeline neighbours, with verified contents. Every rank calls it.

    Before any `tpc.setup_process_groups` it checks the world alone.

    Args:
        numel: elements (int32) of the large message.
        iterations: repetitions of each operation for the timing.
        timeout: seconds that one operation, or a missing rank, is waited for.
        context: the topology to check.

    Returns:
        Latency and bandwidth of each group and link; logged at INFO on global rank 0.

    Example:
        >>> print(test_comm(numel=1 << 20))  # on every rank; see `CommReport` for the table  # doctest: +SKIP

    Raises:
        TopologyError: torch.distributed is not initialised, or a size is below 1.
        TransportError: on every rank, with the name of each broken group or link. The groups may be unusable then.
    """
    if numel < 1 or iterations < 1 or timeout <= 0:
        raise TopologyError(f"numel, iterations and timeout must be positive, got {numel}, {iterations}, {timeout}")
    initialised_world()
    setting = _Setting(numel, iterations, timedelta(seconds=timeout))
    court = _Court(setting.timeout)
    court.verdict("roll call", [], [])
    rows: list[CommRow] = []
    for title, check in _rounds(context, setting):
        failures, measured = [], []
        if check is not None:
            try:
                measured = check.run()
            except Exception as error:  # torch raises RuntimeError and its children, and what the verification raises
                failures.append(f"{check.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        rows.extend(court.verdict(title, failures, measured))
    report = CommReport(tuple(rows))
    if dist.get_rank() == 0:
        _logger.info("test_comm: all groups and links work\n%s", report)
    return report


test_comm.__test__ = False  # type: ignore[attr-defined]  # pytest takes any function called test_* for a test


class _Court:
    """Agrees on the outcome of each round over the store, with rank 0 as the judge."""

    def __init__(self, timeout: timedelta) -> None:
        global _calls
        _calls += 1
        # The only channel besides the groups under test; torch has no public name for it.
        self._store = dist.distributed_c10d._get_default_store()
        self._prefix = f"torchdistpackage/test_comm/{_calls}"
        self._timeout = timeout
        self._round = -1

    def verdict(self, title: str, failures: list[str], rows: list[CommRow]) -> list[CommRow]:
        """Hand in what this rank saw; returns the rows of all ranks, or raises the same error on all ranks."""
        self._round += 1
        key = f"{self._prefix}/{self._round}"
        rank = dist.get_rank()
        try:
            self._store.set(f"{key}/{rank}", json.dumps([failures, [astuple(row) for row in rows]]))
            if rank == 0:
                self._judge(key)
            all_failures, all_rows = self._receive(title, key)
        except dist.DistError as error:
            raise TransportError(f"{title}: the key-value store at global rank 0 is gone: {error}") from error
        if all_failures:
            raise TransportError("communication check failed:\n  " + "\n  ".join(all_failures))
        return [CommRow(*row) for row in all_rows]

    def _receive(self, title: str, key: str) -> tuple[list[str], list[Any]]:
        limit = self._limit()
        if not self._await(f"{key}/0", limit):
            raise TransportError(f"{title}: global rank 0 did not take part within {limit.total_seconds():g} s")
        if not self._await(f"{key}/verdict", limit + _SLACK):  # rank 0 waits for the others from now on
            raise TransportError(f"{title}: global rank 0 gave no verdict within {limit.total_seconds():g} s")
        failures, rows = json.loads(self._store.get(f"{key}/verdict"))
        return failures, rows

    def _limit(self) -> timedelta:
        """How late a rank may be: in the roll call one time-out, later another one for an operation of its own."""
        return self._timeout if self._round == 0 else 2 * self._timeout

    def _judge(self, key: str) -> None:
        failures: list[str] = []
        rows: list[Any] = []
        limit = self._limit().total_seconds()
        deadline = time.monotonic() + limit
        for rank in range(dist.get_world_size()):
            if not self._await(f"{key}/{rank}", timedelta(seconds=max(0.01, deadline - time.monotonic()))):
                failures.append(f"global rank {rank} did not take part within {limit:g} s")
                continue
            its_failures, its_rows = json.loads(self._store.get(f"{key}/{rank}"))
            failures.extend(f"{failure} (seen by global rank {rank})" for failure in its_failures)
            rows.extend(its_rows)
        self._store.set(f"{key}/verdict", json.dumps([failures, rows]))

    def _await(self, key: str, timeout: timedelta) -> bool:
        try:
            self._store.wait([key], timeout)
        except dist.DistStoreError:  # the time-out; a broken connection is a DistNetworkError
            return False
        return True


def _rounds(context: ParallelContext, setting: _Setting) -> Iterator[tuple[str, _Check | None]]:
    """The rounds after the roll call, equally many on every rank; None where this rank has nothing to do."""
    modes = context.modes if context._is_inited("global") else ("global",)
    for mode in sorted(modes, key=lambda mode: mode != "global"):
        ranks = list(range(dist.get_world_size())) if mode == "global" else context.get_ranks_in_group(mode)
        if len(ranks) > 1:
            listed = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
            name = f"group {mode} (global ranks {listed})"
            group = None if mode == "global" else context.get_group(mode)
            yield name, _Check(name, partial(_check_group, group, ranks, name, setting))
    if context.is_mode_inited("pipe"):
        yield from _link_rounds(context, setting)


def _link_rounds(context: ParallelContext, setting: _Setting) -> Iterator[tuple[str, _Check | None]]:
    """Links i -> i+1, the last rank's leading to the first, coloured so that links of a round share no rank."""
    group, ranks = context.get_group("pipe"), context.get_ranks_in_group("pipe")
    size = len(ranks)
    starts = range(size if size > 2 else 1)
    colours = [2 if size % 2 and start == size - 1 else start % 2 for start in starts]
    for colour in sorted(set(colours)):
        pairs = [(start, (start + 1) % size) for start in starts if colours[start] == colour]
        for edges in (pairs, [(end, start) for start, end in pairs]):
            check = None
            for source, target in edges:
                if context.get_pp_rank() in (source, target):
                    edge = (ranks[source], ranks[target])
                    name = f"link pipe {source} -> {target} (global ranks {edge[0]} -> {edge[1]})"
                    check = _Check(name, partial(_check_link, group, edge, name, setting))
            yield "links " + ", ".join(f"{source} -> {target}" for source, target in edges), check


def _check_group(group: dist.ProcessGroup | None, ranks: list[int], name: str, setting: _Setting) -> list[CommRow]:
    """All-reduce, all-gather and broadcast, each compared with what it must give."""
    device, index = communication_device(group), ranks.index(dist.get_rank())
    rows = []
    operations: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
        "all_reduce": partial(_all_reduce, group, setting.timeout),
        "all_gather": partial(_all_gather, group, len(ranks), setting.timeout),
        "broadcast": partial(_broadcast, group, ranks[0], setting.timeout),
    }
    for operation, run in operations.items():
        numel = max(1, setting.numel // len(ranks)) if operation == "all_gather" else setting.numel
        patterns = [
            _pattern(place, numel, device) for place in (range(len(ranks)) if operation == "all_gather" else [0])
        ]
        if operation == "all_reduce":
            total = len(ranks) * (len(ranks) - 1) // 2
            patterns = [len(ranks) * _pattern(0, numel, device) + total]
        for received, expected in zip(run(_pattern(index, numel, device)), patterns, strict=True):
            _verify(operation, received, expected)
        rows.append(_measure(name, operation, run, numel, device, setting))
    return rows if index == 0 else []


def _check_link(group: dist.ProcessGroup | None, edge: tuple[int, int], name: str, setting: _Setting) -> list[CommRow]:
    """A message from one global rank to another, compared on arrival."""
    device, (source, target) = communication_device(group), edge
    sends = dist.get_rank() == source

    def transfer(message: torch.Tensor) -> list[torch.Tensor]:
        work = dist.isend(message, target, group) if sends else dist.irecv(message, source, group)
        _wait(work, setting.timeout)
        return [message]

    message = _pattern(source, setting.numel, device)
    received = transfer(message if sends else torch.full_like(message, -1))[0]
    _verify("send", received, message)
    row = _measure(name, "send", transfer, setting.numel, device, setting)
    return [] if sends else [row]


def _all_reduce(group: dist.ProcessGroup | None, timeout: timedelta, message: torch.Tensor) -> list[torch.Tensor]:
    _wait(dist.all_reduce(message, group=group, async_op=True), timeout)
    return [message]


def _all_gather(
    group: dist.ProcessGroup | None, size: int, timeout: timedelta, message: torch.Tensor
) -> list[torch.Tensor]:
    parts = [torch.empty_like(message) for _ in range(size)]
    _wait(dist.all_gather(parts, message, group=group, async_op=True), timeout)
    return parts


def _broadcast(
    group: dist.ProcessGroup | None, source: int, timeout: timedelta, message: torch.Tensor
) -> list[torch.Tensor]:
    _wait(dist.broadcast(message, source, group=group, async_op=True), timeout)
    return [message]


def _wait(work: dist.Work | None, timeout: timedelta) -> None:
    """Wait for one operation, and for no longer than `timeout`, whatever the group's own time-out is."""
    if work is not None:
        work.wait(timeout)


def _pattern(seed: int, numel: int, device: torch.device) -> torch.Tensor:
    """Whole numbers, so that sums are exact; no two seeds and no two neighbouring places alike."""
    return torch.arange(numel, dtype=torch.int32, device=device) % 251 + seed


def _verify(operation: str, received: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = int((received != expected).sum())
    if wrong:
        raise TransportError(f"{operation} delivered {wrong} wrong values of {expected.numel()}")


def _measure(
    name: str,
    operation: str,
    run: Callable[[torch.Tensor], object],
    numel: int,
    device: torch.device,
    setting: _Setting,
) -> CommRow:
    """Time one element, then the large message. What is sent is zeros: sums cannot overflow."""
    seconds = []
    for message in (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(numel, dtype=torch.int32, device=device),
    ):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(setting.iterations):
            run(message)
        _synchronize(device)
        seconds.append((time.perf_counter() - start) / setting.iterations)
    num_bytes = numel * 4
    return CommRow(name, operation, num_bytes, seconds[0] * 1e6, num_bytes / seconds[1] / 1e9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
