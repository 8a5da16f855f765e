r"""`AutoPipeline` in single functions: cut, bind a schedule, both; named as in NVIDIA NeMo AutoModel.

::

    split_model_into_stages  ->  parallelize_fn, once a stage  ->  build_pipeline_schedule  ->  schedule.step(...)
    \___________________________________ pipeline_model ______________________________________/

The pieces are looked up as names of this module. Neighbours: `split/causal_lm.py` cuts, `auto_pipeline_schedule.py`
runs, `gradients.py` is for after a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torchdistpackage.errors import PipelineError, ScheduleError, SplitError
from torchdistpackage.schedule import Placement, Plan, ScheduleFacts, describe
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.causal_lm_names import (
    calculate_virtual_stages,
    generate_hf_model_fqn_per_model_part,
    stage_ids_this_rank,
)
from torchdistpackage.split.decoder.find import find_layout
from torchdistpackage.split.pipeline_stage import PipelineStage
from torchdistpackage.trainer.auto_pipeline_config import AutoPipelineConfig, check_batch
from torchdistpackage.trainer.auto_pipeline_schedule import LossFn, PipelineSchedule, check_shared
from torchdistpackage.trainer.mesh_topology import pipeline_mesh
from torchdistpackage.trainer.parallelize import parallelized

__all__ = [
    "PipelinedModel",
    "PipelineStage",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "generate_hf_model_fqn_per_model_part",
    "get_schedule_class",
    "pipeline_model",
    "split_model_into_stages",
    "stage_ids_this_rank",
    "validate_hf_model_for_pipeline_support",
]

_AXES = ("dp_axis_names", "cp_axis_name", "tp_axis_name", "ep_axis_name", "ep_shard_axis_names")


class BuildError(PipelineError, AssertionError):
    """What must be given is not; an AssertionError, too, because callers of this API catch that."""


class PipelinedModel(NamedTuple):
    """What `pipeline_model` makes; unpacks in this order.

    Attributes:
        schedule: Runs batches.
        model_parts: This rank's stages as modules.
        has_first_stage: Whether this rank takes the batch.
        has_last_stage: Whether this rank computes the loss.
        stages: This rank's stages with their places.
    """

    schedule: PipelineSchedule
    model_parts: list[nn.Module]
    has_first_stage: bool
    has_last_stage: bool
    stages: list[PipelineStage]


_BASE_CLASSES = {"PipelineScheduleSingle": "1f1b", "PipelineScheduleMulti": "interleaved-1f1b"}
"""Torch's names for any schedule with one stage a rank, or several: the usual one of each kind."""


def get_schedule_class(name: str) -> ScheduleFacts:
    """What is known of a schedule, by name: this library's, or torch's (`"Interleaved1F1B"`, `"ScheduleGPipe"`).

    Raises:
        ScheduleError: There is no such schedule.

    Example:
        >>> get_schedule_class("ScheduleInterleavedZeroBubble").name, get_schedule_class("DualPipeV").placement
        ('interleaved-zb', 'v')
    """
    if name in _BASE_CLASSES:
        return describe(_BASE_CLASSES[name])
    return describe(name[len("Schedule") :] if isinstance(name, str) and name.startswith("Schedule") else name)


