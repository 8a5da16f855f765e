"""What was logged, as text: single values for people, one line for a log, the table at the end of a run.

Neighbours: `progress.py` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

__all__ = ["log_line", "metrics_table", "short_metrics"]

_SHORT = {  # in the order in which they are shown
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad norm",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "step_seconds": "s/step",
    "bubble_share": "bubble",
    "peak_memory_bytes": "memory",
}
_NOT_ROWS = ("step", "epoch", "total_flos")
_COLUMNS = ("first", "last", "lowest", "highest")


def metrics_table(log_history: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None = None) -> str:
    """The table at the end of a run.

    Args:
        log_history: `TrainerState.log_history`.
        summary: What the end of training logs: `train_runtime` (seconds), `train_steps_per_second`,
            `train_samples_per_second`, `train_tokens_per_second`; what is missing is left out.

    Example:
        >>> history = [{"loss": 2.5, "step": 1}, {"loss": 0.5, "step": 2}, {"eval_loss": 0.75, "step": 2}]
        >>> print(metrics_table(history, {"train_runtime": 61.0}))
                   first  last  lowest  highest
        loss         2.5   0.5     0.5      2.5
        eval_loss   0.75  0.75    0.75     0.75
        2 steps in 0:01:01; lowest loss at step 2, lowest eval_loss at step 2
    """
    series = _series(log_history)
    rows: list[tuple[str, ...]] = [("", *_COLUMNS)]
    for name, points in series.items():
        values = [value for _, value in points]
        cells = (values[0], values[-1], _extreme(min, values), _extreme(max, values))
        rows.append((_SHORT.get(name, name), *(_shown(name, value) for value in cells)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (rows if series else ())
    ]
    return "\n".join([*lines, _last_line(log_history, series, summary or {})])


def log_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """One log as one line.

    Args:
        logs: What is logged.
        step: Optimizer steps that are done.
        max_steps: Of all.

    Example:
        >>> log_line({"loss": 0.5, "epoch": 1.0, "peak_memory_bytes": 2**30}, 10, 40)
        'step 10/40  epoch 1  loss 0.5  memory 1.00 GiB'
    """
    parts = [f"step {step}/{max_steps}"]
    if _is_number(logs.get("epoch")):
        parts.append(f"epoch {logs['epoch']:.4g}")
    return "  ".join([*parts, *(f"{name} {value}" for name, value in short_metrics(logs).items())])


def short_metrics(logs: Mapping[str, Any]) -> dict[str, str]:
    """Values for people, under short names; only numbers.

    Example:
        >>> short_metrics({"loss": 1.23456, "learning_rate": 5e-05, "tokens_per_second": 12345.6, "bubble_share": 0.25})
        {'loss': '1.235', 'lr': '5e-05', 'tokens/s': '12,346', 'bubble': '25.0%'}
    """
    numbers = {name: value for name, value in logs.items() if _is_number(value) and name not in _NOT_ROWS}
    names = [*(name for name in _SHORT if name in numbers), *(name for name in numbers if name not in _SHORT)]
    return {_SHORT.get(name, name): _shown(name, numbers[name]) for name in names}


def _series(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Any, float]]]:
    """(step, value) of everything that was logged more or less often: training, then evaluations."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if _is_number(value) and name not in _NOT_ROWS and not name.startswith(("train_", "total_")):
                found.setdefault(name, []).append((entry.get("step"), value))
    first = [*(name for name in _SHORT if name in found), *(name for name in found if name not in _SHORT)]
    return {name: found[name] for name in sorted(first, key=lambda name: name.startswith("eval_"))}


def _last_line(
    log_history: Sequence[Mapping[str, Any]],
    series: Mapping[str, Sequence[tuple[Any, float]]],
    summary: Mapping[str, Any],
) -> str:
    steps = max((entry["step"] for entry in log_history if "step" in entry), default=0)
    said = f"{steps} steps"
    if _is_number(summary.get("train_runtime")):
        said += f" in {_clock(summary['train_runtime'])}"
    for what in ("steps", "samples", "tokens"):
        if _is_number(summary.get(f"train_{what}_per_second")):
            said += f", {_quantity(summary[f'train_{what}_per_second'])} {what}/s"
    lowest = []
    for name in ("loss", "eval_loss"):
        finite = [(value, step) for step, value in series.get(name, ()) if math.isfinite(value)]
        if finite:
            lowest.append(f"lowest {name} at step {min(finite, key=lambda each: each[0])[1]}")
    return "; ".join([said, ", ".join(lowest)] if lowest else [said])


def _extreme(choose: Any, values: Sequence[float]) -> float:
    """The lowest or the highest; a NaN would hide it."""
    return float(choose([value for value in values if not math.isnan(value)] or [math.nan]))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers, too


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name.endswith("_share"):
        return f"{value:.1%}"
    if name.endswith("_per_second"):
        return _quantity(value)
    return f"{value:.4g}"


def _quantity(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
