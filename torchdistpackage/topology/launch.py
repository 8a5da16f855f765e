"""Starts torch.distributed from whatever started this process: torchrun, SLURM's srun, or a plain `python train.py`.

The only file of the library that reads environment variables. What is looked for, in this order:

=========  =======================================================================================================
torchrun   RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (and LOCAL_RANK); wins when it is complete
SLURM      SLURM_PROCID, SLURM_NTASKS, SLURM_NODELIST (and SLURM_LOCALID); MASTER_ADDR and MASTER_PORT overrule it
none       one process: rank 0 of 1 at 127.0.0.1 and a free port
=========  =======================================================================================================
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.context import tpc
from torchdistpackage.topology.process_groups import as_timedelta

__all__ = ["DEFAULT_SLURM_PORT", "Launch", "find_free_port", "setup_distributed", "store_host"]

DEFAULT_SLURM_PORT = 54647
"""All nodes of a SLURM job must know the port without talking, so it is a constant."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_logger = logging.getLogger(__name__)
_started: _Started | None = None


class Launch(NamedTuple):
    """What `setup_distributed` found; unpacks as `rank, world_size, port, addr`.

    Attributes:
        rank: global rank of this process.
        world_size: number of processes.
        port: of the key-value store on rank 0.
        addr: host name or address of rank 0.
    """

    rank: int
    world_size: int
    port: int
    addr: str


@dataclass(frozen=True)
class _Plan:
    """A launch before it happens; `local_rank` is None where the launcher does not say."""

    launch: Launch
    local_rank: int | None
    source: str


@dataclass(frozen=True)
class _Started:
    launch: Launch
    timeout: timedelta | None


