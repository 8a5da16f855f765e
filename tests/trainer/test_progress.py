"""What a run shows: bars in a terminal, lines elsewhere, nothing on other ranks, a table at the end."""

import io

import pytest

from torchdistpackage.trainer import (
    CallbackHandler,
    PipelineTrainingArguments,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    metrics_table,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


LOGS = {"loss": 1.25, "learning_rate": 5e-5, "grad_norm": 0.5, "epoch": 0.5, "samples_per_second": 2000.0} | {
    "bubble_share": 0.125,
    "peak_memory_bytes": 3 * 2**20,
    "step_seconds": 0.5,
}


def run(stream, first=0, **state):
    """Steps from `first` to 4, with a log and an evaluation in between."""
    args = PipelineTrainingArguments(disable_tqdm=state.pop("disable_tqdm", False), max_eval_steps=2)
    state, control = TrainerState(max_steps=4, global_step=first, **state), TrainerControl()
    handler = CallbackHandler([ProgressCallback(stream)])
    handler.call("on_train_begin", args, state, control)
    for state.global_step in range(first + 1, 5):
        handler.call("on_step_end", args, state, control)
        state.log_history.append({**LOGS, "step": state.global_step})
        handler.call("on_log", args, state, control, logs=LOGS)
    for _ in range(2):
        handler.call("on_prediction_step", args, state, control, eval_dataloader=range(5))
    handler.call("on_evaluate", args, state, control, metrics={"eval_loss": 2.0})
    handler.call("on_log", args, state, control, logs={"eval_loss": 2.0, "epoch": 1.0})
    handler.call("on_log", args, state, control, logs={"train_runtime": 7.0, "train_steps_per_second": 0.5})
    handler.call("on_train_end", args, state, control)
    return stream.getvalue()


def test_a_bar_in_a_terminal():
    pytest.importorskip("tqdm")
    shown = run(Terminal())
    assert "4/4" in shown
    assert "train 100%" in shown
    assert "evaluate:" in shown
    assert "0/2" in shown
    assert "loss 1.25 lr 5e-05 grad norm 0.5 samples/s 2,000 bubble 12.5% memory 3.0 MiB" in shown
    assert "step 4/4  epoch 1  eval_loss 2\n" in shown


def test_a_bar_goes_on_where_a_run_was_resumed():
    pytest.importorskip("tqdm")
    shown = run(Terminal(), first=3)
    assert "3/4" in shown
    assert "0/4" not in shown


@pytest.mark.parametrize("given", [{}, {"disable_tqdm": True}])
def test_lines_elsewhere(given):
    lines = run(Terminal() if given else io.StringIO(), **given).splitlines()
    assert lines[0] == (
        "step 1/4  epoch 0.5  loss 1.25  lr 5e-05  grad norm 0.5  samples/s 2,000  s/step 0.5  bubble 12.5%  "
        "memory 3.0 MiB"
    )
    assert lines[4] == "step 4/4  epoch 1  eval_loss 2"
    assert lines[-1] == "4 steps in 0:00:07, 0.5 steps/s; lowest loss at step 1"


def test_other_ranks_show_nothing():
    assert run(Terminal(), is_world_process_zero=False) == ""


def test_the_table():
    history = [
        {"loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1500.0, "note": "x", "step": 1, "epoch": 0.1},
        {"eval_loss": 1.5, "eval_accuracy": 0.25, "step": 1},
        {"loss": float("nan"), "learning_rate": 0.0, "tokens_per_second": 3000.0, "step": 2},
        {"loss": 0.5, "step": 3},
        {"train_runtime": 3600.4, "train_loss": 1.0, "step": 3},
    ]
    assert metrics_table(history, history[-1]).splitlines() == [
        "               first   last  lowest  highest",
        "loss             2.5    0.5     0.5      2.5",
        "lr             0.001      0       0    0.001",
        "tokens/s       1,500  3,000   1,500    3,000",
        "eval_loss        1.5    1.5     1.5      1.5",
        "eval_accuracy   0.25   0.25    0.25     0.25",
        "3 steps in 1:00:00; lowest loss at step 3, lowest eval_loss at step 1",
    ]


def test_the_table_of_nothing():
    assert metrics_table([]) == "0 steps"
