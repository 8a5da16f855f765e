"""What callbacks see and set: where a run is, and the flags by which they steer it. Data only.

The fields are those of Hugging Face's, so its callbacks find what they look for. Neighbours: `callbacks.py` hands both
to callbacks, `training_loop.py` keeps them up to date.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TrainerControl", "TrainerState"]


@dataclass
class TrainerState:
    """Where a run is; goes into checkpoints, as JSON.

    Attributes:
        epoch: Epochs that are done, with a fraction.
        global_step: Optimizer steps that are done.
        max_steps: Of the whole run.
        num_train_epochs: Of the whole run, rounded up.
        logging_steps: In steps, where the arguments have a share.
        eval_steps: The same.
        save_steps: The same.
        train_batch_size: Rows of a replica's batch.
        num_input_tokens_seen: Of all replicas.
        total_flos: Floating point operations, if somebody counts them.
        log_history: Everything that was logged, each with `step` and `epoch`.
        best_metric: The best value of `metric_for_best_model`.
        best_global_step: The step it was of.
        best_model_checkpoint: The checkpoint it is in.
        is_local_process_zero: The same as the next; no rank reports for each node.
        is_world_process_zero: Whether this rank reports: prints, draws bars, writes logs.
        is_hyper_param_search: Always False.
        trial_name: Always None.
        trial_params: Always None.
        stateful_callbacks: What callbacks want back after a restart; see `CallbackHandler.states`.

    Example:
        >>> state = TrainerState(global_step=3, log_history=[{"loss": 1.5, "step": 3}])
        >>> TrainerState.from_dict(state.to_dict()) == state
        True
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 50
    eval_steps: int = 100
    save_steps: int = 1000
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Sets `logging_steps`, `eval_steps` and `save_steps`: shares become steps, rounded up.

        Args:
            args: The training arguments.
            max_steps: Steps of the whole run.

        Example:
            >>> from torchdistpackage.trainer.arguments import PipelineTrainingArguments
            >>> state = TrainerState()
            >>> state.compute_steps(PipelineTrainingArguments(eval_steps=0.25), 30)
            >>> state.eval_steps, state.save_steps
            (8, 1000)
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            setattr(self, name, math.ceil(max_steps * value) if value < 1 else int(value))

    def to_dict(self) -> dict[str, Any]:
        """All fields.

        Example:
            >>> TrainerState(max_steps=4).to_dict()["max_steps"]
            4
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerState:
        """The state with these fields; names that are no fields are passed over: a newer version may have more.

        Example:
            >>> TrainerState.from_dict({"global_step": 2, "unknown": 1}).global_step
            2
        """
        known = {each.name for each in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass
class TrainerControl:
    """The flags by which callbacks steer a run.

    Attributes:
        should_training_stop: End after this step.
        should_epoch_stop: End the epoch after this step.
        should_save: Write a checkpoint after this step.
        should_evaluate: Evaluate after this step.
        should_log: Log after this step.

    Example:
        >>> TrainerControl(should_log=True).should_save
        False
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
