"""Where the numbers go: TensorBoard's files, and trackers."""

import numpy as np
import pytest

from torchdistpackage import TrainerError
from torchdistpackage.trainer import (
    CallbackHandler,
    PipelineTrainingArguments,
    TensorBoardCallback,
    TrackerCallback,
    TrainerControl,
    TrainerState,
)
from torchdistpackage.trainer.trackers import reporting_callbacks


class Tracker:
    def __init__(self):
        self.seen = []

    def log(self, numbers, step):
        self.seen.append((step, numbers))


def log(callback, steps, first=0, **state):
    """Logs once a step, as a trainer does."""
    args, handler = PipelineTrainingArguments(), CallbackHandler([callback])
    state = TrainerState(global_step=first, max_steps=9, **state)
    handler.call("on_train_begin", args, state, TrainerControl())
    for state.global_step in steps:
        logs = {"loss": 10.0 + state.global_step, "epoch": 1.0, "text": "no number", "flag": True}
        handler.call("on_log", args, state, TrainerControl(), logs=logs)
        handler.call("on_log", args, state, TrainerControl(), logs={"eval_loss": np.float32(0.5)})
        handler.call("on_save", args, state, TrainerControl())
    handler.call("on_train_end", args, state, TrainerControl())


def test_a_tracker_gets_numbers_with_their_step():
    tracker = Tracker()
    log(TrackerCallback(tracker), [3])
    assert tracker.seen == [(3, {"train/loss": 13.0, "train/epoch": 1.0}), (3, {"eval/loss": 0.5})]


def test_a_tracker_is_made_where_it_is_needed():
    made = []

    def make():
        made.append(Tracker())
        return made[-1]

    log(TrackerCallback(make), [1, 2], is_world_process_zero=False)
    assert not made
    log(TrackerCallback(make), [1, 2])
    assert len(made) == 1
    assert len(made[0].seen) == 4


def test_a_tracker_that_fails_is_told_of_once(caplog):
    class Offline(Tracker):
        def log(self, numbers, step):
            raise ConnectionError("no route")

    log(TrackerCallback(Offline()), [1, 2, 3])
    (told,) = [each.getMessage() for each in caplog.records]
    assert told.startswith("the tracker Offline failed (ConnectionError: no route); training goes on")
    caplog.clear()
    log(TrackerCallback(lambda: 1 / 0), [1, 2])
    assert len(caplog.records) == 1


def test_report_to():
    tracker = Tracker()
    args = PipelineTrainingArguments(report_to=["none", tracker])
    (callback,) = reporting_callbacks(args.report_to)
    log(callback, [1])
    assert len(tracker.seen) == 2
    with pytest.raises(TrainerError, match="got int"):
        TrackerCallback(3)


def scalars(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    log(TensorBoardCallback(tmp_path), [1, 2])
    assert scalars(tmp_path) == {
        "train/loss": [(1, 11.0), (2, 12.0)],
        "train/epoch": [(1, 1.0), (2, 1.0)],
        "eval/loss": [(1, 0.5), (2, 0.5)],
    }


def test_a_resumed_run_has_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    log(TensorBoardCallback(tmp_path), [1, 2, 3, 4])
    log(TensorBoardCallback(tmp_path), [3, 4, 5], first=2)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


def test_other_ranks_write_nothing(tmp_path):
    pytest.importorskip("tensorboard")
    log(TensorBoardCallback(tmp_path), [1, 2], is_world_process_zero=False)
    assert not list(tmp_path.iterdir())
