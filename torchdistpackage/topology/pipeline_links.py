"""How the ranks of a pipeline reach each other, and the replicas of a stage: made while all ranks are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.connections import interrupt
from torchdistpackage.topology.process_groups import edge_groups
from torchdistpackage.topology.rank_table import RankTable
from torchdistpackage.topology.same_host import Door, open_door

__all__ = ["LinkSettings", "PipelineLinks", "RankLinks", "connect"]

_setups = 0


@dataclass(frozen=True)
class LinkSettings:
    """What a set-up asks for.

    Attributes:
        timeout: Of groups that are made; None for the world's.
        same_host: Whether ranks of one machine reach each other past the network.
        watchdog: Seconds after which a rank that does not move says what it is doing.
    """

    timeout: timedelta | float | None = None
    same_host: bool = True
    watchdog: float = 60.0

    def __post_init__(self) -> None:
        if not self.watchdog > 0:
            raise TopologyError(f"watchdog must be a positive number of seconds, got {self.watchdog!r}")


@dataclass(frozen=True)
class RankLinks:
    """How the ranks of one group reach each other.

    Attributes:
        control: Moves CPU tensors.
        door: The way to those on this machine; None where there is none.
    """

    control: dist.ProcessGroup
    door: Door | None


@dataclass(frozen=True)
class PipelineLinks:
    """One rank's links.

    Attributes:
        pipe: To the ranks of its pipeline; None if it is alone.
        replicas: To those that hold the same stages, by mode ("data", "tensor"), where there are any.
        edges: Two more groups of the pipeline, for CUDA messages to a higher and to a lower rank; None without NCCL.
        number: How many set-ups there have been, the same on every rank.
        watchdog: Seconds after which a rank that does not move says what it is doing.
        groups: All groups of the set-up that this rank is in.
    """

    pipe: RankLinks | None
    replicas: Mapping[str, RankLinks]
    edges: tuple[dist.ProcessGroup, dist.ProcessGroup] | None
    number: int
    watchdog: float
    groups: tuple[dist.ProcessGroup, ...]

    @property
    def on_device(self) -> bool:
        """Whether any group runs its collectives on a device, beside the host."""
        return any("cuda:nccl" in dist.get_backend_config(group) for group in self.groups) and torch.cuda.is_available()

    def interrupt(self) -> None:
        """Ends what waits in any group of this set-up, from any thread; they cannot be used again."""
        interrupt(self.groups)


def connect(
    table: RankTable,
    control: Callable[[str], dist.ProcessGroup],
    groups: Mapping[str, dist.ProcessGroup],
    settings: LinkSettings,
) -> PipelineLinks:
    """Makes the links of this rank. Every rank of the world calls it.

    Args:
        table: Who is where.
        control: The group of a mode that moves CPU tensors.
        groups: Those that the set-up has made, by mode.
        settings: What is asked for.
    """
    global _setups
    _setups += 1
    links: dict[str, RankLinks] = {}
    for mode in ("pipe", "data", "tensor"):
        if mode in table.modes and table.size(mode) > 1:
            group = control(mode)
            links[mode] = RankLinks(group, open_door(group, wanted=settings.same_host))
    edges = edge_groups(table, groups["pipe"], settings.timeout) if "pipe" in groups else {}
    known = [*groups.values(), *edges.values(), *(link.control for link in links.values())]
    return PipelineLinks(
        links.pop("pipe", None),
        links,
        (edges["pipe:up"], edges["pipe:down"]) if edges else None,
        _setups,
        settings.watchdog,
        tuple(dict.fromkeys(known)),
    )
