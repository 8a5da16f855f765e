"""The stage of *this* rank: the functions of `split/sequential.py` with the pipeline's size and rank filled in.

Every rank builds the same model, flattens it the same way, and keeps its own slice. `num_stages` and `stage` can be
given instead, for looking at a split without processes or for several stages a rank; then nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Placement, Plan
from torchdistpackage.split.cost import CostName, layer_costs
from torchdistpackage.split.names import ties_of
from torchdistpackage.split.sequential import (
    CallableModule,
    balanced_partition,
    flatten_model,
    flatten_sequence,
    uniform_partition,
)

__all__ = [
    "CallableModule",
    "flat_and_partition",
    "flatten_model",
    "flatten_sequence",
    "partition_balanced",
    "partition_chunks",
    "partition_uniform",
]

Layers = Iterable[nn.Module | Callable[..., Any]]


def partition_uniform(
    flat_sequence: Layers, extra_len: int = 0, *, num_stages: int | None = None, stage: int | None = None
) -> list[nn.Module]:
    """This rank's layers when every stage gets as many as the others, give or take one.

    Args:
        flat_sequence: All layers, a list or an `nn.Sequential`.
        extra_len: Work of the last stage that is not in the list, in layers; see `uniform_partition`.
        num_stages: Stages to cut into; the size of the pipeline when not given.
        stage: The stage to return; this rank's when not given.

    Raises:
        SplitError: There are fewer layers than stages, no such stage, or only one of num_stages and stage is given.
        TopologyError: Neither is given and the process groups are not set up.

    Example:
        >>> flat_model = flatten_model(model, layer_list, return_list=True)
        >>> model = torch.nn.Sequential(*partition_uniform(flat_model))
    """
    here = _place(num_stages, stage)
    return _with_ties(uniform_partition(flat_sequence, here.num_stages, here.stage, extra_len), num_stages)


def partition_balanced(
    flat_sequence: Layers,
    sequence: Any = None,
    *,
    weights: Sequence[float] | None = None,
    costs: CostName | None = None,
    example_input: Any = None,
    num_stages: int | None = None,
    stage: int | None = None,
) -> list[nn.Module]:
    """This rank's layers when the most expensive stage is as cheap as it can be.

    With costs="time" the first rank of the pipeline measures and the others use its numbers, so that all cut at the
    same places; every rank of the pipeline must make the call.

    Args:
        flat_sequence: All layers, a list or an `nn.Sequential`.
        sequence: Not used; kept so that older calls, which pass the model here, work.
        weights: One number a layer, instead of `costs`.
        costs: "parameters" (the default), "flops" or "time".
        example_input: Input of the first layer, for "flops" and "time".
        num_stages: Stages to cut into; the size of the pipeline when not given.
        stage: The stage to return; this rank's when not given.

    Raises:
        SplitError: There are fewer layers than stages, no such stage, weights or costs do not fit the layers, or the
            first rank could not measure.
        TopologyError: Neither num_stages nor stage is given and the process groups are not set up.

    Example:
        >>> model = torch.nn.Sequential(*partition_balanced(flat_model, costs="flops", example_input=images[:1]))
    """
    if weights is not None and costs is not None:
        raise SplitError(f"weights and costs={costs!r} both say what the layers cost; pass one of them")
    here = _place(num_stages, stage)
    row = flatten_sequence(flat_sequence, 0)
    numbers: CostName | Sequence[float] | None = costs if weights is None else weights
    if costs == "time" and num_stages is None and here.num_stages > 1:
        numbers = _times_of_the_first_rank(row, example_input)
    part = balanced_partition(row, here.num_stages, here.stage, costs=numbers, example_input=example_input)
    return _with_ties(part, num_stages)


def partition_chunks(
    flat_sequence: Layers,
    schedule: str | Plan | Placement,
    chunks: int | None = None,
    *,
    policy: str = "uniform",
    **options: Any,
) -> dict[int, nn.Sequential]:
    """This rank's stages under a schedule that may have several a rank.

    Every rank of the pipeline makes the call, with the same layers.

    Args:
        flat_sequence: All layers, a list or an `nn.Sequential`.
        schedule: Says which rank owns which stage: a schedule's name, `"auto"`, `"auto-v"`, a Plan or a Placement.
        chunks: Stages a rank, where a name leaves the choice.
        policy: "uniform" or "balanced".
        options: `extra_len` of `partition_uniform`; `weights`, `costs` and `example_input` of `partition_balanced`.

    Returns:
        Global index of the stage -> its layers, in the order of the model; lists for `fwd_fn` and `inputs` have the
        same order.

    Raises:
        SplitError: There are fewer layers than stages, or the policy is unknown.
        ScheduleError: The schedule is unknown, does not run that many chunks, or is made for other ranks.
        TopologyError: The process groups are not set up.

    Example:
        >>> stages = partition_chunks(layers, "zb-v")
        >>> loss = forward_backward(optimizer, [fwd_fn_of(s) for s in stages], None, inputs, 8, schedule="zb-v")
    """
    from torchdistpackage.topology import tpc

    placement = placement_of(schedule, tpc.get_pp_size(), chunks)
    row = flatten_sequence(flat_sequence, 0)
    if policy == "balanced" and options.get("costs") == "time" and tpc.get_pp_size() > 1:
        options["costs"] = _times_of_the_first_rank(row, options.get("example_input"))
    elif policy == "balanced" and options.get("weights") is not None:
        options["costs"] = options.pop("weights")
    policies: dict[str, Callable[..., list[nn.Module]]] = {"uniform": uniform_partition, "balanced": balanced_partition}
    if policy not in policies:
        raise SplitError(f"unknown policy {policy!r}; use {' or '.join(map(repr, policies))}")
    stages = placement.local_stages(tpc.get_pp_rank())
    parts = {stage: policies[policy](row, placement.num_stages, stage, **options) for stage in stages}
    _register_ties([layer for part in parts.values() for layer in part], placement.owners)
    return {stage: nn.Sequential(*part) for stage, part in parts.items()}


def flat_and_partition(
    sequence: Layers, flat_level: int = 1, partition_policy: str = "uniform", **kwargs: Any
) -> list[nn.Module]:
    """Flatten a sequence and return this rank's layers.

    Args:
        sequence: `nn.Sequential` or a list of layers, possibly nested.
        flat_level: How deep containers are opened; see `flatten_sequence`.
        partition_policy: "uniform" or "balanced".
        kwargs: Passed to `partition_uniform` or `partition_balanced`.

    Raises:
        SplitError: The policy is unknown, or as the partition functions.

    Example:
        >>> layers = flat_and_partition(model, partition_policy="balanced", costs="time", example_input=images)
    """
    policies: dict[str, Callable[..., list[nn.Module]]] = {"uniform": partition_uniform, "balanced": partition_balanced}
    if partition_policy not in policies:
        raise SplitError(f"unknown partition_policy {partition_policy!r}; use {' or '.join(map(repr, policies))}")
    return policies[partition_policy](flatten_sequence(sequence, flat_level), **kwargs)


@dataclass(frozen=True)
class _Place:
    num_stages: int
    stage: int


def _place(num_stages: int | None, stage: int | None) -> _Place:
    if num_stages is not None and stage is not None:
        return _Place(num_stages, stage)
    if num_stages is not None or stage is not None:
        raise SplitError(f"num_stages={num_stages} and stage={stage}: give both, or neither for this rank's stage")
    from torchdistpackage.topology import tpc  # here, because explicit stages need no topology

    return _Place(tpc.get_pp_size(), tpc.get_pp_rank())


def _with_ties(part: list[nn.Module], num_stages: int | None) -> list[nn.Module]:
    """With one stage a rank; nothing is registered where the caller asked for stages by number."""
    if num_stages is None:
        _register_ties(part, None)
    return part


def _register_ties(layers: Sequence[nn.Module], owners: Sequence[int] | None) -> None:
    """Registers the parameters that this rank shares with other ranks, so that each step sums their gradients.

    All ranks cut the same model, so that every holder registers the same parameters, in the order of their names. A
    parameter whose stages are all on this rank is one tensor already: nothing needs to be sent.
    """
    from torchdistpackage.parallel.tied_parameters import ties

    found = {id(p): tie for layer in layers for p in layer.parameters() if (tie := ties_of(p)) is not None}
    for tie in sorted(found.values(), key=lambda tie: tie.name):
        ranks = sorted(set(tie.stages if owners is None else (owners[stage] for stage in tie.stages)))
        if len(ranks) > 1:
            ties().add(tie.name, ranks, tie.parameter)


def _times_of_the_first_rank(row: list[nn.Module], example_input: Any) -> tuple[float, ...]:
    """What the pipeline's first rank measures. An error goes round as well: the others would wait for ever."""
    from torchdistpackage.topology import tpc

    box: list[tuple[float, ...] | str] = [""]
    cause: Exception | None = None
    if tpc.get_pp_rank() == 0:
        try:
            box = [layer_costs(row, "time", example_input)]
        except Exception as error:
            cause, box = error, [str(error)]
    dist.broadcast_object_list(box, src=tpc.get_ranks_in_group("pipe")[0], group=tpc.get_control_group("pipe"))
    if isinstance(box[0], str):
        raise SplitError(f"the first rank of the pipeline could not measure the layers: {box[0]}") from cause
    return box[0]
