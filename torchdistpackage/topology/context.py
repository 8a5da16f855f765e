"""The topology context `tpc`: this rank's place in every group, for code in a user's training loop.

::

    setup_distributed()
    tpc.setup_process_groups([("data", 2), ("pipe", 4)])
    tpc.get_pp_rank(), tpc.get_group("data"), tpc.is_last_in_pipeline_group()

The arithmetic is in `rank_table.py`, the making of process groups in `process_groups.py`. Only `parallel/`, `trainer/`
and `checkpoint/` read `tpc`; the rooms below them get ranks and groups as arguments.

A dim that the configuration leaves out ("data" in a pipe-only run) has size 1: every rank is its first and its last
member. It has no process group, so `get_group` of it raises. Before any set-up every question raises but
`is_mode_inited`, which says False.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Literal, cast, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology.pipeline_links import LinkSettings, PipelineLinks, connect
from torchdistpackage.topology.process_groups import (
    communication_device,
    control_group,
    create_groups,
    destroy_groups,
    initialised_world,
    moves_cpu_tensors,
    setup_node_groups,
)
from torchdistpackage.topology.rank_table import STANDARD_MODES, RankTable, mesh_config, rank_table

__all__ = ["ParallelContext", "is_using_pp", "torch_parallel_context", "tpc"]


@dataclass
class _State:
    """Everything that one set-up made, dropped as a whole by `reset`."""

    table: RankTable
    world: weakref.ref[dist.ProcessGroup]
    rank: int
    settings: LinkSettings
    groups: dict[str, dist.ProcessGroup | None]
    owned: list[dist.ProcessGroup]
    control_groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    mesh: DeviceMesh | None = None
    links: PipelineLinks = field(init=False)  # made over the groups that are here


class ParallelContext:
    """The groups of this rank. Use the instance `tpc`; another instance holds another, independent topology.

    Modes are the configured dims, "model" (all ranks with the same data index, made if there is a "tensor" or "pipe"
    dim), "moe_dp" and "moe_ep" after `build_moe_groups`, and "global". Ranks in answers are global ranks, but
    `get_group_rank` and the `get_*_rank` accessors answer the index in the group.

    Example:
        >>> tpc.setup_process_groups([("data", 2), ("pipe", 2)])  # doctest: +SKIP
        >>> tpc.get_pp_rank(), tpc.get_next_global_rank(), tpc.get_dp_size()  # on global rank 1  # doctest: +SKIP
        (1, 0, 2)
    """

    def __init__(self) -> None:
        self._state: _State | None = None

    # ---- set-up and tear-down: collective over the world ----

    def setup_process_groups(
        self,
        config: Sequence[tuple[str, float]],
        *,
        timeout: timedelta | float | None = None,
        custom_dims: Collection[str] = (),
        same_host: bool = True,
        watchdog: float = 60.0,
    ) -> None:
        """Create this rank's groups. Every rank calls it with the same configuration; a former set-up is replaced.

        Args:
            config: `(name, size)` a dim, outermost first; names are "data", "pipe" and "tensor". The order is free:
                the last dim gets neighbouring ranks.
            timeout: of the operations in the new groups, also as seconds; None for the world's.
            custom_dims: names besides the standard ones that `config` may use.
            same_host: pipeline messages between ranks of one machine go past the network; False sends all over gloo.
            watchdog: seconds after which a rank that does not move inside of a step says, on every rank's log, what it
                is doing or waiting for. It is given up after `timeout`.

        Raises:
            TopologyError: torch.distributed is not initialised, the sizes do not multiply to the world size, a name
                is unknown, or the ranks disagree.
        """
        world, settings = initialised_world(), LinkSettings(timeout, same_host, watchdog)
        table = rank_table(dist.get_world_size(), config, custom_dims=custom_dims)
        self.reset()
        groups = create_groups({mode: (table, mode) for mode in table.modes if mode != "global"}, timeout=timeout)
        self._adopt(table, world, settings, groups, list(groups.values()))

    def setup_from_mesh(
        self, mesh: DeviceMesh, *, timeout: timedelta | float | None = None, watchdog: float = 60.0
    ) -> None:
        """Use the groups of an existing device mesh over the whole world; a former set-up is replaced.

        Dim names are kept, but "dp", "pp" and "tp" become "data", "pipe" and "tensor". The mesh keeps its groups:
        `reset` does not destroy them. A "model" group is made as in `setup_process_groups`, with `timeout`; `watchdog`
        is what it is there.

        Example:
            >>> mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))  # doctest: +SKIP
            >>> tpc.setup_from_mesh(mesh)  # doctest: +SKIP

        Raises:
            TopologyError: the mesh has no names, or does not hold all ranks of the world in ascending order.
        """
        world, state = initialised_world(), self._current()
        if state is not None and state.mesh is mesh:
            return  # it is this context's own mesh, whose groups a reset would destroy
        names = tuple(mesh.mesh_dim_names or ())
        config = mesh_config(names, mesh.mesh.shape, mesh.mesh.flatten().tolist(), dist.get_world_size())
        dims = [dim for dim, _ in config]
        table = rank_table(dist.get_world_size(), config, custom_dims=dims)
        self.reset()
        extra = set(table.modes) - set(dims)
        made = create_groups({"model": (table, "model")}, timeout=timeout) if "model" in extra else {}
        groups = {dim: mesh.get_group(name) for dim, name in zip(dims, names, strict=True)} | made
        self._adopt(table, world, LinkSettings(timeout, watchdog=watchdog), groups, list(made.values()))
        self._require().mesh = mesh

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> ParallelContext:
        """A new context over an existing device mesh; see `setup_from_mesh`."""
        context = cls()
        context.setup_from_mesh(mesh)
        return context

    def build_moe_groups(self, moe_dp_size: int | None = None, moe_ep_size: int | None = None) -> None:
        """Create the "moe_dp" and "moe_ep" groups inside every data group; see `RankTable.with_moe`.

        Raises:
            TopologyError: no size is given, or they do not multiply to the data size.
        """
        state = self._require()
        table = replace(state.table, moe_ep_size=None).with_moe(moe_dp_size, moe_ep_size)
        for mode in ("moe_dp", "moe_ep"):
            self._forget(state, mode)
        groups = create_groups({mode: (table, mode) for mode in ("moe_dp", "moe_ep")}, timeout=state.settings.timeout)
        state.table = table
        state.groups.update(groups)
        state.owned.extend(groups.values())

    def setup_node_groups(self, num_per_node: int = 8) -> dist.ProcessGroup | None:
        """As the function `setup_node_groups`."""
        return setup_node_groups(num_per_node)

    def reset(self) -> None:
        """Forget the topology and destroy the groups that it made. Every rank calls it; safe at any time."""
        state, self._state = self._current(), None
        if state is not None:
            destroy_groups([*state.control_groups.values(), *state.owned])

    # ---- groups ----

    @property
    def modes(self) -> tuple[str, ...]:
        """Every mode that has groups now.

        Raises:
            TopologyError: nothing is set up.
        """
        return tuple(self._require().groups)

    @overload
    def get_group(self, mode: Literal["global"]) -> None: ...  # type: ignore[overload-overlap]
    @overload
    def get_group(self, mode: str) -> dist.ProcessGroup: ...
    def get_group(self, mode: str) -> dist.ProcessGroup | None:
        """The process group of this rank in `mode`; None, torch's word for the world, for "global".

        Raises:
            TopologyError: the mode is not there.
        """
        return self._require(mode, absent_is_one=False).groups[mode]

    def get_control_group(self, mode: str = "pipe") -> dist.ProcessGroup:
        """A group over the ranks of `mode` that moves CPU tensors: the mode's own if it can (gloo), else one beside it.

        Those for "pipe", "data" and "tensor" are made at set-up. The first call for another mode makes it and is
        collective over the world, because torch names groups by how many there are; later calls are free.

        Raises:
            TopologyError: the mode is not there.
        """
        state = self._require(mode, absent_is_one=False)
        group = state.groups[mode] or initialised_world()
        if moves_cpu_tensors(group):
            return group
        if mode not in state.control_groups:
            state.control_groups[mode] = control_group(state.table, mode, state.settings.timeout)
        return state.control_groups[mode]

    @property
    def links(self) -> PipelineLinks:
        """How this rank reaches the others of its pipeline, and its replicas."""
        return self._require().links

    @property
    def mesh(self) -> DeviceMesh:
        """The configured dims as a torch device mesh over the very same process groups, made when first asked.

        Raises:
            TopologyError: nothing is set up.
        """
        state = self._require()
        if state.mesh is None:
            dims, sizes = state.table.dims, state.table.sizes
            groups = [cast(dist.ProcessGroup, state.groups[dim]) for dim in dims]
            ranks = torch.arange(state.table.world_size, dtype=torch.int, device="cpu").reshape(sizes)
            device_type = communication_device(None).type
            state.mesh = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=dims)
        return state.mesh

    def _is_inited(self, mode: str) -> bool:
        """Whether `mode` has groups; never raises."""
        return self._current() is not None and mode in self._require().groups

    def is_mode_inited(self, mode: str) -> bool:
        """Whether `mode` has groups of more than one rank; never raises."""
        return self._is_inited(mode) and self._require().table.size(mode) > 1

    # ---- ranks and sizes ----

    def get_ranks_in_group(self, mode: str) -> list[int]:
        """Global ranks of this rank's group, in ascending order."""
        state = self._require(mode)
        return list(state.table.group_of(mode, state.rank)) if mode in state.groups else [state.rank]

    def get_group_size(self, mode: str) -> int:
        """Number of ranks in this rank's group."""
        state = self._require(mode)
        return state.table.size(mode) if mode in state.groups else 1

    def get_group_rank(self, mode: str) -> int:
        """This rank's index in its group, from 0."""
        state = self._require(mode)
        return state.table.index(mode, state.rank) if mode in state.groups else 0

    def all_ranks(self, mode: str) -> list[list[int]]:
        """The global ranks of every group of `mode`, this rank's and the others'. O(world size)."""
        state = self._require(mode)
        if mode not in state.groups:
            return [[rank] for rank in range(state.table.world_size)]
        return [list(group) for group in state.table.all_groups(mode)]

    def all_dp_ranks(self) -> list[list[int]]:
        """The global ranks of every data-parallel group."""
        return self.all_ranks("data")

    def get_prev_global_rank(self, mode: str = "pipe") -> int:
        """Global rank before this one in its group; the first one's is the last one."""
        ranks = self.get_ranks_in_group(mode)
        return ranks[self.get_group_rank(mode) - 1]

    def get_next_global_rank(self, mode: str = "pipe") -> int:
        """Global rank after this one in its group; the last one's is the first one."""
        ranks = self.get_ranks_in_group(mode)
        return ranks[(self.get_group_rank(mode) + 1) % len(ranks)]

    def is_first_in_group(self, mode: str) -> bool:
        """Whether this rank is the first of its group."""
        return self.get_group_rank(mode) == 0

    def is_last_in_group(self, mode: str) -> bool:
        """Whether this rank is the last of its group."""
        return self.get_group_rank(mode) == self.get_group_size(mode) - 1

    def is_first_group(self, mode: str) -> bool:
        """Whether this rank's group is the first group of `mode`, the one that holds global rank 0."""
        return self.get_ranks_in_group(mode)[0] == 0

    def get_tp_rank(self) -> int:
        """Index in the tensor-parallel group."""
        return self.get_group_rank("tensor")

    def get_pp_rank(self) -> int:
        """Index in the pipeline group."""
        return self.get_group_rank("pipe")

    def get_dp_rank(self) -> int:
        """Index in the data-parallel group."""
        return self.get_group_rank("data")

    def get_mp_rank(self) -> int:
        """Index in the model-parallel group."""
        return self.get_group_rank("model")

    def get_tp_size(self) -> int:
        """Ranks in the tensor-parallel group."""
        return self.get_group_size("tensor")

    def get_pp_size(self) -> int:
        """Ranks in the pipeline group."""
        return self.get_group_size("pipe")

    def get_dp_size(self) -> int:
        """Ranks in the data-parallel group."""
        return self.get_group_size("data")

    def get_mp_size(self) -> int:
        """Ranks in the model-parallel group."""
        return self.get_group_size("model")

    def is_first_in_tensor_group(self) -> bool:
        """Whether this rank is the first of its tensor-parallel group."""
        return self.is_first_in_group("tensor")

    def is_last_in_tensor_group(self) -> bool:
        """Whether this rank is the last of its tensor-parallel group."""
        return self.is_last_in_group("tensor")

    def is_first_in_pipeline_group(self) -> bool:
        """Whether this rank is the first of its pipeline: where the input enters."""
        return self.is_first_in_group("pipe")

    def is_last_in_pipeline_group(self) -> bool:
        """Whether this rank is the last of its pipeline."""
        return self.is_last_in_group("pipe")

    def is_first_in_data_group(self) -> bool:
        """Whether this rank is the first of its data-parallel group."""
        return self.is_first_in_group("data")

    def is_last_in_data_group(self) -> bool:
        """Whether this rank is the last of its data-parallel group."""
        return self.is_last_in_group("data")

    def is_first_in_model_group(self) -> bool:
        """Whether this rank is the first of its model-parallel group."""
        return self.is_first_in_group("model")

    def is_last_in_model_group(self) -> bool:
        """Whether this rank is the last of its model-parallel group."""
        return self.is_last_in_group("model")

    def _adopt(
        self,
        table: RankTable,
        world: dist.ProcessGroup,
        settings: LinkSettings,
        groups: dict[str, dist.ProcessGroup],
        owned: list[dist.ProcessGroup],
    ) -> None:
        self._state = _State(table, weakref.ref(world), dist.get_rank(), settings, {**groups, "global": None}, owned)
        self._state.links = connect(table, self.get_control_group, groups, settings)

    def _forget(self, state: _State, mode: str) -> None:
        group = state.groups.pop(mode, None)
        stale = [known for known in (state.control_groups.pop(mode, None), group) if known is not None]
        state.owned = [known for known in state.owned if known is not group]
        destroy_groups(stale)

    def _current(self) -> _State | None:
        """The state, unless its world is gone; then it is dropped, as its groups would keep the old store alive."""
        state = self._state
        if state is not None and not (dist.is_initialized() and state.world() is dist.group.WORLD):
            self._state = None
        return self._state

    def _require(self, mode: str = "global", *, absent_is_one: bool = True) -> _State:
        """The state, or the error that says what to call; also if `mode` has no groups, and may not count as size 1."""
        state = self._current()
        if state is None:
            raise TopologyError(
                "the topology is not set up; call setup_distributed() and then tpc.setup_process_groups([...])"
            )
        if mode not in state.groups and not (absent_is_one and mode in STANDARD_MODES):
            hint = "call tpc.build_moe_groups first" if mode in ("moe_dp", "moe_ep") else "check the configuration"
            raise TopologyError(f"mode {mode!r} is not initialized; the modes are {', '.join(state.groups)}; {hint}")
        return state


def is_using_pp() -> bool:
    """Whether `tpc` has pipelines of more than one rank; False before any set-up.

    Example:
        >>> is_using_pp()  # in a plain process
        False
    """
    return tpc.is_mode_inited("pipe")


torch_parallel_context = tpc = ParallelContext()
