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
    """Group sizes do not fit the world, a group is unknown, or nothing was set up yet.

    Example:
        >>> from torchdistpackage.topology import rank_table
        >>> try:
        ...     rank_table(8, [("data", 2), ("pipe", 2)])
        ... except TopologyError as error:
        ...     print(error)
        data 2 x pipe 2 = 4 ranks, but the world has 8; set data to 4, or start 4 ranks
    """


class SplitError(TorchDistError, ValueError):
    """A model or a list of layers cannot be cut as asked.

    Example:
        >>> from torchdistpackage.split import uniform_sizes
        >>> try:
        ...     uniform_sizes(3, 4)
        ... except SplitError as error:
        ...     print(str(error).partition(";")[0])
        3 layers cannot fill 4 stages with at least one layer each
    """


class ScheduleError(TorchDistError, ValueError):
    """A schedule is unknown, or a plan is incomplete, out of order or malformed.

    Example:
        >>> from torchdistpackage.schedule import Plan, verify
        >>> try:
        ...     verify(Plan.from_text("0F0 0F1 0B0"))
        ... except ScheduleError as error:
        ...     print(error)
        micro-batch 1 on stage 0 needs one B, or one I and one W; the plan has 0 B, 0 I and 0 W
    """


class DeadlockError(ScheduleError):
    r"""A plan in which some ranks wait for each other for ever.

    Example:
        >>> from torchdistpackage.schedule import Plan, verify
        >>> late_send = Plan.from_csv("0F0,0RECV_B0,0B0,0SEND_F0\n1RECV_F0,1F0,1B0,1SEND_B0")
        >>> try:
        ...     verify(late_send)
        ... except DeadlockError as error:
        ...     print(error)
        ranks wait for each other: rank 0 at 0RECV_B0 waits for 1SEND_B0; rank 1 at 1RECV_F0 waits for 0SEND_F0
        rank 0: 0F0 >>0RECV_B0<< 0B0 0SEND_F0
        rank 1: 1RECV_F0 1F0 1B0 1SEND_B0
    """


class TransportError(TorchDistError, RuntimeError):
    """A message between ranks cannot be packed, moved, or trusted on arrival.

    Example:
        >>> import torch
        >>> from torchdistpackage.runtime.message import read_header
        >>> try:
        ...     read_header(bytes(64))
        ... except TransportError as error:
        ...     print(str(error).partition(":")[0])
        received bytes that are not a pipeline message
    """


class PipelineError(TorchDistError, RuntimeError):
    """A pipelined step failed, here or on another rank; the message names rank, stage, action and cause.

    Where another rank failed, the attributes say so, too; else they are None.

    Attributes:
        global_rank: The rank that failed.
        action: What it was doing: an action of the plan (`"1F2"`), or a few words.
        stage: Stage of the action.
        microbatch: Micro-batch of the action.

    Example:
        >>> from torchdistpackage.runtime.failure import FailureReport  # what the other ranks get to know
        >>> report = FailureReport(rank=1, global_rank=5, action="1F2", error="KeyError('mask')", trace="")
        >>> try:
        ...     raise report.as_error()
        ... except PipelineError as error:
        ...     print(error)
        ...     print(error.global_rank, error.stage, error.microbatch)
        rank 1 of the pipeline (global rank 5) failed at 1F2 (forward of micro-batch 2 on stage 1): KeyError('mask')
        5 1 2
    """

    global_rank: int | None = None
    action: str | None = None
    stage: int | None = None
    microbatch: int | None = None


class CheckpointError(TorchDistError, RuntimeError):
    """A checkpoint is torn, foreign, or does not fit the model.

    Example:
        >>> from torchdistpackage.checkpoint import inspect_checkpoint
        >>> try:
        ...     inspect_checkpoint("no/such/run")
        ... except CheckpointError as error:
        ...     print(error)
        no/such/run cannot be inspected: there is no such folder
    """


class TrainerError(TorchDistError, ValueError):
    """Arguments, data, or the factories of a trainer do not fit each other or the run.

    Example:
        >>> from torchdistpackage.trainer import PipelineTrainingArguments
        >>> try:
        ...     PipelineTrainingArguments(bf16=True, fp16=True)
        ... except TrainerError as error:
        ...     print(error)
        bf16 and fp16 are both set: choose one; bf16 needs no gradient scaler
    """


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
