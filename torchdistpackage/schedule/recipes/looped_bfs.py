"""Looped breadth-first: each rank has v chunks and runs all micro-batches through a chunk before it turns to the next.

::

    p = 3, m = 4, v = 2, a chunk takes F = 1, B = 2 (upper case: chunk 0 of the rank; lower case: chunk 1)

    rank 0 | F0 F1 F2 F3 f0 f1 f2 f3 .  .  .  .  .  .  b0 -- b1 -- b2 -- b3 -- B0 -- B1 -- B2 -- B3 --
    rank 1 | .  F0 F1 F2 F3 f0 f1 f2 f3 .  .  .  b0 -- b1 -- b2 -- b3 -- B0 -- B1 -- B2 -- B3 -- .  .
    rank 2 | .  .  F0 F1 F2 F3 f0 f1 f2 f3 b0 -- b1 -- b2 -- b3 -- B0 -- B1 -- B2 -- B3 -- .  .  .  .

Bubble (p - 1)(F + B) / v a rank for m >= p, F and B being those of all chunks of a rank together: GPipe's, v times
smaller. Peak activations: all m micro-batches on every rank. A chunk is used in two runs only, so that weights that are
sharded over data-parallel ranks are gathered twice a step, and gradients are complete chunk by chunk.

Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.schedule.action import Action, Op

__all__ = ["looped_breadth_first"]


def looped_breadth_first(rank: int, num_ranks: int, num_microbatches: int, *, chunks: int = 2) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank, rank + p, rank + 2p, ...` (a loop).

    Args:
        rank: Whose actions.
        num_ranks: Ranks of the pipeline, p.
        num_microbatches: Micro-batches of a step, m.
        chunks: v, the stages of a rank.

    Example:
        >>> " ".join(map(str, looped_breadth_first(0, 2, 2)))
        '0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1'
    """
    stages = range(rank, chunks * num_ranks, num_ranks)
    for stage in stages:
        for i in range(num_microbatches):
            yield Action(stage, Op.FORWARD, i)
    for stage in reversed(stages):
        for i in range(num_microbatches):
            yield Action(stage, Op.BACKWARD, i)
