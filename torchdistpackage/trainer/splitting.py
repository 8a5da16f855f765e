"""What a splitter is given and what it returns, checked; and the splitter that is taken when nobody gives one.

::

    model (meta) --> splitter(model, args, kwargs, stage_indices, train, device, rank, group)
                       |
                       +--> (all modules, this rank's, its stages with their places, mask creator)   --> CutResult

Anybody can write a splitter, so everything that can be wrong with its answer is said here, in its name. Neighbours:
`stages.py` fills what was cut; `split/causal_lm.py` and `split/traced.py` are the splitters that we have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.schedule import Placement
from torchdistpackage.split.causal_lm import ModelSplitter, create_manual_causal_lm_splitter
from torchdistpackage.split.decoder.find import find_layout
from torchdistpackage.split.pipeline_stage import PipelineStage
from torchdistpackage.split.traced import split

__all__ = ["Balance", "CutResult", "call_splitter", "create_default_splitter", "takes_tokens"]

Balance = Literal["parameters", "flops"]


@dataclass(frozen=True)
class CutResult:
    """What a splitter has returned, found to be in order.

    Attributes:
        modules: The modules of all stages, in the order of the model.
        mask_creator: Makes attention masks on each rank, or None.
    """

    modules: list[nn.Module]
    mask_creator: Callable[..., Any] | None


def call_splitter(
    splitter: ModelSplitter,
    model: nn.Module,
    placement: Placement,
    rank: int,
    *,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    train: bool = True,
    device: torch.device | str | None = None,
    group: Any = None,
) -> CutResult:
    """Calls a splitter, and checks what it returns.

    Args:
        splitter: Any `ModelSplitter`.
        model: The whole model.
        placement: Which rank has which stage.
        rank: This rank in the pipeline.
        example_args: Positional arguments of one micro-batch.
        example_kwargs: Keyword arguments.
        train: Whether it is going to be trained.
        device: Where this rank computes.
        group: The process group of the pipeline.

    Raises:
        SplitError: What it returned is not what a splitter returns. Its own exceptions keep their type.

    Example:
        >>> import torch.nn as nn
        >>> def halves(model, args, kwargs, stage_indices, train, device, rank, pp_group):
        ...     parts = [model[:1], model[1:]]
        ...     mine = stage_indices[rank]
        ...     return parts, [parts[i] for i in mine], [PipelineStage(parts[i], i, 2) for i in mine], None
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> call_splitter(halves, model, Placement.loop(2), 1).modules[1]
        Sequential(
          (1): ReLU()
        )
    """
    if not callable(splitter):
        raise SplitError(
            f"model_splitter must be a function, got {type(splitter).__name__}: pass "
            "create_manual_causal_lm_splitter(), create_automatic_splitter({...}), your own, or None"
        )
    indices = [placement.local_stages(other) for other in range(placement.num_ranks)]
    name = getattr(splitter, "__qualname__", None) or type(splitter).__name__
    try:
        returned = splitter(
            model, example_args, example_kwargs, indices, train, device=device, rank=rank, pp_group=group
        )
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"raised by the splitter {name} for rank {rank}, while it cut {type(model).__name__} into "
                f"{placement.num_stages} stages, {[list(mine) for mine in indices]} on the ranks"
            )
        raise
    return _checked(returned, f"the splitter {name}", placement.num_stages, placement.local_stages(rank))


def _checked(returned: Any, who: str, count: int, mine: Sequence[int]) -> CutResult:
    if not isinstance(returned, (tuple, list)) or len(returned) != 4:
        size = f" of {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise SplitError(
            f"{who} returned a {type(returned).__name__}{size}; it must return four values: the modules of all stages, "
            "those of this rank, its stages, and a function that makes attention masks, or None"
        )
    every, local, stages, masks = returned
    every, local = _modules(every, f"{who}: all modules"), _modules(local, f"{who}: the modules of this rank")
    stages = list(stages) if isinstance(stages, (list, tuple)) else [stages]
    for what, found, wanted in (
        ("modules of all stages", every, count),
        ("modules of this rank", local, len(mine)),
        ("stages of this rank", stages, len(mine)),
    ):
        if len(found) != wanted:
            raise SplitError(
                f"{who} returned {len(found)} {what}, not {wanted}: the pipeline has {count} stages, and this rank "
                f"{list(mine)}"
            )
    for at, index in enumerate(mine):
        if local[at] is not every[index]:
            raise SplitError(
                f"{who}: module {at} of this rank is not the object that is stage {index} of all; return "
                "[all_modules[i] for i in stage_indices[rank]]"
            )
        _check_stage(stages[at], every[index], index, who)
    if len({id(module) for module in every}) != count:
        raise SplitError(f"{who} returned one module for several stages; each stage needs an object of its own")
    if masks is not None and not callable(masks):
        raise SplitError(f"{who}: the fourth value makes attention masks, so it is called, or None; got {masks!r}")
    return CutResult(every, masks)


def _modules(found: Any, what: str) -> list[nn.Module]:
    if isinstance(found, (str, bytes)) or not hasattr(found, "__iter__"):
        raise SplitError(f"{what} must be a list of torch.nn.Module, got {type(found).__name__}")
    modules: list[Any] = list(found)
    for at, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise SplitError(f"{what} must be torch.nn.Modules; number {at} is a {type(module).__name__}")
    return modules


def _check_stage(stage: Any, module: nn.Module, index: int, who: str) -> None:
    """Ours, torch.distributed.pipelining's, or anything that says what it holds and where it stands."""
    missing = [name for name in ("submod", "stage_index") if not hasattr(stage, name)]
    if missing:
        raise SplitError(
            f"{who}: a stage has submod and stage_index, as torchdistpackage.PipelineStage does; the "
            f"{type(stage).__name__} for stage {index} has no {' and no '.join(missing)}"
        )
    if stage.stage_index != index:
        raise SplitError(f"{who}: the stages of this rank must be in order: {stage.stage_index} where {index} belongs")
    if stage.submod is not module:
        raise SplitError(f"{who}: the submod of stage {index} is not the module that it returned for that stage")