def validate_hf_model_for_pipeline_support(model: nn.Module) -> None:
    """Looks for what no cut can be made of. Tied embeddings are fine: their gradients are summed over the stages.

    Raises:
        SplitError: The model is an encoder-decoder.

    Example:
        >>> validate_hf_model_for_pipeline_support(nn.Linear(2, 2))
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        raise SplitError(
            f"{type(model).__name__} is an encoder-decoder (config.is_encoder_decoder); only decoders are cut here: "
            "torchdistpackage.split_model cuts any model that can be traced"
        )


def split_model_into_stages(
    model: nn.Module,
    pp_mesh: Any,
    pp_axis_name: str,
    pp_schedule: str | Plan | None,
    device: torch.device | str | None = None,
    module_names_per_stage: Sequence[Sequence[str]] | None = None,
    layers_per_stage: int | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    round_to_pp_multiple: str | None = None,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    """Cuts a model; this rank's stages are on their device, unless the model is on the meta device.

    Args:
        model: A causal language model.
        pp_mesh: The pipeline axis of the mesh: has `size()`, `get_local_rank()` and `get_group()`.
        pp_axis_name: Its name.
        pp_schedule: Says which rank has which stage: a name, or a plan.
        device: Where this rank computes; None to leave the stages where they are.
        module_names_per_stage: Names of the modules of each stage.
        layers_per_stage: The most layers of a stage.
        patch_inner_model: Accepted; nothing is patched.
        patch_causal_lm_model: Accepted; nothing is patched.
        round_to_pp_multiple: See `calculate_virtual_stages`.

    Returns:
        This rank's stages, and the same as modules, in the order of the model.

    Raises:
        SplitError: The model cannot be cut so.
        ScheduleError: There is no such schedule.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("pp",))
        >>> stages, parts = split_model_into_stages(model, mesh["pp"], "pp", "interleaved-1f1b", layers_per_stage=1)
        >>> [(stage.stage_index, stage.num_stages) for stage in stages]  # on one rank
        [(0, 2), (1, 2)]
    """
    validate_hf_model_for_pipeline_support(model)
    ranks, rank = pp_mesh.size(), pp_mesh.get_local_rank()
    plan = pp_schedule if isinstance(pp_schedule, Plan) else None
    if module_names_per_stage is not None:
        count = len(module_names_per_stage)
    elif plan is not None:
        count = plan.placement.num_stages
    else:
        layers = find_layout(model).num_layers if layers_per_stage is not None else 0
        single = get_schedule_class(_name(pp_schedule)).chunks == 1
        count, _ = calculate_virtual_stages(layers, layers_per_stage, ranks, single, round_to_pp_multiple)
    mine = _placement(pp_schedule, ranks, count).local_stages(rank)
    found = split_causal_lm(
        model, count, mine, input_weight=0, output_weight=0, module_names=module_names_per_stage
    )  # evenly by layers
    parts = [_placed(found[index], device) for index in mine]
    group = pp_mesh.get_group()
    return [PipelineStage(part, i, count, device, group=group) for i, part in zip(mine, parts, strict=True)], parts


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: str | os.PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: Sequence[PipelineStage],
    loss_fn: LossFn | None,
    scale_grads: bool = False,
) -> PipelineSchedule:
    """Binds a schedule to this rank's stages.

    Args:
        pipeline_parallel_schedule_csv: Path of a CSV file with a schedule; wins over the name.
        pipeline_parallel_schedule: A schedule's name.
        microbatch_size: Rows of a micro-batch.
        local_batch_size: Rows of a batch.
        stages: This rank's.
        loss_fn: `loss_fn(logits, target)`.
        scale_grads: True for means over the batch, False for sums over micro-batches.

    Raises:
        FileNotFoundError: There is no such file.
        ScheduleError: The sizes do not fit each other or the schedule; a ValueError.

    Example:
        >>> stages = [PipelineStage(nn.Linear(4, 3), stage_index=0, num_stages=1)]
        >>> build_pipeline_schedule(None, "1f1b", 2, 8, stages, nn.functional.cross_entropy)
        PipelineSchedule('1f1b', stages [0] here, 4 micro-batches)
    """
    count = check_batch(local_batch_size, microbatch_size)
    plan = read_plan(pipeline_parallel_schedule_csv)
    name = plan if plan is not None else get_schedule_class(_name(pipeline_parallel_schedule)).name
    return PipelineSchedule(
        name, stages, loss_fn, n_microbatches=count, microbatch_size=microbatch_size, mean=scale_grads
    )


def pipeline_model(
    model: nn.Module,
    world_mesh: Any,
    moe_mesh: Any = None,
    *,
    pp_axis_name: str = "pp",
    dp_axis_names: tuple[str, ...] = ("dp",),
    cp_axis_name: str | None = None,
    tp_axis_name: str | None = None,
    ep_axis_name: str | None = None,
    ep_shard_axis_names: tuple[str, ...] | None = None,
    layers_per_stage: int | None = None,
    pipeline_parallel_schedule_csv: str | None = None,
    pipeline_parallel_schedule: str | None = "1f1b",
    microbatch_size: int = 1,
    local_batch_size: int = 1,
    device: torch.device | str | None = None,
    loss_fn: LossFn | None = None,
    parallelize_fn: Callable[..., Any] | None = None,
    module_fqns_per_model_part: Sequence[Sequence[str]] | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    scale_grads: bool = False,
    round_to_pp_multiple: str | None = None,
    patch_stage_backward_maybe_with_nosync: bool = False,
) -> PipelinedModel:
    """Cuts a model, makes its stages parallel, and binds the schedule. It does not set process groups up.

    Arguments are the fields of `AutoPipelineConfig`, some under the names that `build_pipeline_schedule` gives them.

    Raises:
        PipelineError: The pipeline axis has one rank, which `AutoPipeline` takes; an AssertionError, too.
        SplitError: The model cannot be cut so.
        ScheduleError: The schedule does not fit.

    Example:
        On every rank::

            schedule, parts, has_first, has_last, stages = pipeline_model(model, mesh, None, loss_fn=loss_fn)
    """
    if not pipeline_mesh(world_mesh, pp_axis_name).size() > 1:
        raise BuildError(f"Pipeline parallelism is not enabled: axis {pp_axis_name!r} of the mesh has one rank")
    config = AutoPipelineConfig(
        world_mesh=world_mesh,
        moe_mesh=moe_mesh,
        pp_axis_name=pp_axis_name,
        dp_axis_names=dp_axis_names,
        cp_axis_name=cp_axis_name,
        tp_axis_name=tp_axis_name,
        ep_axis_name=ep_axis_name,
        ep_shard_axis_names=ep_shard_axis_names,
        layers_per_stage=layers_per_stage,
        pp_schedule_csv=pipeline_parallel_schedule_csv,
        pp_schedule=pipeline_parallel_schedule,
        pp_microbatch_size=microbatch_size,
        pp_batch_size=local_batch_size,
        device=device,  # type: ignore[arg-type]  # None leaves the stages where they are
        module_fqns_per_model_part=module_fqns_per_model_part,
        scale_grads_in_schedule=scale_grads,
        round_virtual_stages_to_pp_multiple=round_to_pp_multiple,
    )
    return make_pipeline(model, config, loss_fn, parallelize_fn)


def make_pipeline(
    model: nn.Module, config: AutoPipelineConfig, loss_fn: LossFn | None, parallelize_fn: Callable[..., Any] | None
) -> PipelinedModel:
    """What `pipeline_model` and `AutoPipeline` have in common."""
    schedule: Any = read_plan(config.pp_schedule_csv) or config.pp_schedule
    mesh = pipeline_mesh(config.world_mesh, config.pp_axis_name)
    stages, parts = split_model_into_stages(
        model,
        mesh,
        config.pp_axis_name,
        schedule,
        config.device,
        config.module_fqns_per_model_part,
        config.layers_per_stage,
        config.patch_inner_model,
        config.patch_causal_lm_model,
        config.round_virtual_stages_to_pp_multiple,
    )
    for part in parts:
        if config.dtype is not None:
            part.to(dtype=config.dtype)
    if parallelize_fn is not None:
        axes = {name: getattr(config, name) for name in _AXES}
        made = [parallelized(part, parallelize_fn, config.world_mesh, config.moe_mesh, axes) for part in parts]
        for place, (part, new) in enumerate(zip(parts, made, strict=True)):
            if new is not part:
                parts[place], stages[place] = new, replace(stages[place], submod=new)
        if not any(p.is_meta for part in parts for p in part.parameters()):
            check_shared(stages)
    bound = build_pipeline_schedule(
        config.pp_schedule_csv,
        config.pp_schedule,
        config.pp_microbatch_size,
        config.pp_batch_size,
        stages,
        loss_fn,
        scale_grads=config.scale_grads_in_schedule,
    )
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)
    return PipelinedModel(bound, parts, first, last, stages)


def read_plan(csv: str | os.PathLike[str] | None) -> Plan | None:
    """The plan in a CSV file.

    Raises:
        FileNotFoundError: There is no such file.
        ScheduleError: It is no plan.
    """
    if csv is None:
        return None
    if not os.path.isfile(csv):
        raise FileNotFoundError(f"there is no file {os.fspath(csv)!r} with a schedule (pp_schedule_csv)")
    return Plan.from_csv(Path(csv).read_text(), name=Path(csv).stem)


def _name(schedule: Any) -> str:
    if schedule is None:
        raise ScheduleError("no schedule is given: pass a name such as '1f1b', or the path of a CSV file with one")
    return str(schedule)


def _placement(schedule: str | Plan | None, ranks: int, count: int) -> Placement:
    if isinstance(schedule, Plan):
        placement = schedule.placement
        if (placement.num_ranks, placement.num_stages) != (ranks, count):
            raise ScheduleError(
                f"the plan {schedule.name!r} is for {placement.num_ranks} ranks and {placement.num_stages} stages; "
                f"here are {ranks} ranks and {count} stages"
            )
        return placement
    if count < ranks or count % ranks:
        raise ScheduleError(f"{count} stages cannot be dealt out to {ranks} ranks; cut into a multiple of {ranks}")
    return get_schedule_class(_name(schedule)).place(ranks, count // ranks)


def _placed(part: nn.Module, device: torch.device | str | None) -> nn.Module:
    """A stage on its device; one on the meta device has nothing to move yet."""
    if device is None or any(parameter.is_meta for parameter in part.parameters()):
        return part
    return part.to(device)
