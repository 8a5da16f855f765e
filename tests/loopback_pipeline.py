"""Runs a pipeline on loopback: every rank a thread of this process, the plain loop beside it for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.runtime import ChunkWork, Executor, StepResult, loopback
from torchdistpackage.runtime.microbatch import microbatch_sizes, weighted_sum
from torchdistpackage.schedule import Plan, build

mse = nn.functional.mse_loss


def on_every_rank(num_ranks: int, function: Callable[[int, Any], Any], *, timeout: float = 20.0) -> list[Any]:
    """Calls function(rank, transport) in a thread for each rank; an exception becomes that rank's result."""
    transports = loopback(num_ranks, timeout=timeout)

    def guarded(rank: int) -> Any:
        try:
            return function(rank, transports[rank])
        except Exception as error:
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(guarded, range(num_ranks)))


def run_step(
    plan: Plan, functions: Sequence[Callable[[Any], Any]], inputs: Sequence[Any], *, steps: int = 1, **options: Any
) -> list[Any]:
    """Runs a plan, with one function and one input for each stage; returns each rank's StepResult or exception."""

    def rank_step(rank: int, transport: Any) -> StepResult:
        executor = Executor(plan, transport)
        for _ in range(steps):
            work = [ChunkWork(functions[s], inputs=inputs[s]) for s in plan.placement.local_stages(rank)]
            result = executor.run(work, **options)
        return result

    return on_every_rank(plan.placement.num_ranks, rank_step)


def stage_functions(stages: Sequence[nn.Module], loss_fn: Callable[[Tensor, Tensor], Tensor] | None = mse) -> list[Any]:
    """fwd_fn of every stage; the last one computes the loss from its own input, the targets."""

    def forward(stage: nn.Module, last: bool) -> Callable[[Any], Any]:
        if last and loss_fn is not None:
            return lambda arguments: loss_fn(stage(arguments[0]), arguments[1])
        return lambda received: stage(received)

    return [forward(stage, index == len(stages) - 1) for index, stage in enumerate(stages)]


def stage_inputs(num_stages: int, x: Any, y: Any = None) -> list[Any]:
    """Samples on the first stage, targets on the last."""
    if num_stages == 1:
        return [x if y is None else [x, y]]
    return [x, *[None] * (num_stages - 2), y]


def plain_loop(
    model: nn.Module, x: Tensor, y: Tensor, num_microbatches: int, loss_fn: Callable[[Tensor, Tensor], Tensor] = mse
) -> Tensor:
    """The loop that a pipelined step must equal, bit for bit: micro-batch after micro-batch, each by its share."""
    losses, weights, row = [], [], 0
    for rows in filter(None, microbatch_sizes(len(x), num_microbatches)):
        loss = loss_fn(model(x[row : row + rows]), y[row : row + rows])
        (loss * (rows / len(x))).backward()
        losses.append(loss)
        weights.append(rows / len(x))
        row += rows
    return weighted_sum(losses, weights)


def train(plan: Plan | str, stages: Sequence[nn.Module], x: Any, y: Any, num_microbatches: int, **options: Any) -> Any:
    """One pipelined training step of a plan, or of a one-chunk schedule by name; raises what a rank raised."""
    if isinstance(plan, str):
        plan = build(plan, len(stages), num_microbatches)
    results = run_step(plan, stage_functions(stages), stage_inputs(len(stages), x, y), **options)
    for result in results:
        if isinstance(result, Exception):
            raise result
    last = results[plan.placement.loss_rank]
    return weighted_sum(last.outputs, last.weights)


def assert_same_gradients(mine: nn.Module, reference: nn.Module) -> None:
    """Bitwise."""
    for (name, p), (_, q) in zip(mine.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), f"{name}: {(p.grad - q.grad).abs().max()}"
