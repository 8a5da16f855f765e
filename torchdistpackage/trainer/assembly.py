r"""A model, the arguments and the data -> everything that a run consists of, on this rank.

::

    model_init | model --cut_model--> stages --replicated--> steps of training
                                        |  \------------->  steps of evaluation: no wrapper reduces or broadcasts there
                                        +--> names, parameters --> optimizer --> scheduler

Neighbours: `stages.py` cuts and fills, `replication.py` wraps, `optimizers.py` makes the defaults;
`pipeline_trainer.py` runs what is made here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchdistpackage.errors import TrainerError
from torchdistpackage.parallel import PipelineGradScaler
from torchdistpackage.parallel.agreement import together
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Placement, Plan, describe, names
from torchdistpackage.split.pipe import put_aside, stages_in_use
from torchdistpackage.topology import tpc
from torchdistpackage.trainer.arguments import PipelineTrainingArguments
from torchdistpackage.trainer.batches import Batch
from torchdistpackage.trainer.feed import first_rows
from torchdistpackage.trainer.losses import WeightedLoss
from torchdistpackage.trainer.optimizers import make_optimizer, make_scheduler
from torchdistpackage.trainer.replication import quiet_contexts, replicated, sharded_optimizer
from torchdistpackage.trainer.stages import CutModel, cut_model
from torchdistpackage.trainer.steps import PipelineSteps

__all__ = ["Factories", "Run", "build_run", "cut_for"]

Factory = Callable[..., Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factories:
    """What a user makes himself; None for the defaults.

    Attributes:
        optimizer: Takes a list of (whole-model name, parameter).
        optimizer_cls_and_kwargs: A class and its options, instead.
        lr_scheduler: Takes the optimizer.
    """

    optimizer: Factory | None = None
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None
    lr_scheduler: Factory | None = None


@dataclass(frozen=True)
class Run:
    """What a run consists of, on this rank.

    Attributes:
        cut: The model in stages.
        stages: Global index -> stage, wrapped for data parallelism.
        modules: The same unwrapped, in one list.
        training: Runs batches with gradients.
        evaluation: Runs batches without.
        optimizer: Over this rank's parameters, sharded where asked for.
        scheduler: Of its learning rates.
        scaler: For float16, else None.
        device: Where this rank computes.
    """

    cut: CutModel
    stages: dict[int, nn.Module]
    modules: nn.ModuleList
    training: PipelineSteps
    evaluation: PipelineSteps
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: PipelineGradScaler | None
    device: torch.device


def placement_for(args: PipelineTrainingArguments) -> Placement:
    """Which rank has which stage.

    Raises:
        ScheduleError: The schedule does not run so many stages a rank.
    """
    schedule = args.resolved_schedule
    return placement_of(schedule, tpc.get_pp_size(), None if isinstance(schedule, Plan) else args.chunks)


def cut_for(
    args: PipelineTrainingArguments,
    *,
    model: nn.Module | None,
    model_init: Callable[[], nn.Module] | None,
    splitter: Any,
    example: Batch,
    device: torch.device,
    seed: int,
) -> CutModel:
    """Makes the model, and this rank's stages of it with their first weights.

    Args:
        args: Say how.
        model: The model, or
        model_init: what makes it.
        splitter: None for the default one.
        example: A batch as the first stage gets it.
        device: Where this rank computes.
        seed: Of the weights, the same on every rank.

    Raises:
        TrainerError: Neither or both of model and model_init are given, or it knows no gradient checkpointing.
        SplitError: The model cannot be cut, or the splitter returns something else.
    """
    if (model is None) == (model_init is None):
        raise TrainerError(
            "give either model_init=..., a function that makes the model, or model=..., the model itself"
        )
    if model_init is not None and not callable(model_init):
        raise TrainerError(f"model_init must be a function that returns the model, got a {type(model_init).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TrainerError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}; a function goes to model_init"
        )
    rows = -(-example.rows // (args.n_microbatches or 1))
    args_of_one, kwargs_of_one = first_rows((example.args, example.kwargs), example.rows, rows)
    before = {id(stage.module) for stage in stages_in_use()}
    cut = cut_model(
        model=model if model is None else _prepared(model, args),
        model_init=None if model_init is None else lambda: _made(model_init, args, device),
        splitter=splitter,
        placement=placement_for(args),
        rank=tpc.get_pp_rank(),
        group=tpc.get_group("pipe"),
        device=device,
        example_args=args_of_one,
        example_kwargs=kwargs_of_one,
        seed=seed,
        construct_on="meta" if args.construct_model_on == "meta" else "cpu",
    )
    for stage in list(stages_in_use()):
        if id(stage.module) not in before:
            put_aside(stage.module)  # steps.py puts them in use while they run: another trainer may have cut otherwise
    return cut


def _made(model_init: Callable[[], nn.Module], args: PipelineTrainingArguments, device: torch.device) -> nn.Module:
    dtype = args.default_dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        if args.construct_model_on == "device":
            stack.enter_context(device)
        model = model_init()
    if not isinstance(model, nn.Module):
        raise TrainerError(f"model_init must return a torch.nn.Module, it returned a {type(model).__name__}")
    return _prepared(model, args)


def _prepared(model: nn.Module, args: PipelineTrainingArguments) -> nn.Module:
    if args.gradient_checkpointing:
        enable: Any = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise TrainerError(
                f"gradient_checkpointing=True, but {type(model).__name__} has no gradient_checkpointing_enable: wrap "
                "its layers in torch.utils.checkpoint in model_init, and leave the argument out"
            )
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build_run(
    args: PipelineTrainingArguments,
    cut: CutModel,
    *,
    loss: WeightedLoss,
    factories: Factories,
    total_steps: int,
    device: torch.device,
) -> Run:
    """Wraps the stages, and makes optimizer, scheduler and scaler.

    Args:
        args: Say how.
        cut: The stages.
        loss: The loss function.
        factories: What the user makes himself.
        total_steps: Optimizer steps of the whole run.
        device: Where this rank computes.

    Raises:
        TrainerError: A factory returned something else, or stages cannot be sharded.
    """
    modules = nn.ModuleList(cut.stages.values())
    names = {id(parameter): name for name, parameter in cut.names.items()}
    paths = {path: names[id(each)] for path, each in modules.named_parameters() if id(each) in names}
    if args.torch_compile:
        for module in modules:
            module.compile()
    stages = replicated(cut.stages, args.data_parallel)
    now = dict(modules.named_parameters())  # fully_shard has put others in their places
    named = [(name, now[path]) for path, name in paths.items()]
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    made = together(
        lambda: make_optimizer(trained, args, factories.optimizer, factories.optimizer_cls_and_kwargs),
        "make the optimizer",
        TrainerError,
    )
    optimizer = sharded_optimizer(made, args.data_parallel)
    scheduler = together(
        lambda: make_scheduler(optimizer, args, total_steps, factories.lr_scheduler),
        "make the learning rate schedule",
        TrainerError,
    )
    if isinstance(scheduler, ReduceLROnPlateau) and args.eval_strategy == "no":
        raise TrainerError(
            "ReduceLROnPlateau looks at metric_for_best_model of evaluations, and there are none: pass "
            "eval_strategy='steps' or 'epoch'"
        )
    scaler = PipelineGradScaler(device.type) if args.fp16 else None
    common: dict[str, Any] = {
        "num_stages": placement_for(args).num_stages,
        "schedule": args.resolved_schedule,
        "microbatches": args.n_microbatches,
        "loss": loss,
        "device": device,
        "autocast": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "mask_creator": cut.mask_creator,
        "is_fixed": isinstance(args.resolved_schedule, Plan),
    }
    if args.debug_pipeline or args.debug_split_model or args.debug_model_params or args.debug_model_init:
        _describe(args, cut)
    return Run(
        cut,
        stages,
        modules,
        PipelineSteps(
            stages,
            **common,
            scaler=scaler,
            merges=_holds_few(args.resolved_schedule),
            quiet=quiet_contexts(stages, optimizer),
        ),
        PipelineSteps(dict(cut.stages), **common),
        optimizer,
        scheduler,
        scaler,
        device,
    )


def _holds_few(schedule: str | Plan) -> bool:
    """Whether more micro-batches cost no more memory; of a plan that is chosen later nobody knows."""
    return isinstance(schedule, str) and schedule in names() and describe(schedule).memory != "m"


def _describe(args: PipelineTrainingArguments, cut: CutModel) -> None:
    """Logs what the `debug_` arguments ask for."""
    placement, rank = placement_for(args), tpc.get_pp_rank()
    if args.debug_pipeline:
        ranks = [list(placement.local_stages(other)) for other in range(placement.num_ranks)]
        _log.info(
            "schedule %s, %s micro-batches, stages of the ranks: %s", args.resolved_schedule, args.n_microbatches, ranks
        )
    for index, stage in cut.stages.items():
        if args.debug_split_model:
            _log.info("stage %d on rank %d:\n%s", index, rank, stage)
        if args.debug_model_params:
            told = [f"{name} {tuple(each.shape)} {each.dtype}" for name, each in stage.named_parameters()]
            _log.info("stage %d on rank %d has the parameters\n%s", index, rank, "\n".join(told))
    if args.debug_model_init:
        _log.info("rank %d has %d of the model's parameters, %d in all", rank, len(cut.names), cut.num_parameters)
