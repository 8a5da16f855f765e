"""One training step of a model: in one piece, through its stages in turn, or over the runtime.

All ways begin each micro-batch with the same random numbers. In the runtime the ranks are threads of this process that
share one generator: its state travels with the micro-batch from stage to stage, so that dropout draws what it draws in
the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchdistpackage.runtime import ChunkWork, Executor, loopback
from torchdistpackage.runtime.microbatch import microbatch_sizes, weighted_sum
from torchdistpackage.schedule import build
from torchdistpackage.split import Pipe

__all__ = ["loss_of", "opened", "over_the_runtime", "plain", "tensors_of"]

_PATIENCE = 200.0  # seconds that a rank waits for another one: a large model on a shared core


def opened(output: Any) -> Any:
    """What a model returns, as a tree whose leaves are tensors."""
    return vars(output) if hasattr(output, "__dataclass_fields__") else output


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors that a model returns."""
    return [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, Tensor)]


def loss_of(output: Any) -> Tensor:
    """The mean square of all numbers that a model returns, bent: of what comes out of a norm it would be constant."""
    numbers = [leaf.float().tanh() for leaf in tensors_of(output) if leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() for leaf in numbers]).mean()


def plain(run: Callable[[Tensor], Any], batch: Tensor, num_microbatches: int) -> float:
    """The user's loop, of a model or of a `Pipe`, which runs its stages in turn; leaves gradients, returns the loss."""
    losses, weights = [], []
    for number, part in enumerate(batch.split(microbatch_sizes(len(batch), num_microbatches))):
        torch.manual_seed(number)
        loss, weight = loss_of(run(part)), len(part) / len(batch)
        (loss * weight).backward()
        losses.append(loss.detach())
        weights.append(weight)
    return float(weighted_sum(losses, weights))


def over_the_runtime(pipe: Pipe, batch: Tensor, num_microbatches: int, schedule: str) -> float:
    """The same by one step of a schedule: a rank is a thread, its messages are those of the real thing.

    Raises:
        Exception: What a rank raised.
    """
    plan = build(schedule, pipe.num_stages, num_microbatches)
    random = _Random(num_microbatches)
    transports = loopback(pipe.num_stages, timeout=_PATIENCE)

    def rank_step(rank: int) -> Any:
        stage = pipe.get_stage_module(rank)

        def forward(received: Any) -> Any:
            with random.of_next_microbatch(rank):
                output = stage(received)
            return loss_of(output) if rank == plan.placement.loss_rank else output

        return Executor(plan, transports[rank]).run([ChunkWork(forward, inputs=batch if rank == 0 else None)])

    with ThreadPoolExecutor(pipe.num_stages) as pool:
        waiting = [pool.submit(rank_step, rank) for rank in range(pipe.num_stages)]
    last = [one.result() for one in waiting][plan.placement.loss_rank]
    return float(weighted_sum(last.outputs, last.weights))


class _Random:
    """The state of the generator of each micro-batch; one stage draws at a time."""

    def __init__(self, num_microbatches: int) -> None:
        self._lock = threading.Lock()
        self._states = [torch.Generator().manual_seed(number).get_state() for number in range(num_microbatches)]
        self._seen: dict[int, int] = {}

    @contextmanager
    def of_next_microbatch(self, rank: int) -> Iterator[None]:
        """Around one forward of a rank's stage; the micro-batches come in order."""
        with self._lock:
            number = self._seen.get(rank, 0)
            self._seen[rank] = number + 1
            torch.set_rng_state(self._states[number])
            yield
            self._states[number] = torch.get_rng_state()
