"""The exception tree: every error that this library raises on purpose.

::

    TorchDistError
    ├── TopologyError        sizes, groups, set-up order           (also a ValueError)
    ├── SplitError           a model or layer list cannot be cut   (also a ValueError)
    ├── ScheduleError        a plan is unknown, incomplete or wrong (also a ValueError)
    │   └── DeadlockError    a plan in which ranks wait for each other for ever
    ├── TransportError       a message cannot be packed, sent, received or trusted
    ├── PipelineError        a step failed: which rank, stage, action and why
    ├── CheckpointError      a checkpoint is torn, foreign or does not fit
    ├── TrainerError         arguments, data or factories of a trainer do not fit (also a ValueError)
    └── NonFiniteError       a NaN or Inf arose in a module       (also a FloatingPointError)

User mistakes are raised at construction, before anything runs; each message states the numbers and the next thing to
try. A failure while a step runs reaches every rank of the pipeline: the rank that failed raises its own exception, the
others raise `PipelineError`.

This file is the bottom of the house: it imports nothing and every room imports it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DeadlockError",
    "NonFiniteError",
    "PipelineError",
    "ScheduleError",
    "SplitError",
    "TopologyError",
    "TorchDistError",
    "TrainerError",
    "TransportError",
]


class TorchDistError(Exception):
    """Base of every error raised by this library.

    Example:
        >>> try:
        ...     raise SplitError("3 layers cannot fill 4 stages")
        ... except TorchDistError as error:
        ...     print(error)
        3 layers cannot fill 4 stages
    """


class TopologyError(TorchDistError, ValueError):
    """Group sizes do not fit the world, a group is unknown, or nothing was set up yet."""


class SplitError(TorchDistError, ValueError):
    """A model or a list of layers cannot be cut as asked."""


class ScheduleError(TorchDistError, ValueError):
    """A schedule is unknown, or a plan is incomplete, out of order or malformed."""


class DeadlockError(ScheduleError):
    """A plan in which some ranks wait for each other for ever."""


class TransportError(TorchDistError, RuntimeError):
    """A message between ranks cannot be packed, moved, or trusted on arrival."""


class PipelineError(TorchDistError, RuntimeError):
    """A pipelined step failed, here or on another rank; the message names rank, stage, action and cause.

    Where another rank failed, the attributes say so, too; else they are None.

    Attributes:
        global_rank: The rank that failed.
        action: What it was doing: an action of the plan (`"1F2"`), or a few words.
        stage: Stage of the action.
        microbatch: Micro-batch of the action.

    Example:
        >>> try:
        ...     raise PipelineError("rank 1 of the pipeline (global rank 5) failed ...")
        ... except PipelineError as error:
        ...     print(error.global_rank)
        None
    """

    global_rank: int | None = None
    action: str | None = None
    stage: int | None = None
    microbatch: int | None = None


class CheckpointError(TorchDistError, RuntimeError):
    """A checkpoint is torn, foreign, or does not fit the model."""


class TrainerError(TorchDistError, ValueError):
    """Arguments, data, or the factories of a trainer do not fit each other or the run."""


class NonFiniteError(TorchDistError, FloatingPointError):
    """A NaN or Inf arose in a module; the message names module, pass, kind and how many there are.

    Attributes:
        module: Name of the module, "root" for the model; None if it came from outside.

    Example:
        >>> try:
        ...     raise NonFiniteError("NaN in the output of module 'fc' (Linear) ...")
        ... except FloatingPointError as error:
        ...     print(error.module)
        None
    """

    module: str | None = None
