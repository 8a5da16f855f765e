"""What does not fit in a run's configuration, said before anything is built; and what follows from the rest.

Each check raises one sentence with the numbers and the next thing to try. `completed` gives the values that are
derived, so that whoever reads the arguments later finds one spelling: numbers instead of None, tuples instead of single
values, plain strings instead of enumerations. Neighbours: `arguments.py` has the fields and calls this.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchdistpackage.errors import ScheduleError, TrainerError
from torchdistpackage.schedule import Plan, canonical_name, describe, names

if TYPE_CHECKING:
    from torchdistpackage.trainer.arguments import PipelineTrainingArguments

__all__ = ["chunks_of", "completed", "loaded_schedule", "read_words"]

_AUTO = {"auto": "loop", "auto-v": "v"}  # how the chunks lie under them
_MICROBATCHES = 4

_CHOICES: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("no", "steps", "epoch"),
    "logging_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch"),
    "pp_stage_type": (None, "loop", "v"),
    "data_parallel": ("ddp", "fsdp2", "zero1", "zero2"),
    "construct_model_on": ("meta", "cpu", "device"),
    "float32_matmul_precision": (None, "highest", "high", "medium"),
}
_LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "epoch_train_steps": 1,
    "save_total_limit": 1,
    "seed": -1,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "speed_metrics_start_step": 0,
    "pipeline_chunks": 1,
    "n_microbatches": 1,
    "stages_per_rank": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
_NOT_NEGATIVE = (
    "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps warmup_ratio eval_delay eval_steps "
    "logging_steps save_steps num_train_epochs"
).split()
_MAY_BE_NONE = frozenset(
    "epoch_train_steps save_total_limit data_seed dataloader_prefetch_factor pipeline_chunks n_microbatches "
    "stages_per_rank pipeline_parallel_size data_parallel_size max_grad_norm".split()
)
_INTERVALS = {"eval_strategy": "eval_steps", "logging_strategy": "logging_steps", "save_strategy": "save_steps"}
_REFUSED: dict[str, tuple[Any, str]] = {
    "device": (None, "every process has the device that its launcher gives it; use_cpu=True is for the CPU"),
    "torch_compile_backend": (None, "torch_compile=True compiles with torch's default backend"),
    "torch_compile_mode": (None, "torch_compile=True compiles in torch's default mode"),
    "enable_activation_offloading": (False, "gradient_checkpointing=True or a schedule that holds less saves memory"),
    "fuse_optim_with_backward": (False, "it would step at every micro-batch; data_parallel='zero2' saves that memory"),
    "sdpa_backend": (
        None,
        "call torch.nn.attention.sdpa_kernel in the model, or attn_implementation=... when making it",
    ),
    "gc_threshold": (None, "call gc.set_threshold(...) before train()"),
    "save_on_each_node": (False, "a checkpoint is written by all nodes together; give them an output_dir they share"),
    "save_rng_state": (True, "checkpoints always have the generators; restore_rng_state=False leaves them alone"),
    "save_safetensors": (True, "save_model writes safetensors only; torch.save(stage.state_dict()) is a file a stage"),
}


def completed(args: PipelineTrainingArguments) -> dict[str, Any]:
    """Checks everything, and returns the values that follow: field -> value."""
    for name, (default, instead) in _REFUSED.items():
        if getattr(args, name) != default:
            raise TrainerError(f"{name}={getattr(args, name)!r} is not offered: {instead}")
    found = {name: _text(getattr(args, name)) for name in (*_CHOICES, "lr_scheduler_type", "schedule")}
    _check_choices(found)
    _check_numbers(args)
    _check_data(args)
    _check_intervals(args, found)
    _check_best(args, found)
    if args.bf16 and args.fp16:
        raise TrainerError("bf16 and fp16 are both set: choose one; bf16 needs no gradient scaler")
    metric = args.metric_for_best_model
    found["greater_is_better"] = (
        not metric.endswith("loss") if args.greater_is_better is None else args.greater_is_better
    )
    found["default_dtype"] = _dtype(args.default_dtype)
    found["output_dir"] = os.fspath(args.output_dir)
    found["logging_dir"] = os.fspath(args.logging_dir or os.path.join(args.output_dir, "runs"))
    found["label_names"] = _names(args.label_names)
    found["report_to"] = _trackers(args.report_to)
    found["lr_scheduler_kwargs"] = dict(args.lr_scheduler_kwargs or {})
    _check_stages(args, found["schedule"], found["pp_stage_type"])
    found["pipeline_chunks"] = found["n_microbatches"] = _microbatches(args)
    return found


def read_words(words: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """`name=value` words as arguments: numbers, truth values, none and lists are read, the rest is text.

    Args:
        words: As on a command line.
        known: The names that there are.

    Raises:
        TrainerError: A word has no `=`, or its name is unknown; the nearest one is named.

    Example:
        >>> read_words(["seed=3", "bf16=true", "schedule=zb-v", "max_grad_norm=none"], ["seed", "bf16", "schedule",
        ...     "max_grad_norm"])
        {'seed': 3, 'bf16': True, 'schedule': 'zb-v', 'max_grad_norm': None}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}=...?" if near else ""
            raise TrainerError(f"{word!r} is no argument, those are written name=value{hint}")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def loaded_schedule(args: PipelineTrainingArguments) -> str | Plan:
    """The schedule that follows from `schedule`, `pp_stage_type` and `stages_per_rank`."""
    given = args.schedule
    if given is None:
        if args.pp_stage_type == "v":
            return "zb-v"
        return "interleaved-1f1b" if (args.stages_per_rank or 1) > 1 else "1f1b"
    if isinstance(given, Plan):
        return given
    if isinstance(given, os.PathLike) or given.lower().endswith(".csv"):
        try:
            return Plan.from_csv(Path(given).read_text(), name=Path(given).name)
        except OSError as error:
            raise ScheduleError(f"cannot read the schedule {str(given)!r}: {error.strerror}") from error
    return given.lower() if given.lower() in _AUTO else canonical_name(given, _AUTO)


