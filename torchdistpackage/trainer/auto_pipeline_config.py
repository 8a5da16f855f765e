"""What `AutoPipeline` is told, and what it tells: data only.

The fields have the names, defaults and meanings of NVIDIA NeMo AutoModel's, so that a configuration moves over as it
is. Those that steer how that library patches models or runs torch's schedules have nothing to do here; they say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from torchdistpackage.errors import ScheduleError

if TYPE_CHECKING:
    from torchdistpackage.split.pipeline_stage import PipelineStage
    from torchdistpackage.trainer.auto_pipeline_schedule import PipelineSchedule

__all__ = ["AutoPipelineConfig", "ParallelizeFnProtocol", "PipelineInfo"]


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class AutoPipelineConfig:
    """How a model is cut, scheduled and placed.

    Attributes:
        world_mesh: Device mesh of all ranks, with a pipeline axis.
        moe_mesh: Device mesh for experts; handed to `parallelize_fn`.
        pp_axis_name: Axis of `world_mesh` along which stages lie.
        dp_axis_names: Axes along which replicas lie; those that the mesh does not have are passed over.
        cp_axis_name: Context-parallel axis; for `parallelize_fn`.
        tp_axis_name: Tensor-parallel axis.
        ep_axis_name: Expert-parallel axis of `moe_mesh`; for `parallelize_fn`.
        ep_shard_axis_names: Axes of `moe_mesh` over which experts are sharded; for `parallelize_fn`.
        pp_schedule: A schedule's name, in this library's or in torch's spelling; None with `pp_schedule_csv`.
        pp_schedule_csv: Path of a CSV file with a schedule: one line a rank, one action a cell.
        pp_microbatch_size: Rows of a micro-batch.
        pp_batch_size: Rows of a rank's batch. A batch of another size is run in micro-batches of the same size.
        layers_per_stage: The most layers of a stage; None for one stage a rank, two under schedules of several.
        round_virtual_stages_to_pp_multiple: `"up"` or `"down"`, where `layers_per_stage` gives no multiple of them.
        module_fqns_per_model_part: Names of the modules of each stage; every module with parameters, once.
        patch_inner_model: Accepted; the model keeps its own forward, so nothing is patched.
        patch_causal_lm_model: Accepted; nothing is patched.
        device: Where the stages of this rank compute.
        dtype: The stages are moved to it; None to leave them.
        scale_grads_in_schedule: True: loss and gradients are means over the batch. False: sums over micro-batches.
        visualization_font_size_offset: Accepted; pictures choose their own sizes.
        patch_stage_backward_maybe_with_nosync: Accepted; data-parallel modules are reduced once a step anyway.
        defer_fsdp_grad_sync: Accepted; they are reduced with the last backward anyway.
        pp_seq_len: Accepted; the form of messages is learnt from the first micro-batch.

    Example:
        >>> AutoPipelineConfig(pp_microbatch_size=2, pp_batch_size=8).validate()
    """

    world_mesh: Any = None
    moe_mesh: Any = None
    pp_axis_name: str = "pp"
    dp_axis_names: tuple[str, ...] = ("dp",)
    cp_axis_name: str | None = None
    tp_axis_name: str | None = None
    ep_axis_name: str | None = None
    ep_shard_axis_names: tuple[str, ...] | None = None
    pp_schedule: str | None = "1f1b"
    pp_schedule_csv: str | None = None
    pp_microbatch_size: int = 1
    pp_batch_size: int = 1
    layers_per_stage: int | None = None
    round_virtual_stages_to_pp_multiple: str | None = None
    module_fqns_per_model_part: Sequence[Sequence[str]] | None = None
    patch_inner_model: bool = True
    patch_causal_lm_model: bool = True
    device: torch.device | str = field(default_factory=_default_device)
    dtype: torch.dtype | None = None
    scale_grads_in_schedule: bool = False
    visualization_font_size_offset: int = 0
    patch_stage_backward_maybe_with_nosync: bool = False
    defer_fsdp_grad_sync: bool = True
    pp_seq_len: int | None = None

    def validate(self) -> None:
        """Looks for what cannot work, whatever the model.

        Raises:
            ValueError: There is no schedule, or the sizes do not fit.

        Example:
            >>> AutoPipelineConfig(pp_microbatch_size=3, pp_batch_size=4).validate()
            Traceback (most recent call last):
                ...
            torchdistpackage.errors.ScheduleError: local_batch_size must be divisible by ...
        """
        if self.pp_schedule is None and self.pp_schedule_csv is None:
            raise ScheduleError(
                "Either pipeline_parallel_schedule or pipeline_parallel_schedule_csv must be provided: "
                "pp_schedule='1f1b', or pp_schedule_csv='mine.csv'"
            )
        check_batch(self.pp_batch_size, self.pp_microbatch_size)
        if self.round_virtual_stages_to_pp_multiple not in (None, "up", "down"):
            raise ScheduleError(
                "round_virtual_stages_to_pp_multiple must be 'up', 'down' or None, got "
                f"{self.round_virtual_stages_to_pp_multiple!r}"
            )


def check_batch(batch: int, microbatch: int) -> int:
    """The number of micro-batches.

    Raises:
        ValueError: The sizes do not fit.
    """
    if microbatch < 1 or batch < 1:
        raise ScheduleError(f"batch and micro-batch have at least 1 row, got {batch} and {microbatch}")
    if batch % microbatch:
        raise ScheduleError(
            f"local_batch_size must be divisible by microbatch_size, got {batch} and {microbatch}; single batches of "
            "another size are fine in step()"
        )
    return batch // microbatch


@dataclass
class PipelineInfo:
    """What `AutoPipeline.build` has made on this rank.

    Attributes:
        enabled: Whether it has been built.
        schedule: Runs batches.
        has_first_stage: Whether this rank takes the batch.
        has_last_stage: Whether this rank computes the loss.
        model_parts: This rank's stages as modules, in the order of the model.
        stages: The same with their places.

    Example:
        >>> PipelineInfo().enabled  # before `build`
        False
    """

    enabled: bool = False
    schedule: PipelineSchedule | None = None
    has_first_stage: bool = False
    has_last_stage: bool = False
    model_parts: list[nn.Module] | None = None
    stages: list[PipelineStage] | None = None


class ParallelizeFnProtocol(Protocol):
    """Shards or wraps one stage: called once for each stage of this rank, after it was moved to its device.

    Example:
        Layers are sharded over the data axes, in place::

            def parallelize_fn(model, world_mesh, moe_mesh, *, dp_axis_names, **axes):
                fully_shard(model, mesh=world_mesh[dp_axis_names])

            AutoPipeline(world_mesh=mesh).build(model, loss_fn=loss_fn, parallelize_fn=parallelize_fn)
    """

    def __call__(
        self,
        model: nn.Module,
        world_mesh: Any,
        moe_mesh: Any,
        *,
        dp_axis_names: tuple[str, ...],
        cp_axis_name: str | None = None,
        tp_axis_name: str | None = None,
        ep_axis_name: str | None = None,
        ep_shard_axis_names: tuple[str, ...] | None = None,
    ) -> nn.Module | None:
        """Changes the stage in place, or returns a module that takes its place.

        A function that has a parameter `pp_enabled` gets True in it.

        Args:
            model: The stage.
            world_mesh: As configured.
            moe_mesh: As configured.
            dp_axis_names: As configured.
            cp_axis_name: As configured.
            tp_axis_name: As configured.
            ep_axis_name: As configured.
            ep_shard_axis_names: As configured.
        """
