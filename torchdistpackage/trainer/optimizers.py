"""The optimizer and the learning rate schedule of a run: defaults, and what the user brings instead.

Each rank makes its own optimizer, over its stages; parameters come with their names in the whole model, so that a
checkpoint fits any other layout. The groups are the same on every rank, filled or empty::

    group 0   weights               weight_decay
    group 1   biases, norms, 1-d    0

Neighbours: `assembly.py` makes both, `replication.py` shards the optimizer, `training_loop.py` steps them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchdistpackage.errors import TrainerError

__all__ = ["default_optimizer", "make_optimizer", "make_scheduler"]

NamedParameters = Iterable[tuple[str, nn.Parameter]]
_NORM = re.compile(r"(^|[._])(layer_?|rms_?|batch_?|group_?)?norm\d*([._]|$)", re.IGNORECASE)


def default_optimizer(named_parameters: NamedParameters, args: Any) -> torch.optim.Optimizer:
    """AdamW with `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay`; fused on CUDA.

    Biases, parameters of norms, and all others of one dim or none do not decay. (Hugging Face's Trainer goes by names
    and types of modules only; it differs for parameters of one dim that are neither, such as layer scales.)

    Args:
        named_parameters: Names in the whole model, and parameters; those without gradient are left out.
        args: The training arguments.

    Example:
        >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
        >>> args = PipelineTrainingArguments(weight_decay=0.1)
        >>> optimizer = default_optimizer(nn.Linear(2, 2).named_parameters(), args)
        >>> [(group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
        [(0.1, ['weight']), (0.0, ['bias'])]
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    fused = bool(named) and all(each.device.type == "cuda" and each.is_floating_point() for _, each in named)
    return torch.optim.AdamW(
        _groups(named, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=fused or None,
    )


def make_optimizer(
    named_parameters: NamedParameters,
    args: Any,
    optimizer_factory: Callable[..., torch.optim.Optimizer] | None = None,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of this rank's parameters.

    A rank without trainable parameters gets one as well, with nothing in it.

    Args:
        named_parameters: As `default_optimizer` takes them.
        args: The training arguments.
        optimizer_factory: Called with a list of (name, parameter), as torch's optimizers take it; returns the
            optimizer: `partial(torch.optim.SGD, lr=0.1)` is one.
        optimizer_cls_and_kwargs: Its class and arguments; groups are those of the default. `lr` is `learning_rate` and
            `weight_decay` the arguments' if they are not among them.

    Raises:
        TrainerError: Both are given, or the factory returns no optimizer.

    Example:
        >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
        >>> named = nn.Linear(2, 2).named_parameters()
        >>> make_optimizer(named, PipelineTrainingArguments(), partial(torch.optim.SGD, lr=0.1)).param_groups[0]["lr"]
        0.1
    """
    if optimizer_factory is not None and optimizer_cls_and_kwargs is not None:
        raise TrainerError("optimizer_factory and optimizer_cls_and_kwargs are both given: leave one of them out")
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if optimizer_cls_and_kwargs is not None:
        kind, given = optimizer_cls_and_kwargs
        options = {"lr": args.learning_rate, **(given or {})}
        return kind(_groups(named, options.pop("weight_decay", args.weight_decay)), **options)
    if optimizer_factory is None:
        return default_optimizer(named, args)
    # a factory may take the pairs apart, so it always gets one; what has no elements is taken out again
    made = optimizer_factory(named or [("none", nn.Parameter(torch.empty(0)))])
    if not hasattr(made, "step") or not hasattr(made, "param_groups"):
        raise TrainerError(f"optimizer_factory must return an optimizer, got {type(made).__name__}")
    if not named:
        for group in made.param_groups:
            group.update({key: [] for key in ("params", "param_names") if key in group})
    return made


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    args: Any,
    total_steps: int,
    lr_scheduler_factory: Callable[..., Any] | None = None,
) -> Any:
    """The learning rate schedule of an optimizer; it is stepped once after each step of the optimizer.

    Args:
        optimizer: This rank's.
        args: The training arguments: `lr_scheduler_type`, `lr_scheduler_kwargs`, and what says how long to warm up.
        total_steps: Optimizer steps of the whole run.
        lr_scheduler_factory: Called with `optimizer=` and, where it takes them, `num_warmup_steps=` and
            `num_training_steps=`; returns the schedule.

    Raises:
        TrainerError: The schedule is unknown, or does not take these options, or needs transformers, which is missing.

    Example:
        >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
        >>> args = PipelineTrainingArguments(learning_rate=1.0, warmup_steps=2)
        >>> optimizer = default_optimizer(nn.Linear(1, 1).named_parameters(), args)
        >>> scheduler, rates = make_scheduler(optimizer, args, total_steps=4), []
        >>> for _ in range(4):
        ...     rates.append(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.5]
    """
    steps = {"num_warmup_steps": args.warmup(total_steps), "num_training_steps": total_steps}
    if lr_scheduler_factory is not None:
        return _from_factory(lr_scheduler_factory, optimizer, steps)
    name, options = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs)
    if name not in _SHAPES:
        return _of_transformers(name, optimizer, steps, options)
    known = set(inspect.signature(_SHAPES[name]).parameters) - {"step", "warmup", "total"}
    if not set(options) <= known:
        raise TrainerError(
            f"lr_scheduler_type={name!r} takes "
            f"{'the options ' + ', '.join(sorted(known)) if known else 'no lr_scheduler_kwargs'}; got {options}"
        )
    shape = partial(_SHAPES[name], warmup=steps["num_warmup_steps"], total=total_steps, **options)
    return LambdaLR(optimizer, shape)


def _groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    decaying = {name: each.dim() > 1 and not name.endswith("bias") and not _NORM.search(name) for name, each in named}
    return [
        {
            "params": [each for name, each in named if decaying[name] is decays],
            "param_names": [name for name, _ in named if decaying[name] is decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def _from_factory(factory: Callable[..., Any], optimizer: torch.optim.Optimizer, steps: dict[str, int]) -> Any:
    try:
        takes = inspect.signature(factory).parameters
    except ValueError:  # some callables in C have none
        return factory(optimizer=optimizer)
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    given = {name: value for name, value in steps.items() if anything or name in takes}
    if anything or "optimizer" in takes:
        return factory(optimizer=optimizer, **given)
    return factory(optimizer, **given)


def _of_transformers(
    name: str, optimizer: torch.optim.Optimizer, steps: dict[str, int], options: dict[str, Any]
) -> Any:
    try:
        from transformers import get_scheduler
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"lr_scheduler_type={name!r} is transformers' own: pip install 'torchdistpackage[hf]', or take one of "
            f"{', '.join(_SHAPES)}"
        ) from error
    try:
        return get_scheduler(name, optimizer, scheduler_specific_kwargs=options, **steps)
    except (ValueError, TypeError) as error:
        raise TrainerError(
            f"transformers has no schedule lr_scheduler_type={name!r} with {options}: {error}"
        ) from error


def _rising(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _constant(step: int, *, warmup: int, total: int) -> float:
    return 1.0


def _constant_with_warmup(step: int, *, warmup: int, total: int) -> float:
    return _rising(step, warmup) if step < warmup else 1.0


def _linear(step: int, *, warmup: int, total: int) -> float:
    return _rising(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, *, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    if step < warmup:
        return _rising(step, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))


_SHAPES: dict[str, Callable[..., float]] = {  # factors of the learning rate
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
}
