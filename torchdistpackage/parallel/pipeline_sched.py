"""The face: one pipelined step inside the user's own loop.

::

    for samples, targets in loader:
        loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=4)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

This is the only place on the way of a micro-batch that reads the topology context `tpc`: below it, ranks and groups
are arguments. It reads the arguments, takes a proved plan from `schedule/`, hands both to `runtime/`, and gives back
what the plain loop would have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.data_parallel import DistributedDataParallelReducer
from torchdistpackage.parallel.measure import measure_step
from torchdistpackage.parallel.pipeline_state import PipelineState, current_state, running_step
from torchdistpackage.parallel.step_arguments import check_functions, check_memory_limit, check_options
from torchdistpackage.parallel.step_plan import AutoPlan, is_auto, resolve_plan
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.runtime.backward import BackwardFn
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.microbatch import weighted_sum
from torchdistpackage.runtime.p2p import TensorGroupShard
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.stage import ForwardFn
from torchdistpackage.runtime.step import ChunkWork, StepResult
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Plan
from torchdistpackage.topology import tpc

__all__ = ["forward_backward", "forward_eval"]


def forward_backward(
    optimizer: Optimizer | None = None,
    fwd_fn: ForwardFn | Sequence[ForwardFn] | None = None,
    bwd_fn: BackwardFn | Sequence[BackwardFn | None] | None = None,
    inputs: Any = None,
    num_microbatches: int = 1,
    forward_only: bool = False,
    dtype: torch.dtype | None = None,
    scatter_gather_tensors: bool = False,
    *,
    schedule: str | Plan | os.PathLike[str] = "1f1b",
    memory_limit: float | None = None,
    loss_reduction: str = "mean",
    broadcast_loss: bool = False,
    data_parallel: nn.Module | Sequence[nn.Module] | None = None,
    record_timeline: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Any:
    """Runs the forward and backward of one batch through the pipeline; `.grad` is then as after a plain step.

    Call it on every rank of the pipeline with the same arguments, except for `fwd_fn`, `bwd_fn` and `inputs`, which are
    this stage's. Under a schedule with several chunks a rank, `fwd_fn`, `inputs` and, if given, `bwd_fn` are lists with
    one entry for each stage of this rank, in the order of the model.

    Args:
        optimizer: Its `zero_grad()` is called first, also with `forward_only`. With None nothing is zeroed: gradients
            are only ever added to, so that two calls accumulate.
        fwd_fn: This stage's forward. Gets one object when there is one input, else a list `[from the previous stage
            ..., *this stage's slices]`: a list or tuple that the previous stage returned is spread, anything else, a
            dict too, is one entry. Values that go to several stages are returned as a `Routed`; a stage gets those of
            all stages before it, first stage first, in front of its own slices. On the last stage it returns the mean
            loss of its micro-batch (training) or anything (evaluation).
        bwd_fn: This stage's backward, `bwd_fn(output, output_grad)`; `output_grad` is None on the last stage, where
            `output` is the loss weighted by the micro-batch's share, and a dict, destination -> gradients of those of
            its values that want one, where `output` is a `Routed`. None for torch's own.
        inputs: This stage's own inputs for the whole batch: None, a tensor, a list of arguments, or any pytree. Tensors
            are cut along dim 0 into micro-batches whose sizes differ by at most one row; 0-d tensors and other values
            go to each as they are.
        num_microbatches: m >= 1; more than the batch has rows is fine.
        forward_only: Evaluation: no backward, under `torch.no_grad()`. Whether modules are in `eval()` mode is yours.
        dtype: Cast floating tensors to this dtype while they travel between ranks.
        scatter_gather_tensors: With a tensor group of t ranks, each sends 1/t of every message and gathers the rest;
            exact where the ranks of the tensor group hold the same activations.
        schedule: A name of `torchdistpackage.schedule.names()`; a `Plan`; the path of a CSV file with one; or `"auto"`
            (`"auto-v"` for chunks in v placement): the costs of the stages are measured during the first steps of each
            shape of the batch, and the best plan for them runs from then on.
        memory_limit: With `"auto"`, the most bytes of activations that a rank may hold.
        loss_reduction: `"mean"`: loss and gradients are those of the full batch's mean loss, uneven micro-batches
            included. `"sum"`: those of the sum over the micro-batches.
        broadcast_loss: Return on every rank what the last stage returns.
        data_parallel: The data-parallel modules that `fwd_fn` uses (DDP, NaiveDDP, fully_shard, replicate), with
            several chunks an entry for each; None to find them.
        record_timeline: Measure when every action of this step ran on every rank, on one clock: see `last_timeline` and
            `draw_last_step`.
        scaler: Scales the loss for float16, on the stage that has it: a `PipelineGradScaler`, on every rank. What is
            returned is not scaled; a `bwd_fn` of the last stage gets the scaled loss.

    Returns:
        On the rank of the last stage the batch's loss, detached. With `forward_only` what its `fwd_fn` returned, put
        together: all rows in order; floating 0-d tensors reduced as the loss is, weighted by rows; integer ones as a
        tensor of all micro-batches' values; anything else as it is if all micro-batches agree, else as a list. None
        elsewhere, unless `broadcast_loss` is set.

    Raises:
        TopologyError: Process groups have not been set up.
        ScheduleError: Unknown or wrong schedule, or num_microbatches below 1; nothing fits the memory limit.
        PipelineError: Bad inputs, ranks that disagree, or a failure on another rank; the message says which. This
            rank's own exceptions come as they are. After either the same objects can run the next step.

    Example:
        >>> stage, criterion = nn.Linear(2, 2), nn.MSELoss()  # this rank's; on one rank the first and the last
        >>> optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        >>> first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()
        >>> def fwd_fn(x):
        ...     return criterion(stage(x[0]), x[1]) if last else stage(x)
        >>> samples, targets = torch.ones(8, 2), torch.zeros(8, 2)
        >>> inputs = [values for values, here in ((samples, first), (targets, last)) if here] or None
        >>> loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=4)
        >>> torch.allclose(loss, criterion(stage(samples), targets)), stage.weight.grad is not None
        (True, True)
    """
    kept = current_state()
    size = kept.transport.num_ranks
    transport, tied = kept.transport, ties()
    agreed = _agreed(
        loss_reduction, broadcast_loss, dtype, scatter_gather_tensors, record_timeline, is_auto(schedule), scaler
    )
    with transport.guard("the arguments of forward_backward"):
        kept.recover()
        check_functions(optimizer, fwd_fn, bwd_fn)
        check_options(forward_only, loss_reduction, dtype, data_parallel, scaler)
        auto = _auto(kept, schedule, num_microbatches, fwd_fn, memory_limit)
        plan = _plan(auto, schedule, size, num_microbatches, forward_only, fwd_fn, inputs)
        tied.adopt(plan.placement)
        executor = kept.executor(plan)
        shard = _tensor_shard(scatter_gather_tensors)
        work = _chunks(kept, plan, fwd_fn, bwd_fn, inputs, data_parallel, scaler)
        planning = auto is not None and not forward_only
        recorder = auto.recorder() if auto is not None and planning else None
        if record_timeline and recorder is None:
            recorder = Recorder(transport.device)
        if optimizer is not None:
            optimizer.zero_grad()
    with running_step(), torch.set_grad_enabled(not forward_only and torch.is_grad_enabled()):
        result = executor.run(
            work,
            mean=loss_reduction == "mean",
            signature=agreed,
            wire_dtype=dtype,
            shard=shard,
            around=tied,
            recorder=recorder,
            may_run_whole=auto is not None,
        )
        value = _merged(result, forward_only) if result.outputs else None
    if broadcast_loss:
        value = _shared(transport, plan, value)
    kept.plan = executor.plan  # with the skips that the stages have said
    if recorder is not None or planning:
        _after_recording(kept, executor.plan, recorder, auto if planning else None, record_timeline)
    return value


def forward_eval(fwd_fn: ForwardFn, inputs: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Evaluates one batch: `forward_backward` with `forward_only=True`, by default as a single micro-batch.

    Args:
        fwd_fn: This stage's forward.
        inputs: This stage's own inputs.
        dtype: Cast floating tensors to this dtype while they travel.
        **options: Any other argument of `forward_backward`.

    Returns:
        On the rank of the last stage its output, put together as `forward_backward` says; None elsewhere.

    Example:
        >>> stage, samples = nn.Linear(2, 3), torch.ones(8, 2)
        >>> logits = forward_eval(stage, samples if tpc.is_first_in_pipeline_group() else None)
        >>> logits.shape  # on the rank of the last stage
        torch.Size([8, 3])
    """
    return forward_backward(fwd_fn=fwd_fn, inputs=inputs, dtype=dtype, forward_only=True, **options)


