"""Events, flags and state; transformers' own callbacks run unchanged."""

import json

import pytest

from torchdistpackage import TrainerError
from torchdistpackage.trainer import (
    CallbackHandler,
    DefaultFlowCallback,
    PipelineTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from torchdistpackage.trainer.callbacks import EVENTS


def flow(steps, per_epoch=None, **given):
    """The flags after each step, as letters, and after each epoch: what a trainer would do."""
    args = PipelineTrainingArguments(**given)
    state, control, seen = TrainerState(max_steps=steps), TrainerControl(), []
    state.compute_steps(args, steps)
    handler = CallbackHandler([DefaultFlowCallback])
    flags = {"should_log": "l", "should_evaluate": "e", "should_save": "s", "should_training_stop": "!"}
    for step in range(1, steps + 1):
        control = handler.call("on_step_begin", args, state, control)
        state.global_step, state.epoch = step, step / (per_epoch or steps)
        control = handler.call("on_step_end", args, state, control)
        if step % (per_epoch or steps) == 0:
            control = handler.call("on_epoch_end", args, state, control)
        seen.append("".join(letter for flag, letter in flags.items() if getattr(control, flag)))
    return " ".join(each or "-" for each in seen)


def test_strategies_by_steps():
    assert flow(5, logging_steps=2, save_strategy="no") == "- l - l !"
    assert flow(3, logging_steps=2, logging_first_step=True, save_strategy="no") == "l l !"
    assert flow(5, logging_strategy="no", save_steps=2) == "- s - s s!"
    assert flow(5, logging_strategy="no", save_strategy="no", eval_strategy="steps", eval_steps=2) == "- e - e e!"
    assert flow(4, logging_strategy="no", save_strategy="no", eval_strategy="steps", eval_steps=1, eval_delay=3) == (
        "- - e e!"
    )
    assert flow(8, logging_steps=0.5, save_strategy="no") == "- - - l - - - l!"


def test_strategies_by_epochs():
    told = flow(4, 2, logging_strategy="epoch", save_strategy="epoch", eval_strategy="epoch", eval_delay=2)
    assert told == "- ls - les!"


class Counter:
    """No subclass of anything: one event is enough."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((logs, sorted(kwargs)))


def test_events_are_passed_over_where_a_callback_has_none():
    counter = Counter()
    handler = CallbackHandler([counter, TrainerCallback])
    for event in EVENTS:
        handler.call(event, None, TrainerState(), TrainerControl(), logs={"loss": 1.0}, model="m")
    assert counter.seen == [({"loss": 1.0}, ["model"])]
    assert all(hasattr(TrainerCallback, event) for event in EVENTS)


def test_another_control_takes_the_place_of_the_first():
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    control = CallbackHandler([Stops, TrainerCallback]).call("on_step_end", None, TrainerState(), TrainerControl())
    assert control.should_training_stop


def test_what_a_callback_raises_comes_as_it_is():
    class Broken(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CallbackHandler([Broken]).call("on_save", None, TrainerState(), TrainerControl())


def test_callbacks_come_and_go(caplog):
    counter = Counter()
    handler = CallbackHandler([DefaultFlowCallback, counter])
    assert handler.pop(Counter) is counter
    assert handler.pop(Counter) is None
    handler.add(counter)
    handler.add(Counter)
    assert "two callbacks of the type Counter" in caplog.text
    handler.remove(counter)
    assert [type(each).__name__ for each in handler.callbacks] == ["DefaultFlowCallback", "Counter"]


def test_what_is_no_callback():
    with pytest.raises(TrainerError, match=r"dict has none of on_init_end"):
        CallbackHandler([dict])
    with pytest.raises(TrainerError, match="no event 'on_lunch'"):
        CallbackHandler().call("on_lunch", None, TrainerState(), TrainerControl())

    class Returns:
        def on_log(self, *_, **__):
            return 3

    with pytest.raises(TrainerError, match=r"Returns\.on_log returned int"):
        CallbackHandler([Returns]).call("on_log", None, TrainerState(), TrainerControl())


def test_state_is_json():
    state = TrainerState(epoch=0.5, log_history=[{"loss": 1.0, "step": 1}], best_metric=0.1)
    assert TrainerState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


# --- transformers' own ------------------------------------------------------------------------------------------------


def evaluations(handler, values, **given):
    """Evaluates after each step; best_metric is kept as a trainer keeps it. Returns the step at which it stopped."""
    args = PipelineTrainingArguments(
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, **given
    )
    state, control = TrainerState(max_steps=len(values)), TrainerControl()
    control = handler.call("on_train_begin", args, state, control)
    for step, value in enumerate(values, 1):
        state.global_step = step
        control = handler.call("on_evaluate", args, state, control, metrics={"eval_loss": value})
        if state.best_metric is None or value < state.best_metric:
            state.best_metric = value
        if control.should_training_stop:
            return step
    return None


def test_early_stopping_of_transformers():
    transformers = pytest.importorskip("transformers")
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    assert evaluations(CallbackHandler([stopping]), [3.0, 2.0, 2.5, 2.1, 1.0]) == 4


def test_early_stopping_goes_on_counting_after_a_restart():
    transformers = pytest.importorskip("transformers")
    before = CallbackHandler([transformers.EarlyStoppingCallback(early_stopping_patience=3)])
    assert evaluations(before, [1.0, 2.0, 2.0]) is None
    saved = json.loads(json.dumps(before.states()))
    after = CallbackHandler([transformers.EarlyStoppingCallback(early_stopping_patience=3)])
    after.restore(saved)
    assert after.callbacks[0].early_stopping_patience_counter == 2


def test_printer_and_progress_of_transformers(capsys):
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_callback import ProgressCallback

    handler = CallbackHandler([transformers.PrinterCallback, ProgressCallback, DefaultFlowCallback])
    args, state, control = PipelineTrainingArguments(), TrainerState(max_steps=2), TrainerControl()
    control = handler.call("on_train_begin", args, state, control)
    for state.global_step in (1, 2):
        control = handler.call("on_step_end", args, state, control)
    handler.call("on_prediction_step", args, state, control, eval_dataloader=[1, 2])
    handler.call("on_evaluate", args, state, control, metrics={})
    control = handler.call("on_log", args, state, control, logs={"loss": 1.23456})
    handler.call("on_train_end", args, state, control)
    assert control.should_training_stop
    assert "1.235" in capsys.readouterr().out


def test_transformers_flow_sets_the_same_flags():
    transformers = pytest.importorskip("transformers")
    args = PipelineTrainingArguments(logging_steps=2, eval_strategy="steps", eval_steps=3, save_steps=2)
    for step in range(1, 8):
        state, ours, theirs = TrainerState(global_step=step, max_steps=7), TrainerControl(), TrainerControl()
        state.compute_steps(args, 7)
        DefaultFlowCallback().on_step_end(args, state, ours)
        transformers.DefaultFlowCallback().on_step_end(args, state, theirs)
        assert ours == theirs
