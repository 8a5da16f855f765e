"""One training step of a language model: in one piece, or in stages over the runtime.

Both take the same micro-batches, whose masks differ. In the runtime every rank is a thread of this process, and sends
the messages that it would send to another machine; a mask is not sent: every stage is given that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.runtime import ChunkWork, Executor, loopback
from torchdistpackage.schedule import build

__all__ = ["over_the_runtime", "plain_loop"]

MICROBATCHES = 2
_PATIENCE = 60.0  # seconds that a rank waits for another one


def loss_of(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of the next tokens, those that are not padding."""
    targets = torch.where(mask[:, 1:].bool() & mask[:, :-1].bool(), ids[:, 1:], -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def plain_loop(model: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> None:
    """The user's loop; leaves gradients."""
    for some, their in zip(ids.chunk(MICROBATCHES), mask.chunk(MICROBATCHES), strict=True):
        (loss_of(model(some, their), some, their) / MICROBATCHES).backward()


def over_the_runtime(parts: Mapping[int, nn.Module], ids: Tensor, mask: Tensor, masked: bool) -> None:
    """The same by one step of 1F1B.

    Args:
        parts: The stages.
        ids: Tokens of the batch.
        mask: What is not padding.
        masked: Whether the family takes a mask.

    Raises:
        Exception: What a rank raised.
    """
    plan = build("1f1b", len(parts), MICROBATCHES)
    transports = loopback(len(parts), timeout=_PATIENCE)

    def rank_step(rank: int) -> Any:
        first, last = rank == 0, rank == len(parts) - 1

        def forward(received: list[Any]) -> Any:
            x, its_mask, *its_ids = received
            output = parts[rank](x, **({"attention_mask": its_mask} if masked else {}))
            return loss_of(output, its_ids[0], its_mask) if last else output

        inputs = [ids, mask] if first else [mask, ids] if last else [mask]
        return Executor(plan, transports[rank]).run([ChunkWork(forward, inputs=inputs)])

    with ThreadPoolExecutor(len(parts)) as pool:
        for waiting in [pool.submit(rank_step, rank) for rank in range(len(parts))]:
            waiting.result()