def chunks_of(schedule: str | Plan, stages_per_rank: int | None) -> int:
    """Stages that each rank runs under a schedule."""
    if isinstance(schedule, Plan):
        return len(schedule.placement.local_stages(0))
    if stages_per_rank is not None:
        return stages_per_rank
    return (2 if _AUTO[schedule] == "v" else 1) if schedule in _AUTO else describe(schedule).chunks


def _check_choices(found: dict[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if found[name] not in choices:
            raise TrainerError(f"{name} must be one of {', '.join(map(repr, choices))}; got {found[name]!r}")


def _check_numbers(args: PipelineTrainingArguments) -> None:
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TrainerError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name in _NOT_NEGATIVE:
        value = getattr(args, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            raise TrainerError(f"{name} must be a number of at least 0, got {value!r}")
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        if not 0 <= getattr(args, name) <= 1:
            raise TrainerError(f"{name} must be between 0 and 1, got {getattr(args, name)!r}")
    for name in ("max_steps", "max_eval_steps"):
        if not isinstance(getattr(args, name), int) or (getattr(args, name) < 1 and getattr(args, name) != -1):
            raise TrainerError(f"{name} must be at least 1, or -1 for no limit; got {getattr(args, name)!r}")
    if args.max_steps < 1 and args.num_train_epochs == 0:
        raise TrainerError(
            "num_train_epochs=0 and max_steps=-1 leave nothing to train; evaluate() alone needs no train()"
        )


def _check_data(args: PipelineTrainingArguments) -> None:
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if getattr(args, name):
                raise TrainerError(
                    f"{name}={getattr(args, name)} needs worker processes: pass dataloader_num_workers=1 or more"
                )


def _check_intervals(args: PipelineTrainingArguments, found: dict[str, Any]) -> None:
    for strategy, steps in _INTERVALS.items():
        value = getattr(args, steps)
        if found[strategy] == "steps" and (value == 0 or (value > 1 and value != int(value))):
            raise TrainerError(
                f"{steps} must be a whole number of steps, or a share of all steps between 0 and 1; got {value!r} "
                f"({strategy}='no' for never)"
            )


def _check_best(args: PipelineTrainingArguments, found: dict[str, Any]) -> None:
    if not args.load_best_model_at_end:
        return
    ours, theirs = found["eval_strategy"], found["save_strategy"]
    if ours == "no" or ours != theirs:
        raise TrainerError(
            "load_best_model_at_end needs a checkpoint of every model that is evaluated: set eval_strategy and "
            f"save_strategy to the same, 'steps' or 'epoch'; got {ours!r} and {theirs!r}"
        )
    every, saved = args.eval_steps, args.save_steps
    if ours == "steps" and ((every < 1) != (saved < 1) or abs(saved / every - round(saved / every)) > 1e-9):
        raise TrainerError(
            f"load_best_model_at_end needs save_steps to be a multiple of eval_steps; got {saved:g} and {every:g}"
        )


def _check_stages(args: PipelineTrainingArguments, schedule: Any, stage_type: str | None) -> None:
    """The schedule, the number of stages a rank and the way they lie must say the same."""
    if schedule is not None and not isinstance(schedule, (str, Plan, os.PathLike)):
        raise TrainerError(f"schedule must be a name, a Plan or the path of one, got {type(schedule).__name__}")
    resolved, given = loaded_schedule(args), args.stages_per_rank
    chunks = chunks_of(resolved, given)
    if isinstance(resolved, Plan):
        _check_plan(args, resolved, chunks)
    elif not _runs(resolved, chunks):
        fitting = [name for name in names() if describe(name).runs(chunks)]
        if stage_type is not None:
            fitting = [name for name in fitting if describe(name).placement == stage_type]
        asked = f"schedule {resolved!r}" + ("" if args.schedule else f" (of pp_stage_type={stage_type!r})")
        raise TrainerError(
            f"{asked} does not run stages_per_rank={given}; leave stages_per_rank out"
            + (f", or take one that does: {', '.join(fitting)}" if fitting else "")
        )
    lies = _lies(resolved)
    if stage_type is not None and lies is not None and lies != stage_type:
        raise TrainerError(
            f"pp_stage_type={stage_type!r} contradicts schedule {args.schedule!r}, whose stages lie in a {lies}: "
            "leave pp_stage_type out"
        )


def _check_plan(args: PipelineTrainingArguments, plan: Plan, chunks: int) -> None:
    for name, has in (("stages_per_rank", chunks), ("pipeline_parallel_size", plan.placement.num_ranks)):
        if getattr(args, name) not in (None, has):
            raise TrainerError(f"{name}={getattr(args, name)}, but the plan {plan.name!r} is made for {has}")


def _runs(schedule: str, chunks: int) -> bool:
    if schedule in _AUTO:
        return _AUTO[schedule] == "loop" or chunks % 2 == 0
    return describe(schedule).runs(chunks)


def _lies(schedule: str | Plan) -> str | None:
    """`"loop"` or `"v"`; None for a plan of the user's, which lies as it likes."""
    if isinstance(schedule, Plan):
        return None
    return _AUTO.get(schedule) or describe(schedule).placement


def _microbatches(args: PipelineTrainingArguments) -> int:
    schedule = loaded_schedule(args)
    numbers = {name: getattr(args, name) for name in ("pipeline_chunks", "n_microbatches")}
    if isinstance(schedule, Plan):
        numbers["the plan"] = schedule.num_microbatches
    said = {name: value for name, value in numbers.items() if value is not None}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in said.items())
        raise TrainerError(f"the number of micro-batches is said more than once ({told}): leave all but one out")
    return next(iter(said.values()), _MICROBATCHES)


def _text(value: Any) -> Any:
    """The string of an enumeration of transformers; anything else as it is."""
    return getattr(value, "value", value) if isinstance(value, str) else value


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise TrainerError(f"default_dtype must be a floating point type such as 'bfloat16', got {value!r}")


def _names(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else tuple(value or ())
    if not found or not all(isinstance(name, str) for name in found):
        raise TrainerError(f"label_names must be one or more names, got {value!r}")
    return found


def _trackers(value: Any) -> tuple[Any, ...]:
    many: Sequence[Any] = value if isinstance(value, (list, tuple)) else (() if value is None else (value,))
    found = [each for each in many if each != "none"]
    for each in found:
        if each != "tensorboard" and (isinstance(each, str) or not (hasattr(each, "log") or callable(each))):
            raise TrainerError(
                f"report_to knows 'tensorboard' and 'none', and takes objects with .log(dict, step=); got {each!r}. "
                "report_to=[lambda: wandb.init(...)] makes one where it is needed"
            )
    return tuple(found)
