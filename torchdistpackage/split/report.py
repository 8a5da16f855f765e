"""What a split looks like: one row a stage, as text or as a table of rich.

The splitters know what is on their stages and fill in the rows; this file only makes them pleasant to read. Numbers of
a column have one unit, which is in its header, so that stages can be compared at a glance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from torchdistpackage.split.boundaries import LoadBalance

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SplitReport", "StageRow"]


@dataclass(frozen=True)
class StageRow:
    """One stage of a split model.

    Attributes:
        stage: Its index.
        layers: Names of its layers in the order in which they run.
        parameters: Elements of its parameters.
        flops: Floating-point operations of its forward pass for one micro-batch.
        forward: Seconds of its forward pass, None if not measured.
        backward: Seconds of its backward pass, None if not measured.
        activation_bytes: What it keeps of one micro-batch from the forward to the backward pass.
        cut_bytes: What it sends to later stages for one micro-batch.
        load: What was balanced.

    Example:
        >>> StageRow(0, ("embed", "block.0"), 1200, 5000, None, None, 64, 32, 5000.0).layers
        ('embed', 'block.0')
    """

    stage: int
    layers: tuple[str, ...]
    parameters: int
    flops: int
    forward: float | None
    backward: float | None
    activation_bytes: int
    cut_bytes: int
    load: float


@final
@dataclass(frozen=True)
class SplitReport:
    """All stages of a split model; `str` is a table in plain text, and rich prints one with `rich.print(report)`.

    Attributes:
        rows: The stages.
        unit: Unit of the loads: "parameters", "flops", "time" or "seconds", "bytes", or a word of your own.
        optimum: The smallest worst load that any cut of the same layers has, if known; tells what pins, forbidden cuts
            and slack cost.

    Example:
        >>> layers = ("embed", "block.0", "block.1"), ("block.2", "head")
        >>> rows = [StageRow(s, layers[s], 10**6, 3 * 10**9, None, None, 2**21, 2**20, 3e9 + s * 1e9) for s in (0, 1)]
        >>> print(SplitReport(tuple(rows), "flops", optimum=4e9))
        stage  layers                params  FLOPs  activations  sends     load  of mean
                                        [M]    [G]        [MiB]  [MiB]  [GFLOP]
            0  embed .. block.1 (3)    1.00   3.00         2.00   1.00     3.00      86%
            1  block.2, head           1.00   3.00         2.00   1.00     4.00     114%
        total  5 layers                2.00   6.00         4.00   2.00     7.00
        imbalance 14.3%: stage 1 has 1.14 times the mean load; no cut has less
    """

    rows: tuple[StageRow, ...]
    unit: str
    optimum: float | None = None

    @property
    def imbalance(self) -> float:
        """The largest load divided by the mean load, less 1: 0 is even."""
        return self._balance.imbalance

    @property
    def _balance(self) -> LoadBalance:
        return LoadBalance(tuple(row.load for row in self.rows))

    def __str__(self) -> str:
        columns = self._columns()
        widths = [max(map(len, (column.title, column.unit, *column.cells, column.total))) for column in columns]
        lines = [[column.title for column in columns], [column.unit for column in columns]]
        lines += [[column.cells[number] for column in columns] for number in range(len(self.rows))]
        lines += [[column.total for column in columns]]
        text = [
            "  ".join(
                cell.ljust(width) if column.is_text else cell.rjust(width)
                for cell, width, column in zip(line, widths, columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, self._verdict()])

    def __rich__(self) -> Table:
        """The table for a terminal.

        Raises:
            ModuleNotFoundError: rich is not installed.
        """
        try:
            from rich import box
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError:
            message = "tables in colour need rich: pip install 'torchdistpackage[viz]'; print(str(report)) does without"
            raise ModuleNotFoundError(message, name="rich") from None
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=True, caption=Text(self._verdict())
        )
        table.caption_justify = "left"
        for column in self._columns():
            justify: Literal["left", "right"] = "left" if column.is_text else "right"
            title, width = f"{column.title}\n{column.unit}".rstrip(), 10 if column.is_text else None
            table.add_column(Text(title), Text(column.total), justify=justify, overflow="fold", min_width=width)
        worst = self._balance.worst
        for number, row in enumerate(self.rows):
            style = "bold" if row.load == worst else None  # it sets the pace of the pipeline
            table.add_row(*(Text(column.cells[number]) for column in self._columns()), style=style)
        return table

    def _columns(self) -> list[_Column]:
        rows = self.rows
        layers = sum(len(row.layers) for row in rows)
        mean = self._balance.mean
        return [
            _Column("stage", "", [str(row.stage) for row in rows], "total"),
            _Column("layers", "", [_shortened(row.layers) for row in rows], f"{layers} layers", is_text=True),
            *_numbers("params", "parameters", [row.parameters for row in rows]),
            *_numbers("FLOPs", "operations", [row.flops for row in rows]),
            *_numbers("forward", "seconds", [row.forward for row in rows]),
            *_numbers("backward", "seconds", [row.backward for row in rows]),
            *_numbers("activations", "bytes", [row.activation_bytes for row in rows]),
            *_numbers("sends", "bytes", [row.cut_bytes for row in rows]),
            *_numbers("load", self.unit, [row.load for row in rows]),
            _Column("of mean", "", [f"{row.load / mean:.0%}" if mean else "-" for row in rows], ""),
        ]

    def _verdict(self) -> str:
        balance = self._balance
        if balance.imbalance < 0.0005:
            return "imbalance 0.0%: all stages have the same load"
        stage = max(self.rows, key=lambda row: row.load).stage
        text = f"imbalance {self.imbalance:.1%}: stage {stage} has {1 + self.imbalance:.2f} times the mean load"
        if self.optimum is None:
            return text
        more = balance.worst / self.optimum - 1 if self.optimum else 0.0
        return f"{text}; " + ("no cut has less" if more < 0.0005 else f"{more:.1%} above the best possible")


@dataclass(frozen=True)
class _Column:
    title: str
    unit: str
    cells: list[str]
    total: str
    is_text: bool = False


_THOUSANDS = ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))
_SECONDS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"))
_SCALES = {
    "parameters": _THOUSANDS,
    "operations": _THOUSANDS,
    "flops": tuple((scale, f"{prefix}FLOP") for scale, prefix in _THOUSANDS),
    "time": _SECONDS,
    "seconds": _SECONDS,
    "bytes": ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"), (2.0**40, "TiB")),
}


def _numbers(title: str, unit: str, numbers: Sequence[float | None]) -> list[_Column]:
    """A column in the unit in which its largest number has one to three digits before the point.

    No column if no number is known.
    """
    known = [number for number in numbers if number is not None]
    if not known:
        return []
    largest = max(known)
    scales = _SCALES.get(unit, ((1.0, unit),))
    scale, name = max(((scale, name) for scale, name in scales if largest >= scale), default=scales[0])
    whole = scale == 1 and all(float(number).is_integer() for number in known)
    decimals = 0 if whole or largest / scale >= 100 else 1 if largest / scale >= 10 else 2

    def cell(number: float | None) -> str:
        if number is None:
            return "-"
        smallest = 10**-decimals  # what is smaller is not nothing
        return f"<{smallest}" if 0 < number / scale < smallest / 2 else f"{number / scale:.{decimals}f}"

    return [_Column(title, f"[{name}]" if name else "", [cell(number) for number in numbers], cell(sum(known)))]


def _shortened(layers: Sequence[str]) -> str:
    if len(layers) > 2:
        return f"{layers[0]} .. {layers[-1]} ({len(layers)})"
    return ", ".join(layers) or "(none)"
