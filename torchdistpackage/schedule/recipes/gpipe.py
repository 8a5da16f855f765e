"""GPipe: all forwards, then all backwards.

::

    p = 3, m = 4, F = 1, B = 2 (a digit is a micro-batch, forward above, backward in brackets)

    rank 0 | 0 1 2 3 . . . . .   .   [0 ][1 ][2 ][3 ]
    rank 1 | . 0 1 2 3 . .  [0 ][1 ][2 ][3 ]
    rank 2 | . . 0 1 2 3[0 ][1 ][2 ][3 ]

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
