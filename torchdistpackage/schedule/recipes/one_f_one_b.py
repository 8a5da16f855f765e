"""1F1B: as soon as the pipeline is full, each forward is followed by a backward.

::

    p = 3, m = 4, F = 1, B = 2 (Fi and Bi: forward and backward of micro-batch i)

    rank 0 | F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- .  B2 -- .  B3 --
    rank 1 | .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  B3 -- .  .
    rank 2 | .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .  .  .

Bubble (p - 1)(F + B) a rank, as GPipe's; peak activations only min(m, p - r) on rank r. No schedule with one chunk a
rank and an unsplit backward is faster.

Source: Narayanan et al., "PipeDream", 2019 (the flush variant), and Fan et al., "DAPPLE", 2020.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.schedule.action import Action, Op

__all__ = ["one_f_one_b"]


def one_f_one_b(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stage = rank.

    Example:
        >>> " ".join(map(str, one_f_one_b(0, 2, 3)))
        '0F0 0F1 0B0 0F2 0B1 0B2'
    """
    warmup = min(num_microbatches, num_ranks - rank)
    for i in range(warmup):
        yield Action(rank, Op.FORWARD, i)
    for i in range(num_microbatches):
        yield Action(rank, Op.BACKWARD, i)
        if warmup + i < num_microbatches:
            yield Action(rank, Op.FORWARD, warmup + i)
