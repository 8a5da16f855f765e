"""Which ranks share a layer: the tensor group, as torch's DTensor wants it, a device mesh of one dimension.

Layers find it in this order, each at its construction: the group that they are given, the one of `set_tp_group`, the
"tensor" dimension of `tpc`, the whole world. A layer keeps its own, so that layers of different groups may stand in
one model. Neighbours: everything in this folder asks here, and nothing else knows where the group comes from.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology import tpc
from torchdistpackage.topology.process_groups import communication_device, initialised_world

__all__ = ["get_tp_group", "set_tp_group", "tensor_mesh"]

_chosen: list[weakref.ref[dist.ProcessGroup]] = []
_meshes: weakref.WeakKeyDictionary[dist.ProcessGroup, DeviceMesh] = weakref.WeakKeyDictionary()


def set_tp_group(group: dist.ProcessGroup | None) -> None:
    """Chooses the tensor group of layers that are made from now on; None changes nothing.

    A choice is forgotten with its group: after another set-up layers use the new `tpc` again.

    Args:
        group: The group, of which this rank is a member.

    Raises:
        TopologyError: This rank is not in it.

    Example:
        >>> set_tp_group(dist.group.WORLD)  # tpc.get_group("tensor") is found without this
    """
    if group is not None:
        _check(group)
        _chosen[:] = [weakref.ref(group)]


def get_tp_group() -> dist.ProcessGroup:
    """The tensor group that a layer gets if it is given none: `set_tp_group`'s, that of `tpc`, or the world.

    Raises:
        TopologyError: torch.distributed is not initialised.

    Example:
        >>> dist.get_world_size(get_tp_group())  # on one rank
        1
    """
    world = initialised_world()
    chosen = _chosen[0]() if _chosen else None
    if chosen is not None and chosen in dist.distributed_c10d._world.pg_map:
        return chosen
    return tpc.get_group("tensor") if tpc._is_inited("tensor") else world


def tensor_mesh(group: dist.ProcessGroup | DeviceMesh | None = None) -> DeviceMesh:
    """The mesh of one dimension over a tensor group; one for each group, so that layers agree on it.

    Args:
        group: None for `get_tp_group()`; a mesh of one dimension stays what it is.

    Raises:
        TopologyError: This rank is not in the group, the mesh has several dimensions, or nothing is set up.

    Example:
        >>> tensor_mesh().size(), tensor_mesh().mesh_dim_names  # on one rank
        (1, ('tensor',))
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = ", ".join(group.mesh_dim_names or ())
            raise TopologyError(f'the mesh has {group.ndim} dimensions ({names}); pass one of them, as mesh["tensor"]')
        return group
    found = get_tp_group() if group is None else _check(group)
    if tpc._is_inited("tensor") and found is tpc.get_group("tensor"):
        return tpc.mesh["tensor"]  # a part of the whole mesh: fully_shard combines the two
    if found not in _meshes:
        device_type = communication_device(found).type
        ranks = torch.tensor(dist.get_process_group_ranks(found), dtype=torch.int, device="cpu")
        _meshes[found] = DeviceMesh.from_group(found, device_type, mesh=ranks, mesh_dim_names=("tensor",))
    return _meshes[found]


def _check(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TopologyError(
            f"the tensor group is a {type(group).__name__}; pass a process group, such as tpc.get_group('tensor'), or "
            "a device mesh of one dimension"
        )
    if dist.get_rank(group) < 0:
        raise TopologyError(f"global rank {dist.get_rank()} is not in the tensor group that it was given")
    return group
