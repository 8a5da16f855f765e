"""A device mesh -> the groups of `tpc`: people who bring a mesh need not say the same again.

::

    init_device_mesh("cuda", (2, 4, 2), mesh_dim_names=("dp", "pp", "tp"))
                               |  |  |
                      ("data", 2) ("pipe", 4) ("tensor", 2)            other axes keep their names

A topology that is set up already is used as it is, if it says the same.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchdistpackage.errors import TopologyError
from torchdistpackage.topology import tpc
from torchdistpackage.topology.rank_table import ALIASES, STANDARD_MODES, mesh_config

__all__ = ["adopt_mesh", "pipeline_mesh"]


def pipeline_mesh(mesh: Any, axis: str) -> Any:
    """The pipeline axis of a mesh: something with `size()` and `get_local_rank()`.

    Raises:
        TopologyError: The mesh does not have it.
    """
    names = getattr(mesh, "mesh_dim_names", None)
    if isinstance(mesh, DeviceMesh) and axis not in (names or ()):
        raise TopologyError(
            f"world_mesh has no axis {axis!r}, only {list(names or ())}; name it with "
            f"init_device_mesh(..., mesh_dim_names=({axis!r}, ...)), or say pp_axis_name"
        )
    return mesh[axis]


def adopt_mesh(mesh: Any, pp_axis: str, dp_axes: tuple[str, ...], tp_axis: str | None = None) -> None:
    """Sets `tpc` up to the layout of a mesh, or checks that it is. Every rank calls it; anything but a mesh is let be.

    Args:
        mesh: A `DeviceMesh` over the whole world.
        pp_axis: Becomes "pipe".
        dp_axes: Become "data", together; those that the mesh does not have are passed over.
        tp_axis: Becomes "tensor".

    Raises:
        TopologyError: The mesh is no grid of all ranks, its data axes do not lie side by side, or `tpc` says otherwise.
    """
    if not isinstance(mesh, DeviceMesh):
        return
    names = tuple(mesh.mesh_dim_names or ())
    mesh_config(names, tuple(mesh.mesh.shape), mesh.mesh.flatten().tolist(), dist.get_world_size())
    roles = {name: ALIASES.get(name, name) for name in names} | {name: "data" for name in dp_axes if name in names}
    roles |= {name: role for name, role in ((tp_axis, "tensor"), (pp_axis, "pipe")) if name in names}
    config = _config(names, tuple(mesh.mesh.shape), roles)
    if tpc._is_inited("global"):
        _check(mesh, names, roles)
        return
    custom = [name for name, _ in config if name not in STANDARD_MODES]
    tpc.setup_process_groups(config, custom_dims=custom)


def _config(names: tuple[str, ...], sizes: tuple[int, ...], roles: dict[str, str]) -> list[tuple[str, int]]:
    config: list[tuple[str, int]] = []
    for name, size in zip(names, sizes, strict=True):
        role = roles[name]
        if config and config[-1][0] == role:
            config[-1] = (role, config[-1][1] * size)
        elif any(role == known for known, _ in config):
            raise TopologyError(
                f"the axes {[axis for axis in names if roles[axis] == role]} of the mesh {names} are "
                f"{role!r} together, but do not lie side by side; put them next to each other"
            )
        else:
            config.append((role, size))
    return config


def _check(mesh: DeviceMesh, names: tuple[str, ...], roles: dict[str, str]) -> None:
    """Whether the topology that is there has the mesh's groups."""
    place = mesh.get_coordinate()
    assert place is not None  # the mesh holds all ranks
    for role in ("pipe", "data", "tensor"):
        ours = [roles[name] == role for name in names]
        wanted = mesh.mesh[tuple(slice(None) if mine else at for mine, at in zip(ours, place, strict=True))]
        expected = sorted(wanted.flatten().tolist()) if any(ours) else [dist.get_rank()]
        found = tpc.get_ranks_in_group(role)
        if found != expected:
            shape = " x ".join(f"{name} {size}" for name, size in zip(names, mesh.mesh.shape, strict=True))
            raise TopologyError(
                f"the mesh ({shape}) puts rank {dist.get_rank()} into the {role!r} group {expected} of "
                f"{len(expected)} rank(s), but tpc is set up with {found}; set both up alike, or leave "
                "tpc.setup_process_groups out: it is done from the mesh"
            )
