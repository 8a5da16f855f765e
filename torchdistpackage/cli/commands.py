"""The commands; each is a few lines around one function of the library."""

from __future__ import annotations

import click

from torchdistpackage import __version__, schedule
from torchdistpackage.errors import TorchDistError

__all__ = ["torchdistpackage"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def torchdistpackage() -> None:
    """Pipeline-parallel training in PyTorch, inside the user's own loop."""


@torchdistpackage.group("schedule")
def schedule_group() -> None:
    """Look at schedules: plans are data."""


@schedule_group.command("list")
def list_schedules() -> None:
    """Print the names of all schedules."""
    click.echo("\n".join(schedule.names()))


@schedule_group.command("show")
@click.argument("name")
@click.option("-p", "--ranks", default=4, show_default=True, help="Ranks of the pipeline.")
@click.option("-m", "--microbatches", default=8, show_default=True, help="Micro-batches of a step.")
@click.option("--forward-only", is_flag=True, help="The evaluation plan.")
@click.option("--communication", is_flag=True, help="Show sends and receives, too.")
def show(name: str, ranks: int, microbatches: int, forward_only: bool, communication: bool) -> None:
    """Print what every rank does under schedule NAME.

    Example: torchdistpackage schedule show 1f1b -p 4 -m 8
    """
    try:
        plan = schedule.build(name, ranks, microbatches, forward_only=forward_only)
    except TorchDistError as error:
        raise click.ClickException(str(error)) from None
    if not communication:
        plan = plan.with_actions([a for a in row if a.op.is_compute] for row in plan.actions)
    click.echo(plan.to_text())
