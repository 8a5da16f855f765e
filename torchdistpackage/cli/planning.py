"""schedule simulate, trace and plan: how long it takes, as text and as a trace, and what would be best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from torchdistpackage import schedule
from torchdistpackage.cli.inputs import (
    DEFAULT_MICROBATCHES,
    DEFAULT_RANKS,
    cost_options,
    load_costs,
    plan_options,
    size_options,
)
from torchdistpackage.cli.output import draw, one_message, print_table
from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Plan, Timeline
from torchdistpackage.visualize import text_grid, write_trace
from torchdistpackage.visualize.palette import Scale, quantity

__all__ = ["plan_schedule", "simulate_schedule", "trace_schedule"]


@click.command("simulate")
@one_message
@plan_options
@cost_options
@click.option("--figure", metavar="FILE", help="Also draw it to a .png, .svg or .pdf.")
@click.option("--width", type=click.IntRange(20), help="Columns of the grid.  [default: those of the terminal]")
def simulate_schedule(plan: Plan, times: dict[str, Any], figure: str | None, width: int | None) -> None:
    """Time a schedule, or the plan of a file ("-" is stdin): makespan, bubble and memory of each rank, and the grid.

    Without --costs all stages are equal. Memory is counted in micro-batches on one rank's share of the model, or in
    bytes if the costs say how large they are.

    \b
    torchdistpackage schedule simulate zb-v -p 8 -m 32 --input-grad 1.2 --weight-grad 0.8 --hop 0.05
    torchdistpackage schedule simulate mine.csv --costs measured.json --figure mine.png
    """  # noqa: D301
    timeline = _simulate(plan, times)
    draw(timeline, figure)
    click.echo(text_grid(timeline, width=width) + "\n")
    scale = Scale.of(timeline.unit, timeline.makespan)
    rows = [
        (str(rank), scale.write(busy), scale.write(bubble), f"{bubble / timeline.makespan:.1%}", quantity(peak))
        for rank, (busy, bubble, peak) in enumerate(
            zip(timeline.busy, timeline.bubble, timeline.peak_bytes, strict=True)
        )
    ]
    print_table(("rank", "busy", "bubble", "share", "peak held"), rows, right=range(5))


@click.command("trace")
@one_message
@plan_options
@cost_options
@click.option("-o", "--output", metavar="FILE.json", required=True, help="Where to write the trace.")
def trace_schedule(plan: Plan, times: dict[str, Any], output: str) -> None:
    """Write the simulated step as a trace, to be opened at https://ui.perfetto.dev or chrome://tracing.

    \b
    torchdistpackage schedule trace dualpipe-v -p 8 -m 32 --hop 0.05 -o step.json
    torchdistpackage schedule trace mine.csv --costs measured.json -o step.json
    """  # noqa: D301
    write_trace(output, _simulate(plan, times))
    click.echo(f"wrote {output}: open it at https://ui.perfetto.dev", err=True)


def _simulate(plan: Plan, times: dict[str, Any]) -> Timeline:
    timeline = schedule.simulate(plan, load_costs(times, plan.placement.num_ranks, plan.placement.num_stages))
    if not timeline.makespan:
        raise ScheduleError("all times are 0: there is nothing to see")
    return timeline


@click.command("plan")
@one_message
@size_options("the better of 1 and 2")
@cost_options
@click.option("--memory-limit", type=float, help="The most that a rank may hold, in the unit of the costs.")
@click.option("-o", "--output", metavar="FILE.csv", help="Write the plan, for `schedule=` and the other commands.")
@click.option("--figure", metavar="FILE", help="Draw it to a .png, .svg or .pdf.")
def plan_schedule(
    ranks: int | None,
    microbatches: int | None,
    chunks: int | None,
    times: dict[str, Any],
    memory_limit: float | None,
    output: str | None,
    figure: str | None,
) -> None:
    """Search the best plan for what the stages cost, and say how far it is from the best that is possible.

    \b
    torchdistpackage schedule plan -p 8 -m 32 --chunks 2 --head 0.5 --hop 0.05 --memory-limit 8
    torchdistpackage schedule plan -p 4 -m 16 --costs measured.json -o best.csv --figure best.png
    """  # noqa: D301
    from torchdistpackage.schedule import planner

    ranks, microbatches = ranks or DEFAULT_RANKS, microbatches or DEFAULT_MICROBATCHES
    cuts = (1, 2) if chunks is None and "costs" not in times else (chunks,)
    models = [load_costs(times, ranks, ranks * (cut or 1)) for cut in cuts]
    if chunks is not None and models[0].num_stages != ranks * chunks:
        raise click.UsageError(
            f"{chunks} chunks on {ranks} ranks, but the costs are those of {models[0].num_stages} stages"
        )
    found = planner.plan(models, ranks, microbatches, memory_limit)
    if figure is not None:
        draw(found.timeline, figure)
    scale = Scale.of(found.costs.unit, found.makespan)
    best: dict[str, planner.Candidate] = {}
    for row in found.candidates:  # fastest first: later ones of the same name are other tries
        best.setdefault(row.name, row)
    rows = [
        (row.name, scale.write(row.makespan), quantity(row.peak), "")
        if row.makespan < math.inf
        else (row.name, "-", quantity(row.peak), "" if row.fits else "over the limit")
        for row in best.values()
    ]
    print_table(("candidate", "makespan", "peak held", ""), rows, right=(1, 2))
    click.echo(
        f"\nchosen: {found.plan.name} with {found.plan.placement.num_stages // ranks} stage(s) a rank, makespan "
        f"{scale.write(found.makespan)}, lower bound {scale.write(found.lower_bound)}, ratio {found.ratio:.4f}"
    )
    if output is not None:
        Path(output).write_text(schedule.without_communication(found.plan).to_csv(), encoding="utf-8")
        click.echo(f"wrote {output}", err=True)
