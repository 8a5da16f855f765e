"""Where to cut the row of a decoder: by what its ends cost, at given layers, or by lists of names."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.boundaries import balanced_boundaries, boundaries_of_sizes, uniform_sizes
from torchdistpackage.split.causal_lm_names import MULTIMODAL_SUFFIXES
from torchdistpackage.split.decoder.layout import DecoderLayout

__all__ = ["cuts_of_names", "cuts_of_points", "cuts_of_weights"]


def cuts_of_weights(
    layout: DecoderLayout, num_stages: int, input_weight: float, output_weight: float
) -> tuple[int, ...]:
    """Cut points in the row; norm and head are not cut apart.

    Raises:
        SplitError: There are fewer layers than stages, or a weight is negative.
    """
    layers = layout.num_layers
    if num_stages > layers:
        raise SplitError(
            f"{num_stages} stages need at least as many layers; {layout.skeleton.layers} has {layers}: use fewer "
            "ranks, or a schedule with fewer stages a rank"
        )
    if input_weight < 0 or output_weight < 0:
        raise SplitError(
            f"input_weight and output_weight are costs in layers, >= 0; got {input_weight}, {output_weight}"
        )
    whole = float(input_weight).is_integer() and float(output_weight).is_integer()
    sizes: list[int] = []
    if whole:
        # What is left over goes to the first stages: those of the last have the head to compute.
        sizes = sorted(uniform_sizes(layers + int(input_weight) + int(output_weight), num_stages), reverse=True)
        sizes[0] -= int(input_weight)
        sizes[-1] -= int(output_weight)
    if not whole or min(sizes) < 1:
        costs = [1.0] * layers
        costs[0] += input_weight
        costs[-1] += output_weight
        return (*balanced_boundaries(costs, num_stages)[:-1], len(layout.row))
    return (*boundaries_of_sizes(sizes, layers)[:-1], len(layout.row))


def cuts_of_points(layout: DecoderLayout, num_stages: int, cut_points: Sequence[int]) -> tuple[int, ...]:
    """Cut points of the layers at which the stages after the first begin; each must hold a layer.

    Raises:
        SplitError: There are not as many as stages after the first, or they do not ascend within the layers.
    """
    points, layers = [operator.index(point) for point in cut_points], layout.num_layers
    if len(points) != num_stages - 1:
        raise SplitError(
            f"cut_points has {len(points)} layers, {points}; {num_stages} stages begin at {num_stages - 1}"
        )
    if any(before >= after for before, after in itertools.pairwise((0, *points, layers))):
        raise SplitError(
            f"cut_points must ascend within 1..{layers - 1}, so that each stage has a layer: {layout.skeleton.layers} "
            f"has {layers}; got {points}"
        )
    return (0, *points, len(layout.row))


def cuts_of_names(
    model: nn.Module, layout: DecoderLayout, num_stages: int, module_names: Sequence[Sequence[str]]
) -> tuple[int, ...]:
    """Cut points of explicit lists, which must name every module with parameters once and in order.

    Raises:
        SplitError: A name is missing, unknown, given twice or out of order.
    """
    if len(module_names) != num_stages:
        raise SplitError(f"module_names has {len(module_names)} lists for {num_stages} stages")
    known = {name for name, _ in model.named_modules()}
    place_of = {name: place for place, name in enumerate(layout.row)}
    stage_of: dict[str, int] = {}
    for stage, names in enumerate(module_names):
        for name in names:
            _check_name(name, known, layout)
            if name in place_of or name in (*layout.prologue, *layout.idle):
                if name in stage_of:
                    raise SplitError(
                        f"{name} is given to stage {stage_of[name]} and to stage {stage}; it can be on one"
                    )
                stage_of[name] = stage
    missing = [name for name in (*layout.prologue, *layout.row) if name not in stage_of]
    if missing:
        raise SplitError(f"no stage has {', '.join(missing[:8])}; every module with parameters must be on one")
    late = [name for name in layout.prologue if stage_of[name] and name not in place_of]
    if late:
        raise SplitError(f"{late[0]} is on stage {stage_of[late[0]]}; what comes before the layers must be on stage 0")
    order = [stage_of[name] for name in layout.row]
    for before, after in itertools.pairwise(range(len(order))):
        if order[after] < order[before]:
            raise SplitError(
                f"{layout.row[after]} is on stage {order[after]}, and {layout.row[before]}, which runs before it, on "
                f"stage {order[before]}; stages hold what follows each other"
            )
    return (0, *(sum(stage < bound for stage in order) for bound in range(1, num_stages)), len(order))


def _check_name(name: str, known: set[str], layout: DecoderLayout) -> None:
    if name not in known:
        if name.rpartition(".")[2] in (*MULTIMODAL_SUFFIXES, "rotary_emb"):
            return  # lists made for any model name what this one does not have
        raise SplitError(
            f"module_names has {name!r}, which the model does not have; its layers are {layout.row[0]}, ..."
        )
    inside = [unit for unit in (*layout.row, *layout.prologue, *layout.idle) if unit.startswith(f"{name}.")]
    above = [unit for unit in (*layout.row, *layout.prologue, *layout.idle) if name.startswith(f"{unit}.")]
    if above or inside:
        raise SplitError(f"module_names has {name!r}; name whole modules like {(above or inside)[0]} instead")
