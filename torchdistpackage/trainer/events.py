"""The events of one run: callbacks with what they see, the flags they set, and the log.

Neighbours: `callbacks.py` has the callbacks, `training_loop.py` says what happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from torchdistpackage.topology import tpc
from torchdistpackage.trainer.callbacks import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState
from torchdistpackage.trainer.process_layout import any_rank_wants

__all__ = ["Events"]

_FLAGS = ("should_log", "should_evaluate", "should_save", "should_training_stop", "should_epoch_stop")


@final
class Events:
    """Calls callbacks, and agrees with the other ranks on what they want.

    Args:
        args: The training arguments.
        state: Where the run is.
        given: The user's callbacks.
        built_in: Those that show the run: what they do is the same on every rank.
        shown: What every event hands over.

    Attributes:
        state: Where the run is.
        control: The flags.
        handler: The callbacks.
    """

    def __init__(
        self, args: Any, state: TrainerState, given: Iterable[Any], built_in: Iterable[Any], shown: Mapping[str, Any]
    ) -> None:
        self.state, self.control = state, TrainerControl()
        given = list(given)
        self.handler = CallbackHandler([DefaultFlowCallback(), *given, *built_in])
        self._args, self._shown = args, dict(shown)
        self._steered = bool(given)  # by callbacks of the user's, here
        self._agrees = False

    def call(self, event: str, **kwargs: Any) -> None:
        """Something happens: every callback that has a method of this name is called."""
        found = self.handler.call(event, self._args, self.state, self.control, **{**self._shown, **kwargs})
        self.control = found

    def log(self, logs: Mapping[str, float]) -> None:
        """A row of numbers, the same on every rank."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.call("on_log", logs=dict(logs))

    def add(self, callback: Any) -> None:
        """One more callback of the user's."""
        self.handler.add(callback)
        self._steered = True

    def begin(self) -> None:
        """Comes before a run: finds out whether any rank has callbacks that could steer it alone. Collective."""
        self._agrees = any_rank_wants([self._steered])[0]

    def agree(self) -> None:
        """Raises the flags on every rank that are up on any: a callback may look at a clock. Collective.

        Without callbacks of the user's all ranks raise the same flags, and no message is sent.
        """
        if not self._agrees or tpc.get_pp_size() * tpc.get_dp_size() == 1:
            return
        wanted = any_rank_wants([getattr(self.control, flag) for flag in _FLAGS])
        for flag, up in zip(_FLAGS, wanted, strict=True):
            setattr(self.control, flag, up)
