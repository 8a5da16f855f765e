"""The table of a split, as it is printed."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from torchdistpackage.split.report import SplitReport, StageRow

ROWS = (
    StageRow(0, ("conv1", "bn1", "layer1.0"), 9_536, 236_027_904, 0.0021, 0.0043, 9_633_792, 802_816, 0.0064),
    StageRow(1, ("layer1.1", "layer2.0"), 1_230_000, 1_310_000_000, 0.0011, 0.0019, 5_000_000, 401_408, 0.003),
    StageRow(2, ("fc",), 513_000, 1_024_000, None, None, 2_048, 0, 0.0005),
    StageRow(3, (), 0, 0, 0.0, 0.0, 0, 0, 0.0),
)


def test_plain_text() -> None:
    expected = """\
stage  layers                 params  FLOPs  forward  backward  activations  sends  load  of mean
                                 [M]    [G]     [ms]      [ms]        [MiB]  [KiB]  [ms]
    0  conv1 .. layer1.0 (3)    0.01   0.24     2.10      4.30         9.19    784  6.40     259%
    1  layer1.1, layer2.0       1.23   1.31     1.10      1.90         4.77    392  3.00     121%
    2  fc                       0.51  <0.01        -         -        <0.01      0  0.50      20%
    3  (none)                   0.00   0.00     0.00      0.00         0.00      0  0.00       0%
total  6 layers                 1.75   1.55     3.20      6.20        13.96   1176  9.90
imbalance 158.6%: stage 0 has 2.59 times the mean load; 6.7% above the best possible"""
    assert str(SplitReport(ROWS, "time", optimum=0.006)) == expected


def test_rich_shows_the_same() -> None:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(SplitReport(ROWS, "seconds"))
    shown, plain = console.file.getvalue(), str(SplitReport(ROWS, "seconds"))  # type: ignore[attr-defined]
    lines = [line.split() for line in shown.splitlines() if "─" not in line and line.strip()]
    assert lines[2:] == [line.split() for line in plain.splitlines()][2:]  # headers stand at the bottom, not the top
    assert sorted(lines[0] + lines[1]) == sorted(" ".join(plain.splitlines()[:2]).split())


def test_a_narrow_terminal_and_names_with_brackets() -> None:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(SplitReport((replace(ROWS[0], layers=("blocks[0]", "a very long name " * 5)),), "flops"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "blocks[0]" in shown
    assert max(map(len, shown.splitlines())) == 100


def test_the_imbalance() -> None:
    report = SplitReport(ROWS, "time")
    assert report.imbalance == pytest.approx(6.4 / (9.9 / 4) - 1)
    even = SplitReport((ROWS[0], ROWS[0]), "time")
    assert even.imbalance == 0
    assert "all stages have the same load" in str(even)
    assert "no cut has less" in str(SplitReport(ROWS, "time", optimum=0.0064))
    assert SplitReport(ROWS[3:], "time").imbalance == 0
    assert "total  0 layers" in str(SplitReport((), "time"))


def test_columns_that_nobody_measured_are_left_out_and_units_are_the_callers() -> None:
    rows = tuple(replace(row, forward=None, backward=None, load=row.stage + 0.5) for row in ROWS)
    text = str(SplitReport(rows, "blocks"))
    assert "forward" not in text
    assert text.splitlines()[1].endswith("[blocks]")
    assert "params  FLOPs" in str(SplitReport(ROWS[3:], "parameters"))


def test_without_rich_there_is_one_sentence() -> None:
    code = """
import sys
sys.modules["rich"] = None
from torchdistpackage.split import SplitReport
print(SplitReport((), "time"))
try:
    SplitReport((), "time").__rich__()
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'torchdistpackage[viz]'" in done.stdout