def create_default_splitter(balance: Balance = "parameters") -> ModelSplitter:
    """The splitter for those who give none: decoders between their layers, everything else by tracing.

    A model that takes token ids and is built as `split_causal_lm` needs it, of transformers or not, is cut evenly by
    layers; embeddings and head count as one layer each. Any other one is recorded, and cut where the stages get equal
    costs; both are the same on every rank.

    Args:
        balance: What to make equal where the model is traced: "parameters" or "flops".

    Returns:
        A `ModelSplitter`; it raises SplitError for a model that can be cut in neither way.

    Raises:
        SplitError: There is no such balance.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> splitter, example = create_default_splitter(), torch.ones(3, 2)
        >>> cut = call_splitter(splitter, model, Placement.loop(2), 0, example_args=(example,))
        >>> [sum(p.numel() for p in module.parameters()) for module in cut.modules]
        [24, 9]
    """
    if balance not in ("parameters", "flops"):
        raise SplitError(f"balance={balance!r}: the default splitter balances 'parameters' or 'flops'")

    def split_by_default(
        model: nn.Module,
        example_args: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        stage_indices: Sequence[Sequence[int]] = ((0,),),
        train: bool = True,
        device: torch.device | str | None = None,
        rank: int = 0,
        pp_group: Any = None,
    ) -> Any:
        refusal = "it takes no token ids"
        if takes_tokens(example_args, example_kwargs):
            try:
                layers = find_layout(model).num_layers
            except SplitError as error:
                refusal = str(error)
            else:
                manual = create_manual_causal_lm_splitter(layers)
                return manual(model, example_args, example_kwargs, stage_indices, train, device, rank, pp_group)
        count = sum(map(len, stage_indices))
        try:
            pipe = split(model, tuple(example_args), count, example_kwargs, costs=balance)
        except SplitError as error:
            raise SplitError(
                f"{type(model).__name__} was given without a splitter, and cannot be cut into {count} stages by "
                f"tracing: {error}. It is no decoder either: {refusal}. Pass model_splitter="
                "create_manual_causal_lm_splitter(...), create_automatic_splitter({...}), or a function of your own"
            ) from error
        modules = [pipe.get_stage_module(index) for index in range(count)]
        mine = list(stage_indices[rank])
        stages = [PipelineStage(modules[index], index, count, device, pp_group) for index in mine]
        return modules, [modules[index] for index in mine], stages, None

    vars(split_by_default)["traces"] = True
    return split_by_default


def takes_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a model that is called so gets token ids."""
    first = args[0] if args else (kwargs or {}).get("input_ids")
    return isinstance(first, Tensor) and not first.is_floating_point() and not first.is_complex()