def _auto(kept: PipelineState, schedule: Any, m: int, fwd_fn: Any, memory_limit: float | None) -> AutoPlan | None:
    """The planner of this kind of step, if it is to be planned."""
    if not is_auto(schedule):
        if memory_limit is not None:
            raise PipelineError(f"memory_limit={memory_limit} needs schedule='auto'; {schedule!r} holds what it holds")
        return None
    check_memory_limit(memory_limit)
    key = (schedule.lower(), m, _count(fwd_fn) or 1, memory_limit)
    if key not in kept.planners:
        replicas = [tpc.get_control_group(mode) for mode in ("data", "tensor") if tpc.is_mode_inited(mode)]
        kept.planners[key] = AutoPlan(kept.transport, kept.control, *key, replicas=replicas)
    return kept.planners[key]


def _plan(
    auto: AutoPlan | None, schedule: Any, size: int, m: int, forward_only: bool, fwd_fn: Any, inputs: Any
) -> Plan:
    if auto is None:
        return resolve_plan(schedule, size, m, forward_only=forward_only, chunks=_count(fwd_fn))
    return auto.evaluation() if forward_only else auto.begin(inputs)


def _count(fwd_fn: Any) -> int | None:
    return len(fwd_fn) if isinstance(fwd_fn, (list, tuple)) else None


