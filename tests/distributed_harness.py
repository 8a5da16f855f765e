"""Runs one function as several ranks, each in a process of its own; every multi-process test goes through here.

The test's function is module-level and takes `(rank, world_size, *args)`. It starts torch.distributed itself (for
example with `setup_distributed()`): the harness only provides what torchrun would, the environment::

    def sum_of_ranks(rank: int, world_size: int, scale: int) -> float:
        dist.init_process_group("gloo")
        value = torch.tensor(float(rank * scale))
        dist.all_reduce(value)
        return value.item()


    def test_sum() -> None:
        assert run_distributed(sum_of_ranks, 3, 10, timeout=30) == [30.0, 30.0, 30.0]

What it promises:

* No process outlives the call, whatever happens: ranks are killed, not asked, and die with the test process too.
* No rank leaves while another still works (rank 0 holds the key-value store), so a quick rank cannot break a slow one.
* A failure is an `AssertionError` with every rank's traceback; a rank that hangs shows the stack it hangs in.

Where the platform has it, ranks are forked from a fork server that has imported torch, this package and what else
ranks often use (`rank_preload.py`), and has done nothing with it: a rank starts in 0.1 s instead of the 3 s of CPU time
that `import torch` takes. `start_method="spawn"` gives the slow, plainer way.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the fork server imports torch

GRACE = 2.0
"""Seconds that the other ranks have to report once one has failed."""

_HAS_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    may_die: Collection[int] = (),
    start_method: str = "forkserver" if _HAS_FORK_SERVER else "spawn",
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` processes and return the results in rank order.

    Args:
        function: module-level (picklable); so are `args` and the results. Tensors travel by value.
        world_size: number of processes, all on this machine.
        args: the same for every rank.
        timeout: seconds for everything, start-up included.
        env: extra environment variables for every rank; None as a value removes the variable.
        may_die: ranks that are allowed to end or hang without a result, which then is None: for tests that kill or
            stop a rank on purpose. They are not waited for once the others have reported.
        start_method: "forkserver" (quick) or "spawn".

    Raises:
        AssertionError: a rank raised, died or did not end in time. The text has each rank's traceback or stack.
    """
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, f"stack{rank}") for rank in range(world_size)]
        ranks = _start(work, _environments(world_size, env or {}), stacks, start_method)
        try:
            reports = _collect(ranks, time.monotonic() + timeout, frozenset(may_die))
            failed = [
                rank
                for rank, report in enumerate(reports)
                if (report is None or report[0] != "ok") and rank not in may_die
            ]
            if failed:
                raise AssertionError(_describe(function, ranks, reports, stacks, timeout))
            for _, connection in ranks:
                _release(connection)
            for process, _ in ranks:
                process.join(timeout=0.5)
        finally:
            for process, connection in ranks:
                process.kill()
                process.join()
                process.close()
                connection.close()
    return [report[1] if report is not None and report[0] == "ok" else None for report in reports]


def _environments(world_size: int, extra: Mapping[str, str | None]) -> list[dict[str, str]]:
    """For every rank: this process's environment, what torchrun would set, and the caller's wishes."""
    common = dict(os.environ)
    common |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_quiet_port())}
    common |= {"OMP_NUM_THREADS": "1"}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        common.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo else looks the host name up: slow, or impossible
    everything: list[dict[str, str | None]] = [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **extra} for rank in range(world_size)
    ]
    return [{name: value for name, value in one.items() if value is not None} for one in everything]


def _quiet_port() -> int:
    """A free port outside the range from which the kernel serves other sockets, so that nobody takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _start(
    work: bytes, environments: list[dict[str, str]], stacks: list[Path], start_method: str
) -> list[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        _start_fork_server()
    ranks: list[tuple[BaseProcess, Connection]] = []
    for rank, environment in enumerate(environments):
        ours, theirs = context.Pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=_rank_main,
            args=(rank, len(environments), work, environment, str(stacks[rank]), theirs),
            daemon=True,
        )
        process.start()
        theirs.close()  # else the end of the process would not close the pipe
        ranks.append((process, ours))
    return ranks


def _start_fork_server() -> None:
    """Once, and with this process's import path, so that its modules are the ones that the ranks would import."""
    wishes = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in wishes}
    os.environ.update(wishes)
    try:
        forkserver.set_forkserver_preload(["rank_preload"])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _collect(
    ranks: list[tuple[BaseProcess, Connection]], deadline: float, may_die: frozenset[int]
) -> list[tuple[str, Any] | None]:
    """One report a rank: ("ok", result), ("raised", traceback), ("died", exit code), or None when it was too late."""
    reports: list[tuple[str, Any] | None] = [None] * len(ranks)
    open_ranks = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while any(rank not in may_die for rank in open_ranks.values()) and time.monotonic() < deadline:
        for ready in wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(ready, Connection)
            rank = open_ranks.pop(ready)
            try:
                kind, value = pickle.loads(ready.recv_bytes())
            except (EOFError, ConnectionError):
                ranks[rank][0].join(timeout=1.0)
                kind, value = "died", ranks[rank][0].exitcode
            reports[rank] = (kind, value)
            if kind != "ok" and rank not in may_die:
                deadline = min(deadline, time.monotonic() + GRACE)
    return reports


def _describe(
    function: Callable[..., Any],
    ranks: list[tuple[BaseProcess, Connection]],
    reports: list[tuple[str, Any] | None],
    stacks: list[Path],
    timeout: float,
) -> str:
    """The failure as text: for each rank its result, its traceback, its exit code, or where it hangs now."""
    hung = [rank for rank, report in enumerate(reports) if report is None]
    for rank in hung:
        pid = ranks[rank][0].pid
        if pid is not None and ranks[rank][0].is_alive() and stacks[rank].exists():
            os.kill(pid, signal.SIGUSR1)  # faulthandler writes the stacks; see _rank_main
    if hung:
        time.sleep(0.3)
    parts = [f"{getattr(function, '__name__', function)} failed on {len(ranks)} ranks (time-out {timeout:g} s)"]
    for rank, report in enumerate(reports):
        if report is None:
            stack = stacks[rank].read_text() if stacks[rank].exists() else "(not started)"
            parts.append(f"--- rank {rank} had not ended, it was here:\n{stack}")
        elif report[0] == "ok":
            parts.append(f"--- rank {rank} returned {report[1]!r:.500}")
        elif report[0] == "raised":
            parts.append(f"--- rank {rank} raised:\n{report[1]}")
        else:
            parts.append(f"--- rank {rank} died with exit code {report[1]}")
    return "\n".join(parts)


def _release(connection: Connection) -> None:
    try:
        connection.send_bytes(b"go")
    except OSError:
        pass  # a rank that was allowed to die


def _rank_main(
    rank: int, world_size: int, work: bytes, environment: dict[str, str], stack: str, connection: Connection
) -> None:
    """The life of a rank: set up, call, report, and stay until every rank has reported."""
    os.environ.clear()  # a fork server's child has the environment of the first test, not of this one
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(stack, "w") as stack_file:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        connection.send_bytes(_call(work, rank, world_size))
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            pass
        _leave()


def _call(work: bytes, rank: int, world_size: int) -> bytes:
    """The pickled report of one call."""
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(work)
        return pickle.dumps(("ok", function(rank, world_size, *args)))
    except BaseException:  # SystemExit and pytest's outcomes (Failed, Skipped) are failures of a rank as well
        return pickle.dumps(("raised", traceback.format_exc()))


def _leave() -> None:
    """End without the interpreter's shutdown, which may wait for threads of a group whose peers are gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
