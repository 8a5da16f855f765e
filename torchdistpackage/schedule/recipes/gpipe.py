"""GPipe: all forwards, then all backwards.

::

    p = 3, m = 4, F = 1, B = 2 (Fi and Bi: forward and backward of micro-batch i)

    rank 0 | F0 F1 F2 F3 .  .  .  .  .  .  B0 -- B1 -- B2 -- B3 --
    rank 1 | .  F0 F1 F2 F3 .  .  .  B0 -- B1 -- B2 -- B3 -- .  .
    rank 2 | .  .  F0 F1 F2 F3 B0 -- B1 -- B2 -- B3 -- .  .  .  .

Bubble (p - 1)(F + B) a rank. Peak activations: all m micro-batches on every rank.

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.schedule.action import Action, Op

__all__ = ["gpipe"]


def gpipe(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stage = rank.

    Example:
        >>> " ".join(map(str, gpipe(0, 2, 2)))
        '0F0 0F1 0B0 0B1'
    """
    for i in range(num_microbatches):
        yield Action(rank, Op.FORWARD, i)
    for i in range(num_microbatches):
        yield Action(rank, Op.BACKWARD, i)
