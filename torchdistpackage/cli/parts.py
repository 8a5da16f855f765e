"""split MODEL_DIR --at 2,10 --out DIR: saved weights -> the files of bottom, trunk and top.

The other way of `split`, by tracing, is in `splitting.py`, which calls this one for a directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torchdistpackage.cli.output import print_table
from torchdistpackage.errors import SplitError

if TYPE_CHECKING:
    from torchdistpackage.split.parts.checkpoint_plan import PartPlan

__all__ = ["BY_TRACING", "ON_DISK", "parts_options", "split_directory", "wants_parts"]

BY_TRACING = "torchdistpackage split torchvision:resnet50 -p 4 -i 4x3x224x224"
ON_DISK = "torchdistpackage split MODEL_DIR --at 2,10 --out DIR"

Command = TypeVar("Command", bound=Callable[..., Any])


def parts_options(command: Command) -> Command:
    """Adds the options for a directory of weights."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Directory: only print what each part would hold."),
        click.option("--overwrite", is_flag=True, help="Directory: replace other parts that are in --out."),
        click.option("--out", metavar="DIR", help="Directory: where to write the parts."),
        click.option("--at", metavar="N,M", help="Directory: the layers at which trunk and top begin, such as 2,10."),
    ):
        command = option(command)
    return command


def wants_parts(model: str, at: str | None, out: str | None, overwrite: bool, dry_run: bool) -> bool:
    """Whether saved weights are to be split, and not a model to be traced."""
    return os.path.isdir(model) or at is not None or out is not None or overwrite or dry_run


def split_directory(
    directory: str, at: str | None, out: str | None, overwrite: bool, dry_run: bool, foreign: Mapping[str, bool]
) -> None:
    """Splits, or says how it would be.

    Args:
        directory: Where the model was saved.
        at: Value of --at.
        out: Value of --out.
        overwrite: Whether other parts may be replaced.
        dry_run: Whether to print the table only.
        foreign: Options of the other way -> whether they were given.

    Raises:
        click.UsageError: An option is missing, or belongs to the other way.
        TorchDistError: What `split_checkpoint` raises.
    """
    if given := [name for name, there in foreign.items() if there]:
        raise click.UsageError(
            f"{', '.join(given)} is for cutting a model by tracing: {BY_TRACING}\n"
            f"A directory with saved weights is split by: {ON_DISK}"
        )
    missing = [name for name, value in (("--at", at), ("--out", out or dry_run)) if not value]
    if missing:
        raise click.UsageError(f"without {' and '.join(missing)}, {directory} cannot be split: {ON_DISK}")
    from torchdistpackage.split.parts.checkpoint_plan import plan_split
    from torchdistpackage.split.parts.checkpoint_split import write_parts

    plan = plan_split(directory, _layers(at or ""))
    if not dry_run:
        with _shown(plan.parts) as progress:
            write_parts(plan, out or "", overwrite=overwrite, progress=progress)
    _print_parts(plan.parts, Path(out or ""))
    if not dry_run:
        first = str(Path(out or "", "bottom.safetensors"))
        click.echo(
            "Each file and its _metadata.json are all that a party needs:\n"
            "  from torchdistpackage.split.parts import load_split_model\n"
            f"  bottom = load_split_model({first!r}, verify=True)"
        )


def _layers(at: str) -> list[int]:
    try:
        return [int(layer) for layer in at.split(",")]
    except ValueError:
        raise SplitError(f"--at {at!r} is no list of layers: write where trunk and top begin, --at 2,10") from None


def _print_parts(parts: Sequence[PartPlan], out: Path) -> None:
    rows = [
        [
            part.component,
            f"{part.start_layer}-{part.end_layer - 1}",
            str(len(part.pieces)),
            f"{part.num_bytes / 2**20:.1f}",
            str(out / f"{part.component}.safetensors"),
        ]
        for part in parts
    ]
    print_table(["part", "layers", "tensors", "MB", "file"], rows, right=[2, 3])


@contextmanager
def _shown(parts: Sequence[PartPlan]) -> Iterator[Callable[[int, int], None]]:
    """Shows how far the work is: a bar in a terminal, else a line for each part."""
    ends = list(accumulate(2 * part.num_bytes for part in parts))  # each byte counts twice: copied, and read again
    if not sys.stderr.isatty():
        waiting = [*zip(ends, parts, strict=True)]

        def tell(done: int, total: int) -> None:
            while waiting and done >= waiting[0][0]:
                _, part = waiting.pop(0)
                click.echo(f"{part.component}: {part.num_bytes / 2**20:.1f} MB, on disk and checked", err=True)

        yield tell
        return
    with click.progressbar(length=ends[-1], label="splitting", file=sys.stderr, item_show_func=_name) as bar:

        def draw(done: int, total: int) -> None:
            part = next((part for end, part in zip(ends, parts, strict=True) if done <= end), parts[-1])
            bar.update(done - bar.pos, part)

        yield draw


def _name(part: Any) -> str | None:
    return None if part is None else f"{part.component}.safetensors"
