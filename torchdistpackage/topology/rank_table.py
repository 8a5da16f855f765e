"""Who shares a group with whom: pure arithmetic over rank numbers, without torch and without processes.

Ranks are laid out like a row-major array: the first dim of the configuration is the outermost, the last the innermost,
whose ranks are neighbours. Every group is therefore an arithmetic progression, found without building the others::

    rank_table(16, [("data", 4), ("pipe", 2), ("tensor", 2)])

                   data 0         data 1         data 2         data 3
                 t0    t1       t0    t1       t0    t1       t0    t1
      pipe 0  [   0     1  ]  [  4     5  ]  [  8     9  ]  [ 12    13 ]     tensor [0, 1], pipe [0, 2],
      pipe 1  [   2     3  ]  [  6     7  ]  [ 10    11 ]  [ 14    15 ]      data [0, 4, 8, 12], model [0, 1, 2, 3]

`context.py` turns the groups of one rank into process groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchdistpackage.errors import TopologyError

__all__ = ["ALIASES", "STANDARD_MODES", "RankTable", "mesh_config", "node_groups", "rank_table"]

STANDARD_MODES = ("data", "pipe", "tensor", "model")
"""The names that have accessors of their own; a topology without one of them has it with size 1."""

ALIASES = {"dp": "data", "pp": "pipe", "tp": "tensor", "mp": "model"}
"""Short names in use elsewhere, such as in device meshes."""

_RESERVED = ("global", "moe_dp", "moe_ep")


@dataclass(frozen=True)
class RankTable:
    """The groups of every mode. Made by `rank_table`; any single group costs O(its size) at any world size.

    Attributes:
        dims: names of the configuration, outermost first.
        sizes: their sizes; the product is the world size.
        moe_ep_size: ranks of one expert-parallel group, or None without MoE groups.

    Example:
        >>> table = rank_table(8, [("data", 2), ("pipe", 2), ("tensor", 2)])
        >>> table.group_of("pipe", 5), table.index("pipe", 5), table.group_of("model", 5)
        ((5, 7), 0, (4, 5, 6, 7))
    """

    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    moe_ep_size: int | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    @property
    def modes(self) -> tuple[str, ...]:
        """Every mode that has groups: the dims, then "model", "moe_dp", "moe_ep" if there, then "global"."""
        model = ("model",) if "tensor" in self.dims or "pipe" in self.dims else ()
        moe = ("moe_dp", "moe_ep") if self.moe_ep_size else ()
        return (*self.dims, *model, *moe, "global")

    def size(self, mode: str) -> int:
        """Ranks in one group of `mode`."""
        return len(self.group_of(mode, 0)) if self._is_model(mode) else self._progression(mode)[0]

    def group_of(self, mode: str, rank: int) -> tuple[int, ...]:
        """The global ranks of the group of `mode` that holds `rank`, in ascending order.

        Raises:
            TopologyError: the mode does not exist here, or the rank is not in the world.
        """
        self._check_rank(rank)
        if self._is_model(mode):
            size, stride = self._progression("data")
            start = (rank // stride) % size * stride
            blocks = range(start, self.world_size, size * stride)
            return tuple(member for block in blocks for member in range(block, block + stride))
        size, stride = self._progression(mode)
        start = rank - rank // stride % size * stride
        return tuple(range(start, start + size * stride, stride))

    def index(self, mode: str, rank: int) -> int:
        """The place of `rank` in its group of `mode`, from 0. O(1)."""
        self._check_rank(rank)
        if self._is_model(mode):
            size, stride = self._progression("data")
            return rank // (size * stride) * stride + rank % stride
        size, stride = self._progression(mode)
        return rank // stride % size

    def all_groups(self, mode: str) -> tuple[tuple[int, ...], ...]:
        """All groups of `mode`, made when asked: O(world size). The first one holds rank 0.

        The order is: the place among the inner dims first, then the place among the outer ones, so that the pipe
        groups of the example above are [0, 2], [4, 6], [8, 10], [12, 14], [1, 3], ...
        """
        if self._is_model(mode):
            size, stride = self._progression("data")
            return tuple(self.group_of("model", index * stride) for index in range(size))
        size, stride = self._progression(mode)
        block = size * stride
        return tuple(
            tuple(range(start, start + block, stride))
            for inner in range(stride)
            for start in range(inner, self.world_size, block)
        )

    def with_moe(self, moe_dp_size: int | None = None, moe_ep_size: int | None = None) -> RankTable:
        """The same table with the modes "moe_dp" and "moe_ep": mixture-of-experts groups inside every data group.

        Expert-parallel groups ("moe_ep") are runs of neighbours in the data group; the ranks with the same place in
        their run hold the same experts and form a data-parallel group ("moe_dp"). One of the sizes is enough.

        Example:
            >>> table = rank_table(8, [("data", 4), ("tensor", 2)]).with_moe(moe_ep_size=2)
            >>> table.group_of("data", 0), table.group_of("moe_ep", 0), table.group_of("moe_dp", 0)
            ((0, 2, 4, 6), (0, 2), (0, 4))

        Raises:
            TopologyError: neither size is given, they do not multiply to the data size, or there is no data dim.
        """
        if "data" not in self.dims:
            raise TopologyError(f'MoE groups are cut out of the "data" groups, but the dims are {list(self.dims)}')
        data_size = self._progression("data")[0]
        if moe_dp_size is None and moe_ep_size is None:
            raise TopologyError(
                f"give moe_dp_size, moe_ep_size or both; their product must be the data size {data_size}"
            )
        ep_size = None if moe_ep_size is None else _whole_number("moe_ep_size", moe_ep_size)
        dp_size = data_size // (ep_size or 1) if moe_dp_size is None else _whole_number("moe_dp_size", moe_dp_size)
        ep_size = data_size // dp_size if ep_size is None else ep_size
        if dp_size * ep_size != data_size:
            raise TopologyError(
                f"moe_dp_size x moe_ep_size must be the data size {data_size}, got moe_dp_size={moe_dp_size} and "
                f"moe_ep_size={moe_ep_size}; give divisors of {data_size}, or one of the two only"
            )
        return replace(self, moe_ep_size=ep_size)

    def _is_model(self, mode: str) -> bool:
        """Whether groups of `mode` are the blocks of ranks that share a data index (more than one progression)."""
        return mode == "model" and "model" not in self.dims and "model" in self.modes and "data" in self.dims

    def _progression(self, mode: str) -> tuple[int, int]:
        """Size and stride of the groups of `mode`."""
        if mode not in self.modes:
            raise TopologyError(f"mode {mode!r} is not initialized; the modes are {', '.join(self.modes)}")
        if mode == "global" or (mode == "model" and "model" not in self.dims):
            return self.world_size, 1
        position = self.dims.index("data" if mode in ("moe_dp", "moe_ep") else mode)
        size, stride = self.sizes[position], math.prod(self.sizes[position + 1 :])
        if mode == "moe_ep":
            return self.moe_ep_size or 1, stride
        if mode == "moe_dp":
            ep_size = self.moe_ep_size or 1
            return size // ep_size, stride * ep_size
        return size, stride

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise TopologyError(
                f"rank {rank} is not in the world of {self.world_size} ranks (0 to {self.world_size - 1})"
            )


def rank_table(world_size: int, config: Sequence[tuple[str, float]], *, custom_dims: Collection[str] = ()) -> RankTable:
    """Lay `world_size` ranks out over the dims of `config`.

    Args:
        world_size: number of ranks.
        config: `(name, size)` a dim, outermost first. Sizes are whole numbers; 4.0 (from a division) counts as one.
        custom_dims: names that `config` may use besides "data", "pipe", "tensor" and "model". Others are refused,
            because a misspelt "pipe" would else be a training without a pipeline.

    Example:
        >>> rank_table(4, [("data", 2), ("pipe", 2)]).all_groups("data")
        ((0, 2), (1, 3))

    Raises:
        TopologyError: no list of pairs, no dims, an unknown or repeated name, a size below 1 or with a fraction, or
            sizes that do not multiply to the world size.
    """
    config = _entries(config)
    dims = tuple(name for name, _ in config)
    for name in dims:
        _check_name(name, dims, custom_dims)
    sizes = tuple(_whole_number(f"size of {name!r}", size) for name, size in config)
    if math.prod(sizes) != world_size:
        shape = " x ".join(f"{name} {size}" for name, size in zip(dims, sizes, strict=True))
        raise TopologyError(
            f"{shape} = {math.prod(sizes)} ranks, but the world has {world_size}; {_advice(world_size, dims, sizes)}"
        )
    return RankTable(dims, sizes)


def node_groups(world_size: int, num_per_node: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of every node, when each node runs `num_per_node` consecutive ranks.

    Example:
        >>> node_groups(4, 2)
        ((0, 1), (2, 3))

    Raises:
        TopologyError: `num_per_node` is below 1 or does not divide the world size.
    """
    num_per_node = _whole_number("num_per_node", num_per_node)
    if world_size % num_per_node:
        raise TopologyError(
            f"{world_size} ranks do not divide into nodes of {num_per_node}; give a divisor of {world_size}"
        )
    return tuple(tuple(range(start, start + num_per_node)) for start in range(0, world_size, num_per_node))


