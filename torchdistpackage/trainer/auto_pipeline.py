"""A Hugging Face model, a device mesh and a loss -> pipeline-parallel steps.

::

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("pp",))
    ap = AutoPipeline(world_mesh=mesh, pp_schedule="1f1b", pp_microbatch_size=1, pp_batch_size=8)
    ap.build(model, loss_fn=loss_fn)
    optimizer = torch.optim.AdamW(ap.parameters(), lr=1e-4)

    loss = ap.step(input_ids, target=labels, attention_mask=mask)
    ap.clip_grad_norm(1.0)
    optimizer.step()
    optimizer.zero_grad()

The interface is that of NVIDIA NeMo AutoModel's AutoPipeline. What runs is this library: the model keeps its own
forward (`split/causal_lm.py`), any schedule of the catalogue runs it (`parallel/pipeline_sched.py`), and the numbers
are those of the plain loop. Neighbours: `functional.py` has the pieces, `auto_pipeline_config.py` the settings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import PipelineError, TopologyError
from torchdistpackage.parallel import clip_grad_norm_, generate
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.split.ties import ties_of
from torchdistpackage.topology import tpc
from torchdistpackage.trainer import functional
from torchdistpackage.trainer.auto_pipeline_config import AutoPipelineConfig, ParallelizeFnProtocol, PipelineInfo
from torchdistpackage.trainer.auto_pipeline_report import (
    ParameterCounts,
    count_parameters,
    describe_stages,
    stage_modules,
)
from torchdistpackage.trainer.auto_pipeline_schedule import LossFn, PipelineSchedule
from torchdistpackage.trainer.gradients import divide_gradients
from torchdistpackage.trainer.mesh_topology import adopt_mesh, pipeline_mesh
from torchdistpackage.visualize import figure, unit_timeline

__all__ = ["AutoPipeline", "AutoPipelineConfig", "ParallelizeFnProtocol", "PipelineInfo"]

_log = logging.getLogger(__name__)


@final
class AutoPipeline:
    """Trains one model over the pipeline axis of a device mesh.

    Args:
        config: An `AutoPipelineConfig`; or leave it out and give its fields by name.
        **options: Its fields.

    Attributes:
        cfg: The configuration.
        world_mesh: Its mesh.
        pp_mesh: The mesh's pipeline axis.

    Raises:
        ScheduleError: The configuration cannot work; a ValueError.
        TopologyError: There is no mesh, or it has no such axis; a ValueError.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> def loss_fn(logits, target):
        ...     return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("pp",))  # (4,) on four ranks
        >>> ap = AutoPipeline(world_mesh=mesh, pp_microbatch_size=2, pp_batch_size=8, device="cpu")
        >>> optimizer = torch.optim.AdamW(ap.build(model, loss_fn=loss_fn).parameters(), lr=1e-4)
        >>> tokens = torch.ones(8, 6, dtype=torch.int64)
        >>> losses = []
        >>> loss = ap.step(tokens, target=tokens, losses=losses)
        >>> ap.scale_grads_by_divisor(len(losses))  # gradients are sums over the micro-batches
        >>> norm = ap.clip_grad_norm(1.0)
        >>> optimizer.step()
        >>> ap.eval(tokens).shape, ap.generate(tokens[:1, :2], max_new_tokens=3).shape
        (torch.Size([8, 6, 16]), torch.Size([1, 5]))
        >>> print(ap.debug_summary())
        PP degree: 1
        Local stages: 1
        Schedule: 1f1b
        n_microbatches: 4
        Total params: 1,952 (trainable: 1,952)
    """

    def __init__(self, config: AutoPipelineConfig | Any = None, /, **options: Any) -> None:
        if not isinstance(config, AutoPipelineConfig):
            config = AutoPipelineConfig(**({} if config is None else {"world_mesh": config}), **options)
        elif options:
            raise TypeError(f"{', '.join(options)} belong(s) into the AutoPipelineConfig that is given as well")
        if config.world_mesh is None:
            raise TopologyError(
                "AutopipelineConfig.world_mesh must be provided: init_device_mesh('cuda', (4,), "
                "mesh_dim_names=('pp',)) is one"
            )
        config.validate()
        self.cfg: AutoPipelineConfig = config
        self.world_mesh = config.world_mesh
        self.pp_mesh = pipeline_mesh(config.world_mesh, config.pp_axis_name)
        self._device = torch.device(config.device)
        self._info = PipelineInfo()
        self._counts = ParameterCounts()

    def __getattr__(self, name: str) -> Any:
        """The fields of the configuration can be read here, too."""
        if name != "cfg" and name in AutoPipelineConfig.__dataclass_fields__:
            return getattr(self.cfg, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def build(
        self, model: nn.Module, *, loss_fn: LossFn | None = None, parallelize_fn: Callable[..., Any] | None = None
    ) -> AutoPipeline:
        """Cuts the model and keeps this rank's stages. Every rank calls it, with the same model.

        The stages share the model's parameters: drop the model to free those of other ranks. If `tpc` is not set up, it
        is, to the layout of the mesh.

        Args:
            model: A causal language model, also on the meta device.
            loss_fn: `loss_fn(logits, target)`, a scalar; runs on the last stage, on one micro-batch.
            parallelize_fn: Shards or wraps one stage; see `ParallelizeFnProtocol`.

        Raises:
            PipelineError: There is no loss or no model; an AssertionError, too.
            SplitError: The model cannot be cut so.
            ScheduleError: The schedule does not fit the stages.
            TopologyError: The mesh does not fit the world, or what `tpc` is set up to.
        """
        if loss_fn is None:
            raise functional.BuildError("loss_fn must be provided: loss_fn(logits, target) -> a scalar tensor")
        if not isinstance(model, nn.Module):
            raise functional.BuildError(f"model must be a PyTorch module, got {type(model).__name__}")
        cfg = self.cfg
        adopt_mesh(cfg.world_mesh, cfg.pp_axis_name, cfg.dp_axis_names, cfg.tp_axis_name)
        self._counts = ParameterCounts.of(model)
        made = functional.make_pipeline(model, cfg, loss_fn, parallelize_fn)
        _forget_former_ties(model, made.schedule)
        self._info = PipelineInfo(
            True, made.schedule, made.has_first_stage, made.has_last_stage, made.model_parts, made.stages
        )
        return self

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(
        self, model_input: Any = None, *, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Trains on one batch: as `PipelineSchedule.step`. Gradients are added to; the optimizer is yours."""
        step: Tensor | None = self._built().step(model_input, target=target, losses=losses, **kwargs)
        return step

    def eval(
        self, model_input: Any = None, *, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Evaluates one batch: as `PipelineSchedule.eval`. Whether modules are in `eval()` mode is yours."""
        return self._built().eval(model_input, target=target, losses=losses, **kwargs)

    evaluate = eval

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        """Text from all stages, on every rank: `torchdistpackage.generate`.

        Args:
            input_ids: The prompts, (rows, tokens), the same on every rank.
            **options: `attention_mask`, `max_new_tokens`, `do_sample`, `num_beams`, `seed`, ...

        Raises:
            PipelineError: Nothing has been built.
        """
        schedule = self._built()
        parts = {stage.stage_index: stage.submod for stage in schedule.stages}
        return generate(parts, input_ids, schedule=schedule.schedule, **options)

    def update_seq_len(self, seq_len: int) -> None:
        """Accepted; the form of messages is learnt, and may change at every step."""

    # --- gradients ----------------------------------------------------------------------------------------------------

    def scale_grads_by_divisor(self, divisor: float) -> None:
        """Divides the gradients of this rank's stages, in place.

        Raises:
            PipelineError: Nothing has been built.
        """
        divide_gradients(self.parts, divisor)

    def clip_grad_norm(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        pp_mesh: Any = None,
        ep_axis_name: str | None = None,
    ) -> Tensor:
        """Clips gradients by the norm of the whole model; every rank calls it and gets the same norm.

        Args:
            max_norm: The norm that the gradients have at most afterwards.
            norm_type: p > 0, or `inf`.
            error_if_nonfinite: Raise, on every rank, if the norm is NaN or infinite.
            foreach: Accepted.
            pp_mesh: Accepted; the norm is always that of the whole model.
            ep_axis_name: Accepted; sharded parameters count whole.

        Raises:
            PipelineError: Nothing has been built, or another rank has failed.
            RuntimeError: The norm is not finite and `error_if_nonfinite` is set.
        """
        return clip_grad_norm_(self.parameters(), max_norm, norm_type, error_if_nonfinite)

    # --- what is there ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> PipelineInfo:
        """What `build` has made."""
        return self._info

    @property
    def parts(self) -> list[nn.Module]:
        """This rank's stages as modules, in the order of the model.

        Raises:
            PipelineError: Nothing has been built.
        """
        if self._info.model_parts is None:
            _not_built()
        return self._info.model_parts

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer: one that two stages of this rank share comes once.

        Raises:
            PipelineError: Nothing has been built.
        """
        yield from {id(p): p for part in self.parts for p in part.parameters()}.values()

    @property
    def device(self) -> torch.device:
        """Where this rank's stages compute."""
        return self._device

    def list_stage_modules(self) -> list[list[str]]:
        """For each stage of this rank the names of its modules; empty before `build`."""
        return [stage_modules(stage.submod) for stage in self._info.stages or ()]

    @staticmethod
    def _count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
        return count_parameters(module, trainable_only)

    def get_stage_param_counts(self, trainable_only: bool = False) -> list[int]:
        """For each stage of this rank the elements of its parameters."""
        return [count_parameters(stage.submod, trainable_only) for stage in self._info.stages or ()]

    def get_total_param_count(self, trainable_only: bool = False) -> int:
        """Elements of the whole model's parameters, shared ones once, when it was built; the same on every rank."""
        return self._counts.trainable if trainable_only else self._counts.total

    def pretty_print_stages(self, max_modules_per_stage: int = 16, trainable_only: bool = False) -> str:
        """A few lines about each stage of this rank.

        Args:
            max_modules_per_stage: More are not shown.
            trainable_only: Count parameters that want a gradient only.
        """
        if not self._info.stages:
            return "<no stages>"
        return describe_stages(self._info.stages, max_modules_per_stage, trainable_only)

    def debug_summary(self) -> str:
        """Sizes in a few lines."""
        schedule = self._info.schedule
        name = None if schedule is None else getattr(schedule, "name", type(schedule).__name__)
        return "\n".join(
            (
                f"PP degree: {self.pp_mesh.size()}",
                f"Local stages: {len(self._info.stages or ())}",
                f"Schedule: {name}",
                f"n_microbatches: {getattr(schedule, 'n_microbatches', None)}",
                f"Total params: {self._counts.total:,} (trainable: {self._counts.trainable:,})",
            )
        )

    def log_debug_summary(self) -> None:
        """Logs the summary and the stages."""
        _log.info("%s\n%s", self.debug_summary(), self.pretty_print_stages())

    def visualize_current_schedule(self, filename: str | os.PathLike[str] | None = None) -> Any:
        """Draws the schedule of all ranks for a batch of the usual size, with F = I = W; needs matplotlib.

        Args:
            filename: `.png`, `.svg` or `.pdf`. Ranks that write to one file write the same, one after the other.

        Returns:
            matplotlib's figure.

        Raises:
            PipelineError: Nothing has been built.
            ModuleNotFoundError: matplotlib is not installed; the message names the extra.
        """
        timeline = unit_timeline(self._built().plan)
        if filename is None:
            return figure(timeline)
        path = Path(filename)
        own = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        drawn = figure(timeline, path=own)
        own.replace(path)
        return drawn

    def _built(self) -> PipelineSchedule:
        if self._info.schedule is None:
            _not_built()
        return self._info.schedule


def _not_built() -> NoReturn:
    raise PipelineError("Autopipeline not built. Call build() first.")


def _forget_former_ties(model: nn.Module, schedule: PipelineSchedule) -> None:
    """Where an earlier cut of the same model shared parameters over other ranks: every rank forgets that."""
    if not tpc.is_mode_inited("pipe"):
        return
    owners = schedule.plan.placement.owners
    noted = {id(parameter): ties_of(parameter) for parameter in model.parameters()}
    stages = {key: () if tie is None else tie.stages for key, tie in noted.items()}
    ties().cut_again({key: tuple(sorted({owners[at] for at in places})) for key, places in stages.items()})
