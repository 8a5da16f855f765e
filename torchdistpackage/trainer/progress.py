"""How far a run is: a bar in a terminal, a line a log elsewhere, a table at the end; on the rank that reports.

::

    train  42%|####      | 210/500 [01:03<01:27], loss 1.23 lr 2.9e-05 grad norm 0.8 tokens/s 9,012 bubble 12.5% ...
    evaluate  30%|###            | 6/20                                        below it, while there is an evaluation

Which rank reports, `state.is_world_process_zero` says. Neighbours: `progress_table.py` makes the text, `callbacks.py`
has the events.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any, TextIO, final

from torchdistpackage.trainer.callbacks import TrainerCallback
from torchdistpackage.trainer.progress_table import log_line, metrics_table, short_metrics

__all__ = ["ProgressCallback", "metrics_table"]

_log = logging.getLogger(__name__)
_FORMAT = (
    "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"  # numbers need room
)


@final
class ProgressCallback(TrainerCallback):
    """Shows progress, and at the end what has become of it.

    The bar needs tqdm and a terminal; without, or with `args.disable_tqdm`, each log is one line. To see nothing, take
    the callback out: `trainer.remove_callback(ProgressCallback)`.

    Args:
        stream: Where to write; None for the standard error stream, and the standard output for the table.
        table: Whether there is a table at the end.

    Example:
        >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
        >>> from torchdistpackage.trainer.run_state import TrainerState
        >>> args, state = PipelineTrainingArguments(disable_tqdm=True), TrainerState(global_step=2, max_steps=4)
        >>> callback = ProgressCallback(sys.stdout)
        >>> callback.on_train_begin(args, state, None)
        >>> callback.on_log(args, state, None, logs={"loss": 0.5, "epoch": 1.0})
        step 2/4  epoch 1  loss 0.5
    """

    def __init__(self, stream: TextIO | None = None, *, table: bool = True) -> None:
        self._stream, self._table = stream, table
        self._training: Any = None
        self._evaluation: Any = None
        self._summary: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the bar, at the step at which a resumed run goes on."""
        self._summary = {}
        place: dict[str, Any] = {"initial": state.global_step, "unit": "step", "bar_format": _FORMAT}
        self._training = self._bar(args, state, "train", state.max_steps, **place)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._training is not None:
            self._training.update(state.global_step - self._training.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of the evaluation; begins it with the first batch."""
        if self._evaluation is None:
            limits = [args.max_eval_steps if args.max_eval_steps > 0 else None, _length(eval_dataloader)]
            total = min((limit for limit in limits if limit is not None), default=None)
            self._evaluation = self._bar(args, state, "evaluate", total, unit="batch", leave=False)
        if self._evaluation is not None:
            self._evaluation.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar of the evaluation."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows what is logged: beside the bar, or as a line. Evaluations are lines, above the bar."""
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:  # the end: it is in the table
            self._summary = dict(logs)
            return
        if self._training is not None and "loss" in logs:
            rest = {
                name: value for name, value in short_metrics(logs).items() if name != "s/step"
            }  # the bar's own rate
            self._training.set_postfix_str(" ".join(f"{name} {value}" for name, value in rest.items()))
            return
        line = log_line(logs, state.global_step, state.max_steps)
        if self._training is not None:
            self._training.write(line, file=self._out())
        else:
            _write(self._out(), line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar, and shows the table."""
        self.on_evaluate(args, state, control)
        if self._training is not None:
            self._training.close()
            self._training = None
        if state.is_world_process_zero and self._table:
            _write(self._stream or sys.stdout, metrics_table(state.log_history, self._summary))

    def _out(self) -> TextIO:
        return self._stream or sys.stderr

    def _bar(self, args: Any, state: Any, name: str, total: int | None, **options: Any) -> Any:
        """A bar of tqdm; None where none is shown."""
        if not state.is_world_process_zero or args.disable_tqdm or not self._out().isatty():
            return None
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ModuleNotFoundError:
            if name == "train":
                _log.info("a progress bar needs tqdm: pip install 'torchdistpackage[trainer]'; logs are lines instead")
            return None
        # On a terminal that says it has no size, as those of some containers do, tqdm would show nothing at all.
        size: dict[str, Any] = {"dynamic_ncols": True} if _has_size(self._out()) else {"ncols": 120, "nrows": 20}
        return tqdm(desc=name, total=total, file=self._out(), **size, **options)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _has_size(stream: TextIO) -> bool:
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError, AttributeError):
        return False


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
