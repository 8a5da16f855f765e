"""Which processes train what: process groups out of a trainer's arguments, unless the user has set them up.

::

    8 processes, pipeline_parallel_size=4      0 1 2 3    one pipeline, one replica
                                               4 5 6 7    the other one

One process without a launcher is a pipeline of one. Neighbours: `topology/` does the work, `pipeline_trainer.py` calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torchdistpackage.errors import CheckpointError, SplitError, TrainerError
from torchdistpackage.parallel.agreement import said_by_all
from torchdistpackage.parallel.pipeline_state import current_state, guarded
from torchdistpackage.topology import setup_distributed, tpc
from torchdistpackage.topology.exchange import broadcast_json
from torchdistpackage.trainer.arguments import PipelineTrainingArguments

__all__ = [
    "any_rank_wants",
    "device_of",
    "from_every_rank",
    "from_first_rank",
    "others_are_told",
    "set_up_processes",
]

_MODES = ("pipe", "tensor", "data")


def set_up_processes(args: PipelineTrainingArguments) -> None:
    """Starts torch.distributed and makes the process groups of `tpc`; what is there already stays.

    Raises:
        TrainerError: The sizes do not fit the number of processes, or groups that are there.
        TopologyError: torch.distributed cannot be started.
    """
    if tpc._is_inited("global"):
        _check_present(args)
        return
    cpu = args.use_cpu or not torch.cuda.is_available()
    if not dist.is_initialized():
        setup_distributed("gloo" if cpu else None)
    world = dist.get_world_size()
    pipe, data = args.pipeline_parallel_size, args.data_parallel_size
    if pipe is None:
        pipe = world if data is None else world // data
    if data is None:
        data = world // pipe
    if pipe * data != world:
        raise TrainerError(
            f"pipeline_parallel_size={args.pipeline_parallel_size} and data_parallel_size={args.data_parallel_size} do "
            f"not make {world} processes: start {max(pipe, 1) * max(data, 1)}, or leave one of the two out"
        )
    tpc.setup_process_groups([("data", data), ("pipe", pipe)])


def _check_present(args: PipelineTrainingArguments) -> None:
    for name, wanted, have in (
        ("pipeline_parallel_size", args.pipeline_parallel_size, tpc.get_pp_size()),
        ("data_parallel_size", args.data_parallel_size, tpc.get_dp_size()),
    ):
        if wanted is not None and wanted != have:
            raise TrainerError(f"{name}={wanted}, but the process groups that are set up have {have}: leave it out")
    if tpc.get_tp_size() > 1:
        raise TrainerError(
            f"the tensor groups have {tpc.get_tp_size()} ranks, and this trainer does not shard layers: write the loop "
            "around forward_backward, as examples/train_3d.py does"
        )


def device_of(args: PipelineTrainingArguments) -> torch.device:
    """Where this process computes.

    Example:
        >>> device_of(PipelineTrainingArguments(use_cpu=True))
        device(type='cpu')
    """
    if args.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def others_are_told(action: str) -> Iterator[None]:
    """Surrounds what a user's code may fail in on one rank alone: a dataset, a callback, an optimizer.

    Steps and collectives tell of their own failures. What fails between them would be heard of when this process ends,
    which may be never; now the other ranks raise at their next step or collective, and name this rank.

    Args:
        action: What this rank was doing, for the error on the others.

    Raises:
        BaseException: What was raised inside, as it is.
    """
    transport = current_state().transport
    epoch = transport.epoch
    try:
        yield
    except (CheckpointError, SplitError):  # raised on every rank
        raise
    except BaseException as error:
        if transport.epoch != epoch:  # a step has told already
            raise
        transport.fail(error, action)


def from_every_rank(value: Any) -> list[Any]:
    """What every process of all replicas says, as JSON. Collective.

    Raises:
        PipelineError: Another rank has failed.
    """
    with guarded("telling each other what was measured"):
        return said_by_all(value)


def from_first_rank(value: Any) -> Any:
    """What the first process of all says. Collective.

    Raises:
        PipelineError: Another rank has failed.
    """
    with guarded("hearing from the first rank"):
        for mode in ("data", "tensor", "pipe"):
            if tpc.is_mode_inited(mode) and tpc.get_group_size(mode) > 1:
                value = broadcast_json(value, tpc.get_control_group(mode))
    return value


def any_rank_wants(flags: Sequence[bool]) -> list[bool]:
    """Each flag, set if it is set on any rank. Collective, one small message a group.

    Raises:
        PipelineError: Another rank has failed.
    """
    votes = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
    with guarded("agreeing on what to do next"):
        for mode in _MODES:
            if tpc.is_mode_inited(mode) and tpc.get_group_size(mode) > 1:
                dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=tpc.get_control_group(mode))
    return [bool(vote) for vote in votes.tolist()]