def _agreed(
    loss_reduction: str, shared: bool, dtype: Any, scattered: bool, recorded: bool, planned: bool, scaler: Any
) -> str:
    """What every rank must have asked for alike, besides the plan, in words for the error if one has not."""
    words = [
        f"{loss_reduction} of losses",
        *(["loss on every rank"] if shared else []),
        *([f"messages in {dtype}"] if dtype is not None else []),
        *(["scattered messages"] if scattered else []),
        *(["a recorded timeline"] if recorded else []),
        *(["planned"] if planned else []),
        *(["scaled"] if scaler is not None else []),
    ]
    return "".join(f", {word}" for word in words)


def _chunks(
    kept: PipelineState, plan: Plan, fwd_fn: Any, bwd_fn: Any, inputs: Any, data_parallel: Any, scaler: Any
) -> list[ChunkWork]:
    """One entry for each stage of this rank; with one chunk a rank `fwd_fn` and `inputs` are that entry."""
    rank = kept.transport.rank
    stages = plan.placement.local_stages(rank)
    count = len(stages)
    several = isinstance(fwd_fn, (list, tuple))
    functions = list(fwd_fn) if several else [fwd_fn]
    backwards = list(bwd_fn) if isinstance(bwd_fn, (list, tuple)) else [bwd_fn] * count
    one = count == 1 and not (several and isinstance(inputs, (list, tuple)) and len(inputs) == 1)
    own = [inputs] if one else [None] * count if inputs is None else inputs
    fits = isinstance(own, (list, tuple)) and len(functions) == len(backwards) == len(own) == count
    if not fits:
        raise PipelineError(
            f"schedule {plan.name!r} gives rank {rank} {count} stage(s), {stages}: fwd_fn must be a list of {count} "
            f"function(s), and inputs None or a list of {count} entries (None where a stage has none), in this order; "
            f"got {len(functions)} function(s) and {_amount(inputs)}"
        )
    scale = None if scaler is None else scaler.scale
    return [
        ChunkWork(function, backward, mine, reducer, scale)
        for function, backward, mine, reducer in zip(
            functions, backwards, own, _reducers(kept, plan, count, data_parallel), strict=True
        )
    ]


