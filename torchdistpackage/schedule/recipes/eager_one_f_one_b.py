"""Eager 1F1B: 1F1B with almost twice the forwards in the fill, so that messages hide behind compute.

::

    p = 3, m = 4, F = 1, B = 2 (Fi and Bi: forward and backward of micro-batch i)

    rank 0 | F0 F1 F2 F3 .  .  .  B0 -- .  B1 -- .  B2 -- .  B3 --
    rank 1 | .  F0 F1 F2 .  B0 -- F3 B1 -- .  B2 -- .  B3 -- .  .
    rank 2 | .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .  .  .

Bubble (p - 1)(F + B) a rank, as 1F1B's. In 1F1B a rank that has sent a gradient needs the next forward at once, and
every hop of the steady state is waited for; here that forward came one round earlier, and only the hops of fill and
drain are paid for. The price is memory: peak activations are min(m, 2(p - r) - 1) on rank r.

Source: Zhuang et al., "On Optimizing the Communication of Model Parallelism", 2022 (eager-1F1B), built on Zheng et al.,
"Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning", 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.schedule.action import Action, Op

__all__ = ["eager_one_f_one_b"]


def eager_one_f_one_b(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stage = rank.

    Example:
        >>> " ".join(map(str, eager_one_f_one_b(0, 2, 4)))
        '0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3'
    """
    warmup = min(num_microbatches, 2 * (num_ranks - rank) - 1)
    for i in range(warmup):
        yield Action(rank, Op.FORWARD, i)
    for i in range(num_microbatches):
        yield Action(rank, Op.BACKWARD, i)
        if warmup + i < num_microbatches:
            yield Action(rank, Op.FORWARD, warmup + i)