def setup_distributed(
    backend: str | None = None, port: int | str | None = None, timeout: timedelta | float | None = None
) -> Launch:
    """Initialise torch.distributed for this process and choose its GPU, if there are any.

    Args:
        backend: "nccl", "gloo" or for example "cpu:gloo,cuda:nccl"; by default nccl where CUDA is, else gloo.
        port: of the key-value store; wins over MASTER_PORT, but not under torchrun, whose store runs already.
        timeout: of operations in the world group, as a timedelta or in seconds; None for torch's default.

    Returns:
        `(rank, world_size, port, addr)`. Under SLURM, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are
        exported as well, for other libraries. A second call changes nothing and returns the same.

    Example:
        >>> rank, world_size, port, addr = setup_distributed()  # doctest: +SKIP

    Raises:
        TopologyError: the launcher's variables are incomplete or not numbers, the backend is unknown or needs a GPU
            and there is none, or torch.distributed runs already in another way than asked.
    """
    global _started
    seconds = as_timedelta(timeout)
    wanted_port = None if port is None else _number("port", str(port))
    if dist.is_initialized():
        return _already_running(backend, wanted_port, seconds)
    tpc.reset()  # a former world's groups would keep its store, and so the port, alive
    backend = backend or ("nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
    _check_backend(backend)
    plan = _find_launch(os.environ, wanted_port)
    rank, world_size, store_port, addr = plan.launch
    if torch.cuda.is_available():
        local_rank = rank if plan.local_rank is None else plan.local_rank
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if plan.source == "slurm":
        _export(plan)
    store = _agents_store(plan.launch, seconds) if plan.source == "torchrun" and _agent_has_the_store() else None
    host = f"[{addr}]" if ":" in addr else addr
    dist.init_process_group(
        backend,
        store=store,
        init_method=f"tcp://{host}:{store_port}" if store is None else None,
        rank=rank,
        world_size=world_size,
        timeout=seconds,
    )
    _started = _Started(plan.launch, seconds)
    _logger.debug(
        "rank %d of %d is up (%s, %s, store at %s:%d)", rank, world_size, plan.source, backend, addr, store_port
    )
    return plan.launch


def store_host() -> int | None:
    """The global rank in whose process the key-value store is; None where the launcher has it."""
    return None if _agent_has_the_store() else 0


def find_free_port() -> str:
    """A TCP port that is free on this machine now, as text for MASTER_PORT; another process may take it later.

    Example:
        >>> 0 < int(find_free_port()) < 65536
        True
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def _check_backend(backend: str) -> None:
    names = [part.rpartition(":")[2].lower() for part in backend.split(",")]
    known = [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TopologyError(
            f"backend {backend!r}: torch does not know {', '.join(map(repr, unknown))}; it has {', '.join(known)}, and "
            "takes one for each kind of device, as in 'cpu:gloo,cuda:nccl'"
        )
    if "nccl" in names and not torch.cuda.is_available():
        raise TopologyError(f"backend {backend!r} needs CUDA, and torch sees no GPU here; use backend='gloo'")


def _agent_has_the_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the key-value store is in torchrun's own process, which outlives its workers."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agents_store(launch: Launch, timeout: timedelta | None) -> Any:
    """A part of torchrun's store for these processes alone.

    It serves all restarts: without a prefix a rank would find the addresses of processes that are gone.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    wait = timeout or dist.constants.default_pg_timeout
    client = dist.TCPStore(  # type: ignore[attr-defined]
        launch.addr, launch.port, launch.world_size, is_master=False, timeout=wait
    )
    return dist.PrefixStore(f"attempt_{attempt}", client)  # type: ignore[attr-defined]


def _already_running(backend: str | None, port: int | None, timeout: timedelta | None) -> Launch:
    """The values of the running world, if they are what this call asks for."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if _started is not None and _started.launch[:2] == (rank, world_size):
        launch, running_timeout = _started.launch, _started.timeout
    else:  # somebody else called init_process_group; 0 and "" where the environment does not know
        running_port = os.environ.get("MASTER_PORT", "")
        launch = Launch(
            rank, world_size, int(running_port) if running_port.isdigit() else 0, os.environ.get("MASTER_ADDR", "")
        )
        running_timeout = timeout
    if backend is not None and not _same_backend(backend):
        raise TopologyError(
            f"torch.distributed runs already with {dist.get_backend_config()}, this call asks for backend {backend!r}; "
            "call torch.distributed.destroy_process_group() first, or leave backend out"
        )
    if port is not None and launch.port and port != launch.port and not _agent_has_the_store():
        raise TopologyError(f"torch.distributed runs already at port {launch.port}, and this call asks for {port}")
    if timeout is not None and timeout != running_timeout:
        raise TopologyError(
            f"torch.distributed runs already with time-out {running_timeout}, this call asks for {timeout}"
        )
    return launch


def _same_backend(backend: str) -> bool:
    running = dict(part.split(":") for part in dist.get_backend_config().split(","))
    if ":" in backend:
        return all(running.get(device) == name for device, name in (part.split(":") for part in backend.split(",")))
    return dist.get_backend() == backend or set(running.values()) == {backend}


def _find_launch(environment: Mapping[str, str], port: int | None) -> _Plan:
    """Who started this process, from the environment alone."""
    if not any(name in environment for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID")):
        return _Plan(Launch(0, 1, port if port is not None else int(find_free_port()), "127.0.0.1"), 0, "single")
    needed = [name for name in _TORCHRUN if name != "MASTER_PORT" or port is None]
    missing = [name for name in needed if name not in environment]
    if missing and "SLURM_PROCID" in environment:
        return _slurm_launch(environment, port)
    if missing:
        raise TopologyError(
            f"the launcher's environment is incomplete: {', '.join(missing)} missing; start with torchrun, or set "
            "them all, or unset RANK and WORLD_SIZE for a single process"
        )
    if port is None or _agent_has_the_store(environment):
        port = _variable(environment, "MASTER_PORT")
    rank, world_size = _variable(environment, "RANK"), _variable(environment, "WORLD_SIZE")
    local_rank = _variable(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else None
    return _checked(_Plan(Launch(rank, world_size, port, environment["MASTER_ADDR"]), local_rank, "torchrun"))


def _slurm_launch(environment: Mapping[str, str], port: int | None) -> _Plan:
    nodes = environment.get("SLURM_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    missing = [] if "SLURM_NTASKS" in environment else ["SLURM_NTASKS"]
    missing += [] if nodes or "MASTER_ADDR" in environment else ["SLURM_NODELIST"]
    if missing:
        raise TopologyError(f"SLURM_PROCID is set, but {', '.join(missing)} missing; start the processes with srun")
    addr = environment.get("MASTER_ADDR") or _first_host(nodes)
    if port is None:
        port = _variable(environment, "MASTER_PORT") if "MASTER_PORT" in environment else DEFAULT_SLURM_PORT
    rank, world_size = _variable(environment, "SLURM_PROCID"), _variable(environment, "SLURM_NTASKS")
    local_rank = _variable(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else None
    return _checked(_Plan(Launch(rank, world_size, port, addr), local_rank, "slurm"))


def _checked(plan: _Plan) -> _Plan:
    if not 0 <= plan.launch.rank < plan.launch.world_size:
        raise TopologyError(
            f"the launcher says rank {plan.launch.rank} of {plan.launch.world_size} ranks; ranks are 0 to size - 1"
        )
    return plan


def _export(plan: _Plan) -> None:
    """Give the SLURM launch to libraries that know torchrun's variables only."""
    rank, world_size, port, addr = plan.launch
    local_rank = rank if plan.local_rank is None else plan.local_rank
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": addr,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in values.items()})


def _first_host(nodes: str) -> str:
    """The first host of a SLURM node list: from scontrol, which knows every notation, else by `_expand_nodes`."""
    scontrol = shutil.which("scontrol")
    if scontrol is not None:
        try:
            answer = subprocess.run(
                [scontrol, "show", "hostnames", nodes], capture_output=True, text=True, timeout=10, check=True
            )
            if answer.stdout.split():
                return answer.stdout.split()[0]
        except (OSError, subprocess.SubprocessError) as error:
            _logger.debug("scontrol did not expand %r: %s", nodes, error)
    return _expand_nodes(nodes)[0]


def _expand_nodes(nodes: str) -> list[str]:
    """Host names of a SLURM node list: "node[01-02,07],login" -> node01, node02, node07, login."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[\d,\-]+\])+|[^,]", nodes):
        pieces = re.split(r"\[([\d,\-]+)\]", part)  # text, numbers, text, numbers, ..., text
        choices = [_expand_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        hosts.extend("".join(choice) for choice in itertools.product(*choices))
    if not hosts or any(not host or "[" in host or "]" in host for host in hosts):
        raise TopologyError(f"cannot read the node list {nodes!r}; set MASTER_ADDR to the host of rank 0")
    return hosts


def _expand_numbers(numbers: str) -> list[str]:
    """The numbers of a bracket: "01-03,07" -> 01, 02, 03, 07, with the width of the first."""
    expanded: list[str] = []
    for item in numbers.split(","):
        first, _, last = item.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise TopologyError(f"cannot read the node numbers [{numbers}]; set MASTER_ADDR to the host of rank 0")
        expanded.extend(str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1))
    return expanded


def _variable(environment: Mapping[str, str], name: str) -> int:
    return _number(name, environment[name])


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise TopologyError(f"{name} must be a whole number, got {text!r}") from None
