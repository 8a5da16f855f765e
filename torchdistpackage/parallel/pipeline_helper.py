"""The stages of *this* rank: the functions of `split/sequential.py` with the pipeline's size and rank filled in.

Every rank builds the same model, flattens it the same way, and keeps its own slice, or with `partition_chunks` its own
slices. `num_stages` and `stage` can be given instead, for looking at a split without processes; then nothing is
communicated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.first_rank import decided_by_the_first_rank
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Placement, Plan
from torchdistpackage.split.cost import CostName, layer_costs
from torchdistpackage.split.sequential import (
    CallableModule,
    balanced_partition,
    flatten_model,
    flatten_sequence,
    uniform_partition,
)
from torchdistpackage.split.ties import TiedParameter, places_of, ties_of

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

_OPTIONS = {"uniform": ("extra_len",), "balanced": ("weights", "costs", "example_input")}


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
        >>> layers = [nn.Linear(2, 2) for _ in range(5)]
        >>> [len(partition_uniform(layers, num_stages=2, stage=stage)) for stage in range(2)]
        [3, 2]
        >>> stage = nn.Sequential(*partition_uniform(layers))  # this rank's
    """
    here = _place(num_stages, stage)
    row = flatten_sequence(flat_sequence, 0)
    part = uniform_partition(row, here.num_stages, here.stage, extra_len)
    return part if num_stages is not None else _with_ties(part, row, tuple(range(here.num_stages)))


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

    With costs="time" the first rank of the first pipeline measures and the others use its numbers, so that all cut at
    the same places; every rank must make the call.

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
        >>> layers = [nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(2, 2), nn.Linear(2, 2)]
        >>> [len(partition_balanced(layers, num_stages=2, stage=stage)) for stage in range(2)]
        [1, 4]
        >>> import torch
        >>> stage = nn.Sequential(*partition_balanced(layers, costs="flops", example_input=torch.zeros(1, 2)))
    """
    here = _place(num_stages, stage)
    row = flatten_sequence(flat_sequence, 0)
    together = num_stages is None and here.num_stages > 1
    numbers = _costs(row, together, weights=weights, costs=costs, example_input=example_input)
    part = balanced_partition(row, here.num_stages, here.stage, costs=numbers)
    return part if num_stages is not None else _with_ties(part, row, tuple(range(here.num_stages)))


def partition_chunks(
    flat_sequence: Layers,
    schedule: str | Plan | Placement | os.PathLike[str],
    chunks: int | None = None,
    *,
    policy: str = "uniform",
    **options: Any,
) -> dict[int, nn.Sequential]:
    """This rank's stages under a schedule that may have several a rank.

    Every rank of the pipeline makes the call, with the same layers; with costs="time" those of all replicas, too. A
    schedule with one stage a rank gives one entry. A parameter that stages on several ranks share is tied; see
    `tie_parameters`.

    Args:
        flat_sequence: All layers, a list or an `nn.Sequential`.
        schedule: Says which rank owns which stage: a schedule's name, `"auto"`, `"auto-v"`, a Plan, the path
            of a CSV file with one, or a Placement.
        chunks: Stages a rank, where a name leaves the choice.
        policy: "uniform" or "balanced".
        options: `extra_len` of `partition_uniform`; `weights`, `costs` and `example_input` of `partition_balanced`.

    Returns:
        Global index of the stage -> its layers, in the order of the model; lists for `fwd_fn` and `inputs` have the
        same order.

    Raises:
        SplitError: There are fewer layers than stages, the policy is unknown or does not take an option, or as
            `partition_balanced`.
        ScheduleError: The schedule is unknown, does not run that many chunks, or is made for other ranks.
        TopologyError: The process groups are not set up.

    Example:
        >>> import torch
        >>> from torchdistpackage import forward_backward, tpc
        >>> stages = partition_chunks([nn.Linear(2, 2) for _ in range(5)], "zb-v")
        >>> {index: len(stage) for index, stage in stages.items()}  # on one rank; rank 0 of 4 has stages 0 and 7
        {0: 3, 1: 2}
        >>> end, samples, targets = 2 * tpc.get_pp_size() - 1, torch.ones(8, 2), torch.zeros(8, 2)
        >>> def last(x):
        ...     return nn.functional.mse_loss(stages[end](x[0]), x[1])
        >>> fwd_fn = [last if index == end else stage for index, stage in stages.items()]
        >>> inputs = [samples if index == 0 else [targets] if index == end else None for index in stages]
        >>> loss = forward_backward(None, fwd_fn, None, inputs, 8, schedule="zb-v")
        >>> all(p.grad is not None for stage in stages.values() for p in stage.parameters())
        True
    """
    from torchdistpackage.topology import tpc

    if policy not in _OPTIONS:
        raise SplitError(f"unknown policy {policy!r}; use {' or '.join(map(repr, _OPTIONS))}")
    if wrong := [name for name in options if name not in _OPTIONS[policy]]:
        raise SplitError(f"policy {policy!r} takes {', '.join(_OPTIONS[policy])}, not {', '.join(wrong)}")
    placement = placement_of(schedule, tpc.get_pp_size(), chunks)
    row = flatten_sequence(flat_sequence, 0)
    cut: Callable[..., list[nn.Module]] = partial(uniform_partition, **options)
    if policy == "balanced":
        cut = partial(balanced_partition, costs=_costs(row, True, **options))
    parts = {stage: cut(row, placement.num_stages, stage) for stage in placement.local_stages(tpc.get_pp_rank())}
    _with_ties([layer for part in parts.values() for layer in part], row, placement.owners)
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
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
        >>> flat_and_partition(model, num_stages=2, stage=0)
        [Linear(in_features=2, out_features=8, bias=True), ReLU()]
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


def _with_ties(part: list[nn.Module], row: Sequence[nn.Module], owners: Sequence[int]) -> list[nn.Module]:
    """Registers the parameters that this rank shares with other ranks, so that each step sums their gradients.

    All ranks cut the same model, so that every holder registers the same parameters, in the order of their names. A
    parameter whose stages are all on this rank is one tensor already: nothing needs to be sent.

    Args:
        part: The layers of this rank, which are returned.
        row: All layers.
        owners: The rank of every stage.
    """
    from torchdistpackage.parallel.tied_parameters import ties

    placed: dict[int, tuple[int, ...]] = {}
    found: list[TiedParameter] = []
    for parameter in {id(p): p for layer in row for p in layer.parameters()}.values():
        tie = ties_of(parameter)
        placed[id(parameter)] = tuple(sorted({owners[stage] for stage in tie.stages})) if tie is not None else ()
        if tie is not None:
            found.append(tie)
    ties().cut_again(placed)
    mine = {id(p) for layer in part for p in layer.parameters()}
    for tie in sorted(found, key=lambda tie: tie.name):
        if id(tie.parameter) not in mine:
            continue
        ranks, places = placed[id(tie.parameter)], list(places_of(tie.parameter, part))
        if len(ranks) < len(tie.stages):
            ties().watch(module for module, _ in places)
        if len(ranks) > 1:
            ties().add(tie.name, ranks, tie.parameter, places)
    return part


def _costs(
    row: list[nn.Module],
    together: bool,
    *,
    weights: Sequence[float] | None = None,
    costs: CostName | None = None,
    example_input: Any = None,
) -> tuple[float, ...]:
    """One number a layer; if the ranks cut together, times are those of one rank."""
    if weights is not None and costs is not None:
        raise SplitError(f"weights and costs={costs!r} both say what the layers cost; pass one of them")
    if costs == "time" and together:
        return tuple(decided_by_the_first_rank(lambda: layer_costs(row, "time", example_input), "measure the layers"))
    return layer_costs(row, weights if weights is not None else costs or "parameters", example_input)
