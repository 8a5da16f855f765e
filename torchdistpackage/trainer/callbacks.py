"""What happens when: the events of a run, what callbacks see in them, and the flags by which they steer it.

::

    on_init_end
    on_train_begin
      on_epoch_begin
        on_step_begin                    on_substep_end, after each batch of a step but the last
          on_pre_optimizer_step  on_optimizer_step
        on_step_end   ------------------> control: should_log, should_evaluate, should_save, should_training_stop
          on_log   on_prediction_step ... on_evaluate   on_save
      on_epoch_end  -------------------->
    on_train_end

The names, arguments and flags are Hugging Face's, so callbacks that were written for its Trainer run here unchanged.
Nothing is asked of them but methods of these names: an object is as good as a subclass of `TrainerCallback`.

Every rank runs the same callbacks at the same events. `state.is_world_process_zero` is True on one rank: the one that
reports. Neighbours: `run_state.py` has state and control, `progress.py` and `trackers.py` are callbacks,
`events.py` calls them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, final

from torchdistpackage.errors import TrainerError
from torchdistpackage.trainer.run_state import TrainerControl, TrainerState

__all__ = ["CallbackHandler", "DefaultFlowCallback", "EVENTS", "TrainerCallback", "TrainerControl", "TrainerState"]

_log = logging.getLogger(__name__)

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)
_LOWERED: dict[str, tuple[str, ...]] = {  # flags that are put back before an event, as Hugging Face does
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_save", "should_evaluate", "should_log"),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
    "on_log": ("should_log",),
}


class TrainerCallback:
    """Base of callbacks: every event is there and does nothing.

    An event gets the arguments, the `TrainerState` and the `TrainerControl`, and by name `model` (this rank's stages,
    an `nn.ModuleList`), `optimizer`, `lr_scheduler`, `train_dataloader`, `eval_dataloader`, `processing_class`;
    `on_log` gets `logs`, `on_evaluate` and `on_predict` get `metrics`. It changes `control` in place, or returns it.
    What it raises is raised from `train()`, as it is.

    Example:
        >>> class StopAt(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 10
        >>> state = TrainerState(global_step=10)
        >>> CallbackHandler([StopAt]).call("on_step_end", None, state, TrainerControl()).should_training_stop
        True
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The trainer is made."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training begins, or goes on from a checkpoint: then `state.global_step` is not 0."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training has ended."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An epoch begins."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An epoch has ended."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A step begins: `gradient_accumulation_steps` batches."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Gradients are complete and clipped."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The optimizer has stepped; gradients are still there."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A batch of a step is done, and it was not the last one."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A step is done."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An evaluation is done: `metrics`."""

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A prediction is done: `metrics`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A checkpoint is written, or being written."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Something is logged: `logs`."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A batch of an evaluation is done."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Never happens here; for callbacks that have it."""


@final
class DefaultFlowCallback(TrainerCallback):
    """Raises the flags by the strategies of the arguments: the first callback of every run.

    With `save_strategy="steps"` the last step is saved too, and evaluated with `eval_strategy="steps"`.

    Example:
        >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
        >>> args, state = PipelineTrainingArguments(logging_steps=10), TrainerState(max_steps=20)
        >>> state.compute_steps(args, 20)
        >>> for step in (9, 10, 20):
        ...     state.global_step = step
        ...     control = DefaultFlowCallback().on_step_end(args, state, TrainerControl())
        ...     print(step, control.should_log, control.should_save, control.should_training_stop)
        9 False False False
        10 True False False
        20 True True True
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Compares the step with the intervals."""
        step, last = state.global_step, state.global_step >= state.max_steps
        if (step == 1 and args.logging_first_step) or _due(args.logging_strategy, step, state.logging_steps):
            control.should_log = True
        if args.eval_delay <= step and _due(args.eval_strategy, step, state.eval_steps, last):
            control.should_evaluate = True
        if _due(args.save_strategy, step, state.save_steps, last):
            control.should_save = True
        if last:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """What is due once an epoch."""
        if args.logging_strategy == "epoch":
            control.should_log = True
        if args.eval_strategy == "epoch" and args.eval_delay <= state.epoch:
            control.should_evaluate = True
        if args.save_strategy == "epoch":
            control.should_save = True
        return control


def _due(strategy: str, step: int, every: int, last: bool = False) -> bool:
    return strategy == "steps" and (last or (every > 0 and step % every == 0))


@final
class CallbackHandler:
    """Calls callbacks, one after the other.

    Args:
        callbacks: Objects or classes; classes are instantiated.

    Attributes:
        callbacks: The objects, in the order in which they are called.

    Raises:
        TrainerError: One of them has no method that is an event's name.

    Example:
        >>> handler = CallbackHandler([DefaultFlowCallback])
        >>> handler.remove(DefaultFlowCallback)
        >>> handler.callbacks
        []
    """

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add(callback)

    def call(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Calls one event of all callbacks that have it; returns the control of the last one that gave another.

        Args:
            event: Its name.
            args: The training arguments.
            state: A `TrainerState`.
            control: A `TrainerControl`.
            **kwargs: What else callbacks see.

        Raises:
            TrainerError: There is no such event, or a callback returns something else than a control.

        Example:
            >>> CallbackHandler().call("on_save", None, TrainerState(), TrainerControl(should_save=True)).should_save
            False
        """
        if event not in EVENTS:
            raise TrainerError(f"there is no event {event!r}; there are {', '.join(EVENTS)}")
        for flag in _LOWERED.get(event, ()):
            setattr(control, flag, False)
        for callback in tuple(self.callbacks):  # one may remove itself
            method = getattr(callback, event, None)
            if method is None:
                continue
            returned = method(args, state, control, **kwargs)
            if returned is not None and not hasattr(returned, "should_training_stop"):
                raise TrainerError(
                    f"{type(callback).__name__}.{event} returned {type(returned).__name__}: it must return the "
                    "control, or nothing"
                )
            control = control if returned is None else returned
        return control

    def add(self, callback: Any) -> None:
        """Puts a callback behind the others.

        Args:
            callback: An object or a class.

        Raises:
            TrainerError: It has no method that is an event's name.

        Example:
            >>> handler = CallbackHandler()
            >>> handler.add(DefaultFlowCallback)
            >>> [type(callback).__name__ for callback in handler.callbacks]
            ['DefaultFlowCallback']
        """
        made = callback() if isinstance(callback, type) else callback
        if not any(callable(getattr(made, event, None)) for event in EVENTS):
            raise TrainerError(
                f"a callback has at least one method named as an event; {type(made).__name__} has none of "
                f"{', '.join(EVENTS)}"
            )
        if any(type(other) is type(made) for other in self.callbacks):
            _log.warning("there are two callbacks of the type %s now; both are called", type(made).__name__)
        self.callbacks.append(made)

    def pop(self, callback: Any) -> Any:
        """Takes a callback out and returns it; None if it is not there.

        Args:
            callback: The object, or a class: the first object of it.

        Example:
            >>> CallbackHandler([DefaultFlowCallback]).pop(TrainerCallback).__class__.__name__
            'DefaultFlowCallback'
        """
        for place, other in enumerate(self.callbacks):
            if isinstance(other, callback) if isinstance(callback, type) else other is callback:
                return self.callbacks.pop(place)
        return None

    def remove(self, callback: Any) -> None:
        """Takes a callback out, if it is there.

        Args:
            callback: As in `pop`.
        """
        self.pop(callback)

    def states(self) -> dict[str, list[dict[str, Any]]]:
        """What callbacks with a `state()` method want back after a restart; for `TrainerState.stateful_callbacks`.

        They are those that follow Hugging Face's ExportableState: `state()` returns `{"args": ..., "attributes": ...}`,
        as JSON can hold it.

        Example:
            >>> class Patience(TrainerCallback):
            ...     left = 3
            ...     def state(self):
            ...         return {"args": {}, "attributes": {"left": self.left}}
            >>> CallbackHandler([DefaultFlowCallback, Patience]).states()
            {'Patience': [{'args': {}, 'attributes': {'left': 3}}]}
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for callback in self.callbacks:
            if callable(getattr(callback, "state", None)):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return found

    def restore(self, states: Mapping[str, Any]) -> None:
        """Sets the attributes that `states` gave. What the callbacks were made with stays as it is now.

        Args:
            states: From `states()`, or from the trainer_state.json of Hugging Face's Trainer.

        Example:
            >>> class Patience(TrainerCallback):
            ...     left = 3
            ...     def state(self):
            ...         return {"args": {}, "attributes": {"left": self.left}}
            >>> handler = CallbackHandler([Patience])
            >>> handler.restore({"Patience": [{"args": {}, "attributes": {"left": 1}}]})
            >>> handler.callbacks[0].left
            1
        """
        for name, saved in states.items():
            many = [each for each in self.callbacks if type(each).__name__ == name and hasattr(each, "state")]
            for callback, state in zip(many, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