def _reducers(
    kept: PipelineState, plan: Plan, count: int, given: Any
) -> Sequence[DistributedDataParallelReducer | None]:
    """What reduces the gradients of each chunk over its replicas."""
    of_chunks = partial(
        DistributedDataParallelReducer.of_chunks, agree=kept.replicas["data"].agree if "data" in kept.replicas else None
    )
    # Without replicas there is nothing to find, except for a wrapper around the one replica of a "data" dimension.
    replicas = tpc._is_inited("data") or (dist.is_initialized() and dist.get_world_size() > plan.placement.num_ranks)
    if given is None:
        return of_chunks([None] * count) if replicas else [None] * count
    modules = list(given) if isinstance(given, (list, tuple)) else [given]
    if count == 1:
        return of_chunks([modules])
    if len(modules) != count:
        raise PipelineError(
            f"data_parallel has {len(modules)} entries for {count} stages of this rank; pass one a stage, each a "
            "module, a list of modules, or None, or leave data_parallel out to have them found"
        )
    listed = [list(entry) if isinstance(entry, (list, tuple)) else [entry] if entry else [] for entry in modules]
    return of_chunks(listed)


def _amount(inputs: Any) -> str:
    return f"{len(inputs)} inputs" if isinstance(inputs, (list, tuple)) else f"inputs of type {type(inputs).__name__}"


def _merged(result: StepResult, forward_only: bool) -> Any:
    """The batch's loss, or the rows of all micro-batches in order."""
    if forward_only:
        return result.merged
    losses = [output for output in result.outputs if isinstance(output, Tensor) and output.numel() == 1]
    # A custom backward may start from something else than a loss; then there is no number to return.
    return weighted_sum(losses, result.weights) if len(losses) == len(result.outputs) else None


def _after_recording(
    kept: PipelineState, plan: Plan, recorder: Recorder | None, auto: AutoPlan | None, wanted: bool
) -> None:
    """What a recorded step is good for: the next plan, and `last_timeline`. Collective over the pipeline."""
    with kept.transport.guard("what follows a recorded step"):
        measured = None if recorder is None else measure_step(kept.transport, kept.control, plan, recorder)
        if auto is not None:
            auto.end(measured)
        if measured is not None and wanted:
            kept.step = measured


def _shared(transport: Transport, plan: Plan, value: Any) -> Any:
    """Passes the loss rank's value on, from neighbour to neighbour in both directions, to every rank."""
    rank, source = transport.rank, plan.placement.loss_rank
    with transport.guard("sharing the loss"):
        if rank != source:
            sender = rank + 1 if rank < source else rank - 1
            message = transport.inlet(sender).take(Kind.VALUE, source, 0)
            assert message.layout is not None
            value = message.layout.tree(message.tensors)
        for receiver in (rank - 1, rank + 1):
            if 0 <= receiver < transport.num_ranks and abs(receiver - source) > abs(rank - source):
                transport.outlet(receiver).send(Kind.VALUE, source, 0, 0, *flatten(value))
    return value


def _tensor_shard(wanted: bool) -> TensorGroupShard | None:
    group = tpc.get_group("tensor") if wanted and tpc.get_group_size("tensor") > 1 else None
    return None if group is None else TensorGroupShard(group)