def _entries(config: Any) -> list[tuple[str, float]]:
    """The configuration as a list of pairs.

    Raises:
        TopologyError: It is something else, or empty.
    """
    wanted = 'a list of (name, size), outermost first, such as [("data", 2), ("pipe", 4)]'
    if isinstance(config, Mapping):
        raise TopologyError(f"the configuration is {wanted}; of {config!r} pass list(config.items())")
    if isinstance(config, Sequence) and len(config) == 2 and isinstance(config[0], str) and config[0] in STANDARD_MODES:
        raise TopologyError(f"the configuration is {wanted}; got {config!r}: put it into a list, [{tuple(config)!r}]")
    found = list(config) if isinstance(config, Iterable) and not isinstance(config, str) else [config]
    if any(isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2 for entry in found):
        raise TopologyError(f"the configuration is {wanted}; got {config!r}")
    if not found:
        raise TopologyError('the configuration is empty; give at least one dim, such as [("pipe", 2)]')
    return found


def _check_name(name: str, dims: tuple[str, ...], custom_dims: Collection[str]) -> None:
    known = (*STANDARD_MODES, *custom_dims)
    if dims.count(name) > 1:
        raise TopologyError(f"dim {name!r} is there {dims.count(name)} times in {list(dims)}; name each dim once")
    if name in _RESERVED:
        raise TopologyError(f"the name {name!r} is reserved for groups that are made automatically; choose another")
    if name not in known:
        hint = f"did you mean {ALIASES[name]!r}? " if name in ALIASES else ""
        raise TopologyError(f"unknown dim {name!r}; {hint}the known dims are {', '.join(known)} (see custom_dims)")
    if name == "model" and ("tensor" in dims or "pipe" in dims):
        raise TopologyError(
            'the "model" groups follow from "tensor" and "pipe"; leave "model" out of the configuration'
        )


