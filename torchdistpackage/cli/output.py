"""What the commands have in common on the way out: tables, pictures, and mistakes in one message."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import click

from torchdistpackage.errors import TorchDistError
from torchdistpackage.schedule import Timeline
from torchdistpackage.visualize import figure

__all__ = ["draw", "one_message", "print_table"]

Command = TypeVar("Command", bound=Callable[..., Any])


def one_message(command: Command) -> Command:
    """Turns what the library raises on purpose into one message on stderr and exit code 1."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `... | head` is no mistake; click ends quietly
        except (TorchDistError, OSError) as error:
            raise click.ClickException(str(error)) from None
        except ModuleNotFoundError as error:
            if error.name == "torch":
                raise click.ClickException("this command needs torch: pip install torch") from None
            if "torchdistpackage[" not in str(error):
                raise
            raise click.ClickException(str(error)) from None

    return cast("Command", guarded)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Prints a table: with rich in a terminal, else as aligned text.

    Args:
        header: One word a column.
        rows: One text a cell.
        right: Columns of numbers, which are aligned to the right.
    """
    if sys.stdout.isatty() and _print_rich_table(header, rows, right):
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())


def _print_rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> bool:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return False
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column in right else "left", no_wrap=column == 0)
    for row in rows:
        table.add_row(*map(Text, row))  # as text, brackets are brackets
    Console().print(table)
    return True


def draw(timeline: Timeline, path: str | None) -> None:
    """Writes the picture, if there is to be one."""
    if path is not None:
        figure(timeline, path=path)
        click.echo(f"wrote {os.fspath(path)}", err=True)
