"""schedule list, show and verify: what there is, what it does, and whether it is right."""

from __future__ import annotations

import click

from torchdistpackage import schedule
from torchdistpackage.cli.inputs import plan_options, read_plan
from torchdistpackage.cli.output import draw, one_message, print_table
from torchdistpackage.schedule import Plan
from torchdistpackage.visualize import text_grid, unit_timeline

__all__ = ["list_schedules", "show", "verify_file"]


@click.command("list")
@one_message
def list_schedules() -> None:
    """Print all schedules with their bubble, their memory and where they come from.

    \b
    torchdistpackage schedule list
    """  # noqa: D301
    facts = [schedule.describe(name) for name in schedule.names()]
    rows = [
        (f.name, _chunks(f.chunks, f.chunks_step), f.placement, "yes" if f.split else "", f.bubble, f.memory, f.source)
        for f in facts
    ]
    print_table(("name", "chunks", "placement", "split", "bubble", "memory", "source"), rows)
    click.echo(
        "\np ranks, v chunks a rank, w = v / 2, m micro-batches, r rank; F, I, W, B = I + W: times of a full stage\n"
        "bubble: idle time of a rank; memory: the most micro-batches that it holds, on its full share of the model"
    )


def _chunks(own: int, step: int) -> str:
    """How many stages a rank has: one number, any number, or multiples."""
    return str(own) if step == 0 else "any" if step == 1 else f"{own}, {own + step}, ..."


@click.command("show")
@one_message
@plan_options
@click.option("--text", "as_text", is_flag=True, help="Lists of actions instead of the grid, one line a rank.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV instead of the grid: what `verify` and the library read.")
@click.option("--communication", is_flag=True, help="Lists with sends, receives and reductions, too.")
@click.option("--figure", metavar="FILE", help="Also draw it to a .png, .svg or .pdf.")
@click.option("--width", type=click.IntRange(20), help="Columns of the grid.  [default: those of the terminal]")
def show(plan: Plan, as_text: bool, as_csv: bool, communication: bool, figure: str | None, width: int | None) -> None:
    """Show what every rank does under a schedule, or under the plan of a file ("-" is stdin).

    The grid is drawn with F = I = W = 1, B = 2 and messages that take no time.

    \b
    torchdistpackage schedule show 1f1b -p 4 -m 8
    torchdistpackage schedule show interleaved-1f1b -p 4 -m 8 --chunks 3 --figure interleaved.svg
    torchdistpackage schedule show zb-h1 --csv > mine.csv
    torchdistpackage schedule show mine.csv --communication
    """  # noqa: D301
    if as_text and as_csv:
        raise click.UsageError("--text and --csv are two ways to write one thing; choose one")
    if figure is not None:
        draw(unit_timeline(plan), figure)
    if as_text or as_csv or communication:
        listed = plan if communication else schedule.without_communication(plan)
        click.echo(listed.to_csv() if as_csv else listed.to_text(), nl=not as_csv)
    else:
        click.echo(text_grid(plan, width=width))


@click.command("verify")
@click.argument("file", metavar="FILE.csv")
@one_message
def verify_file(file: str) -> None:
    """Prove the plan of a file ("-" is stdin), or show where it is wrong and exit with 1.

    What is proved: each stage runs every micro-batch forward and backward once, nothing is used before it is there,
    every message has its send and its receive, and no rank waits for ever. A file without messages is proved as it is
    and with the messages that the library adds.

    \b
    torchdistpackage schedule verify mine.csv
    torchdistpackage schedule show zb-v --csv | torchdistpackage schedule verify -
    """  # noqa: D301
    plan = read_plan(file)
    schedule.verify(plan)
    proved = schedule.complete(plan)
    compute = sum(action.op.is_compute for row in plan.actions for action in row)
    messages = sum(action.op in (schedule.Op.SEND_F, schedule.Op.SEND_B) for row in proved.actions for action in row)
    click.echo(
        f"{plan.name}: proved {'as evaluation' if plan.forward_only else 'as a training step'}: "
        f"{plan.placement.num_ranks} ranks, {plan.placement.num_stages} stages, {plan.num_microbatches} micro-batches, "
        f"{compute} actions, {messages} messages{'' if plan.has_communication else ' (added)'}"
    )
    peaks = schedule.peak_activations(plan)
    rows = [
        (str(rank), " ".join(map(str, plan.placement.local_stages(rank))), str(len(row)), str(peaks[rank]))
        for rank, row in enumerate(plan.actions)
    ]
    print_table(("rank", "stages", "actions", "peak activations"), rows, right=(0, 2, 3))