def _whole_number(what: str, value: float) -> int:
    """`value` as an int of at least 1; anything that is not a whole number is an error."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise TopologyError(f"{what} must be a whole number, got {value!r}") from None
    if number != value or isinstance(value, (bool, str)):
        raise TopologyError(f"{what} must be a whole number, got {value!r}; check the division that gave it")
    if number < 1:
        raise TopologyError(f"{what} must be at least 1, got {value!r}")
    return number


def _advice(world_size: int, dims: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    """What to change when the sizes do not fit the world: one size that would, if there is one."""
    product = math.prod(sizes)
    for name, size in zip(dims, sizes, strict=True):
        rest = product // size
        if world_size % rest == 0:
            return f"set {name} to {world_size // rest}, or start {product} ranks"
    return f"start {product} ranks, or choose sizes whose product is {world_size}"


def mesh_config(
    names: Sequence[str], sizes: Sequence[int], ranks: Sequence[int], world_size: int
) -> list[tuple[str, int]]:
    """The configuration that a device mesh stands for.

    Args:
        names: of the mesh's dims; "dp", "pp" and "tp" become "data", "pipe" and "tensor".
        sizes: of the mesh's dims.
        ranks: the ranks in the mesh, in its order.
        world_size: how many ranks there are.

    Raises:
        TopologyError: the mesh has no names, or does not hold all ranks of the world in ascending order.
    """
    if not names:
        raise TopologyError('the device mesh has no dim names; make it with mesh_dim_names=("data", "pipe"), say')
    if list(ranks) != list(range(world_size)):
        raise TopologyError(
            f"the device mesh must hold the ranks 0 to {world_size - 1} in order, got {list(ranks)}; pass the whole "
            "mesh, not a part of it"
        )
    return [(ALIASES.get(name, name), size) for name, size in zip(names, sizes, strict=True)]
