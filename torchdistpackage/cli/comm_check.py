"""comm-check: does every link between the ranks work, and how fast is it?

Under torchrun or srun it runs in place, one rank a process. Started by hand it starts processes on this machine::

    torchdistpackage comm-check --nproc 2 ---- rank 0, prints the table
                                          `--- rank 1
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

import click

from torchdistpackage.cli.output import one_message
from torchdistpackage.errors import TorchDistError, TransportError

if TYPE_CHECKING:
    from torchdistpackage.topology.comm_check import CommReport

__all__ = ["comm_check"]


@dataclass(frozen=True)
class _Setting:
    backend: str | None
    pipe: int | None
    numel: int
    iterations: int
    timeout: float


@click.command("comm-check")
@click.option("--nproc", type=click.IntRange(1), help="Start so many processes here.  [default: one a GPU, at least 2]")
@click.option("--backend", help="gloo or nccl.  [default: nccl where there are GPUs, else gloo]")
@click.option(
    "--pipe", type=click.IntRange(1), help="Ranks of one pipeline; the rest is data parallel.  [default: all]"
)
@click.option("--numel", type=click.IntRange(1), default=1 << 16, show_default=True, help="int32 numbers in a message.")
@click.option("--iterations", type=click.IntRange(1), default=5, show_default=True, help="Repetitions for the timing.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds that a lost rank is waited for.")
@one_message
def comm_check(
    nproc: int | None, backend: str | None, pipe: int | None, numel: int, iterations: int, timeout: float
) -> None:
    """Test every group and every link between pipeline neighbours, with verified contents, and print how fast it is.

    Exits with 1 and names what is broken if anything is.

    \b
    torchdistpackage comm-check --nproc 2 --backend gloo
    torchrun --nnodes 2 --nproc-per-node 8 ... --no-python torchdistpackage comm-check --pipe 4
    srun torchdistpackage comm-check
    """  # noqa: D301
    setting = _Setting(backend, pipe, numel, iterations, timeout)
    try:
        if nproc is not None:
            _show(_started_here(setting, nproc))
        elif not _in_place(setting):
            _show(_started_here(setting, _gpus_or_two()))
    except TorchDistError:
        raise
    except BrokenProcessPool:
        raise TransportError("a process of the check died; try another --backend or fewer processes") from None
    except RuntimeError as error:  # what torch raises: no connection, no such backend
        raise TransportError(str(error).strip().splitlines()[0]) from None


def _show(report: CommReport) -> None:
    click.echo(f"{report}\nall groups and links work" if report.rows else "one rank has no links: nothing to check")


def _in_place(setting: _Setting) -> bool:
    """Takes part as one rank if a launcher started this process with others; else says False."""
    import torch.distributed as dist

    from torchdistpackage.topology import setup_distributed

    world_size = setup_distributed(setting.backend, timeout=setting.timeout).world_size
    try:
        if world_size > 1:
            report = _check(setting, world_size)
            if dist.get_rank() == 0:
                _show(report)
    finally:
        dist.destroy_process_group()
    return world_size > 1


def _check(setting: _Setting, world_size: int) -> CommReport:
    from torchdistpackage.topology import test_comm, tpc

    pipe = world_size if setting.pipe is None else setting.pipe
    if world_size % pipe:
        raise TransportError(f"{world_size} ranks are not pipelines of {pipe}; choose --pipe so that it divides")
    tpc.setup_process_groups([("data", world_size // pipe), ("pipe", pipe)], timeout=setting.timeout)
    return test_comm(setting.numel, setting.iterations, timeout=setting.timeout)


def _gpus_or_two() -> int:
    import torch

    return max(2, torch.cuda.device_count())


def _started_here(setting: _Setting, nproc: int) -> CommReport:
    """Runs one rank in each of `nproc` new processes; raises what the first of them raised."""
    from torchdistpackage.topology import find_free_port

    port = find_free_port()
    with ProcessPoolExecutor(nproc, mp_context=get_context("spawn")) as pool:
        ranks = [pool.submit(_one_rank, rank, nproc, port, setting) for rank in range(nproc)]
        reports = [rank.result() for rank in ranks]
    return reports[0]


def _one_rank(rank: int, nproc: int, port: str, setting: _Setting) -> CommReport:
    """The whole life of a process that was started here."""
    import torch.distributed as dist

    from torchdistpackage.topology import setup_distributed

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}})
    setup_distributed(setting.backend, timeout=setting.timeout)
    try:
        return _check(setting, nproc)
    finally:
        dist.destroy_process_group()
