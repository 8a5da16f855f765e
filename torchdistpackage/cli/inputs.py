"""Plans and costs as the command line names them: by schedule and numbers, or by file."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import CostModel, Plan, build, complete

__all__ = [
    "DEFAULT_MICROBATCHES",
    "DEFAULT_RANKS",
    "cost_options",
    "load_costs",
    "load_plan",
    "plan_options",
    "read_plan",
    "size_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_RANKS, DEFAULT_MICROBATCHES = 4, 8


def size_options(chunks: str) -> Callable[[Command], Command]:
    """Adds -p, -m and --chunks. They are None where they were not given: a file says them by itself.

    Args:
        chunks: What happens without --chunks.
    """

    def add(command: Command) -> Command:
        for option in (
            click.option("--chunks", type=click.IntRange(1), help=f"Stages a rank.  [default: {chunks}]"),
            click.option("-m", "--microbatches", type=click.IntRange(1), help="Micro-batches of a step.  [default: 8]"),
            click.option("-p", "--ranks", type=click.IntRange(1), help="Ranks of the pipeline.  [default: 4]"),
        ):
            command = option(command)
        return command

    return add


def plan_options(command: Command) -> Command:
    """Adds what names a plan, and hands the command the plan itself as `plan`."""

    @functools.wraps(command)
    def with_plan(
        schedule: str,
        ranks: int | None,
        microbatches: int | None,
        chunks: int | None,
        forward_only: bool,
        **others: Any,
    ) -> Any:
        plan = load_plan(schedule, ranks, microbatches, chunks, forward_only=forward_only)
        return command(plan=plan, **others)

    evaluation = click.option("--forward-only", is_flag=True, help="The evaluation plan: no backward.")
    named: Any = click.argument("schedule", metavar="NAME|FILE.csv")(
        size_options("the schedule's own")(evaluation(with_plan))
    )
    return named  # type: ignore[no-any-return]  # click's decorators keep the type of what they decorate


def load_plan(
    schedule: str, ranks: int | None, microbatches: int | None, chunks: int | None, *, forward_only: bool = False
) -> Plan:
    """Builds a schedule by name, or reads and proves a CSV file.

    Args:
        schedule: A name of the catalogue, the path of a file, or "-" for stdin.
        ranks: p, if given.
        microbatches: m, if given.
        chunks: Stages a rank, if given.
        forward_only: Leave out the backwards.

    Raises:
        ScheduleError: There is no such schedule or file, or the file's plan is wrong.
        click.UsageError: A file has other sizes than those asked for.
    """
    if schedule != "-" and not schedule.lower().endswith(".csv") and not Path(schedule).is_file():
        ranks, microbatches = ranks or DEFAULT_RANKS, microbatches or DEFAULT_MICROBATCHES
        return build(schedule, ranks, microbatches, forward_only=forward_only, chunks=chunks)
    plan = read_plan(schedule)
    found = {
        "--ranks": (ranks, plan.placement.num_ranks),
        "--microbatches": (microbatches, plan.num_microbatches),
        "--chunks": (chunks, len(plan.placement.local_stages(0))),
    }
    for option, (wanted, there) in found.items():
        if wanted is not None and wanted != there:
            raise click.UsageError(f"{option} is {wanted}, but {schedule} has {there}; leave the option out for a file")
    return complete(plan, evaluation=forward_only)


def read_plan(path: str) -> Plan:
    """Reads a CSV file, or stdin for "-", without proving it."""
    name = "stdin" if path == "-" else Path(path).stem
    return Plan.from_csv(_read(path), name=name)


def cost_options(command: Command) -> Command:
    """Adds the times, and hands the command all of them as `times`, to be read by `load_costs`."""
    names = ("costs", "forward", "input_grad", "weight_grad", "backward", "hop", "head")

    @functools.wraps(command)
    def with_times(**given: Any) -> Any:
        times = {name: value for name in names if (value := given.pop(name)) is not None}
        if "costs" in times and len(times) > 1:
            other = next(name for name in times if name != "costs").replace("_", "-")
            raise click.UsageError(f"--costs says all times, so leave --{other} out (or write it into the file)")
        return command(times=times, **given)

    wrapped: Any = with_times
    for option in (
        click.option("--costs", help="Costs of every stage: a JSON file of lists, keys as in CostModel."),
        click.option("--head", type=float, help="What the last stage has to do on top, in full stages.  [default: 0]"),
        click.option("--hop", type=float, help="Time of one message.  [default: 0]"),
        click.option("--backward", type=float, help="Time of B, the unsplit backward.  [default: I + W]"),
        click.option("--weight-grad", type=float, help="Time of W, the gradient of the weights.  [default: 1]"),
        click.option("--input-grad", type=float, help="Time of I, the gradient of the input.  [default: 1]"),
        click.option("--forward", type=float, help="Time of F of a full stage (all chunks of a rank).  [default: 1]"),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def load_costs(times: dict[str, Any], num_ranks: int, num_stages: int) -> CostModel:
    """The cost model of a file, or that of equal stages but for the last stage's head.

    Raises:
        ScheduleError: The file is none, or a number is wrong.
    """
    if "costs" in times:
        return _read_costs(times["costs"])
    chunks = num_stages // num_ranks if num_stages % num_ranks == 0 else 1
    head = times.get("head", 0.0)
    costs = CostModel.uniform(
        num_stages, chunks=chunks, **{name: time for name, time in times.items() if name != "head"}
    )
    if not head:
        return costs
    more: dict[str, Any] = {
        name: (*each[:-1], each[-1] * (1 + head * chunks))
        for name in ("forward", "input_grad", "weight_grad", "backward")
        if (each := getattr(costs, name)) is not None
    }
    return replace(costs, **more)


def _read_costs(path: str) -> CostModel:
    known = [field.name for field in fields(CostModel)]
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ScheduleError(f"{path} is no JSON: {error}") from None
    example = '{"forward": [1, 1], "input_grad": [1, 1], "weight_grad": [1, 1], "hop": 0.1}'
    if not isinstance(found, dict) or not {"forward", "input_grad", "weight_grad"} <= found.keys() <= set(known):
        raise ScheduleError(f"{path} must hold costs by name, such as {example}; names are {', '.join(known)}")
    for name, value in found.items():
        if not _fits(name, value):
            raise ScheduleError(f"{path}: {name!r} is {value!r}; write costs as in {example}")
    return CostModel(**{name: _as_tuples(value) for name, value in found.items()})


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _fits(name: str, value: Any) -> bool:
    """Whether a value has the type of its field in `CostModel`; the numbers are checked there."""
    if name == "unit":
        return isinstance(value, str)
    if name == "skip_hop" and isinstance(value, list):
        return all(isinstance(entry, list) and all(map(_is_number, entry)) for entry in value)
    if isinstance(value, list):
        return name != "bandwidth" and all(map(_is_number, value))
    return value is None or (name in ("hop", "bandwidth") and _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ScheduleError(f"cannot read {path}: {reason}") from None
