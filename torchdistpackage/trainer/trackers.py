"""Where the numbers of a run go: TensorBoard's files, or any tracker with `.log(numbers, step=)`.

::

    logs of training      loss, learning_rate, grad_norm, ...     ->  train/loss, train/learning_rate, ...
    logs of evaluations   eval_loss, eval_runtime, ...            ->  eval/loss, eval/runtime, ...
    the end of training   train_runtime, train_loss, ...          ->  train/runtime, train/total_loss, ...

Only the rank that reports (`state.is_world_process_zero`) writes; on the others nothing is opened. A tracker, often a
service far away, is not worth a run: when it fails, there is one warning, and training goes on. What TensorBoard's
writer raises (a full disk) is raised as it is: checkpoints would fail there, too. Neighbours: `callbacks.py` has the
events, `progress.py` shows the same numbers to people.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, final

from torchdistpackage.errors import TrainerError
from torchdistpackage.trainer.callbacks import TrainerCallback

__all__ = ["TensorBoardCallback", "TrackerCallback", "reporting_callbacks"]

_log = logging.getLogger(__name__)


@final
class TensorBoardCallback(TrainerCallback):
    """Writes TensorBoard's event files.

    A resumed run goes on in the same folder; what an earlier run has logged from this step on is hidden, so no step
    is there twice.

    Args:
        logging_dir: The folder; None for `args.logging_dir`.

    Raises:
        TrainerError: tensorboard is not installed.

    Example:
        Into another folder than that of the arguments::

            trainer.add_callback(TensorBoardCallback("runs/first"))
    """

    def __init__(self, logging_dir: str | os.PathLike[str] | None = None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise TrainerError(
                "TensorBoard's files need tensorboard: pip install 'torchdistpackage[trainer]', or report_to='none'"
            )
        self._folder = logging_dir
        self._writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the file, and writes the arguments."""
        self._open(args, state)
        if self._writer is not None:
            self._writer.add_text("args", f"```\n{args.to_json_string()}\n```", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes the numbers."""
        self._open(args, state)  # an evaluation without training
        if self._writer is not None:
            for tag, value in tagged(logs or {}).items():
                self._writer.add_scalar(tag, value, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts everything into the file: a run that goes on from this checkpoint needs what was before."""
        if self._writer is not None:
            self._writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.fspath(self._folder or args.logging_dir)
            self._writer = SummaryWriter(folder, purge_step=state.global_step + 1)


@final
class TrackerCallback(TrainerCallback):
    """Hands the numbers to a tracker: a run of Weights & Biases, an adapter of your own, a module with `log`.

    Args:
        tracker: Something with `.log(numbers, step=)`; or a function without arguments that makes it. The function is
            called where the rank that reports begins to train, so other ranks open nothing.

    Raises:
        TrainerError: It is neither.

    Example:
        >>> class Shown:
        ...     def log(self, numbers, step): print(step, numbers)
        >>> from torchdistpackage.trainer import TrainerState
        >>> callback = TrackerCallback(Shown())
        >>> callback.on_log(None, TrainerState(global_step=2), None, logs={"loss": 0.5})
        2 {'train/loss': 0.5}
    """

    def __init__(self, tracker: Any) -> None:
        if not hasattr(tracker, "log") and not callable(tracker):
            raise TrainerError(
                f"a tracker has .log(numbers, step=), or is a function that makes one; got {type(tracker).__name__}"
            )
        self._tracker = tracker if hasattr(tracker, "log") else None
        self._make, self._warned = tracker, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the tracker, if a function was given."""
        if state.is_world_process_zero:
            self._made()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Hands the numbers on."""
        numbers = tagged(logs or {})
        tracker = self._made() if state.is_world_process_zero and numbers else None
        if tracker is None:
            return
        try:
            tracker.log(numbers, step=state.global_step)
        except Exception as error:
            self._warn(tracker, error)

    def _made(self) -> Any:
        if self._tracker is None and self._make is not None:
            make, self._make = self._make, None  # once, also if it fails
            try:
                self._tracker = make()
            except Exception as error:
                self._warn(make, error)
        return self._tracker

    def _warn(self, tracker: Any, error: Exception) -> None:
        if not self._warned:
            _log.warning(
                "the tracker %s failed (%s: %s); training goes on, and further failures are not reported",
                getattr(tracker, "__name__", type(tracker).__name__),
                type(error).__name__,
                error,
            )
        self._warned = True


def reporting_callbacks(report_to: Iterable[Any]) -> list[TrainerCallback]:
    """The callbacks of `args.report_to`.

    Args:
        report_to: `"tensorboard"`, trackers, and functions that make them.

    Raises:
        TrainerError: As the callbacks do.

    Example:
        >>> reporting_callbacks(())
        []
    """
    return [TensorBoardCallback() if each == "tensorboard" else TrackerCallback(each) for each in report_to]


def tagged(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log, by the names that trackers show: `train/loss`, `eval/loss`.

    Example:
        >>> tagged({"loss": 1, "epoch": 0.5, "eval_loss": 2, "train_loss": 3, "note": "text"})
        {'train/loss': 1.0, 'train/epoch': 0.5, 'eval/loss': 2.0, 'train/total_loss': 3.0}
    """
    found: dict[str, float] = {}
    for name, value in logs.items():
        if isinstance(value, bool) or not isinstance(value, Real) or name == "step":
            continue
        if name == "train_loss":  # the mean of the run, at its end: not to be mixed with the last step's
            name = "total_loss"
        found[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name.removeprefix('train_')}"] = float(value)
    return found
