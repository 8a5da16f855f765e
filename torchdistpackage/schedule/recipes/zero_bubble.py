"""Zero bubble, one chunk a rank: the backward is split into I and W, and W, which nobody waits for, fills the gaps.

::

    p = 3, m = 4, F = I = W = 1 (Ii and Wi: gradient of the input and of the weights for micro-batch i)

    H1: the memory of 1F1B's first rank, on every rank

    rank 0 | F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1 | .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 | .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    H2: twice the memory, no gap between a rank's first and last action

    rank 0 | F0 F1 F2 F3 .  I0 W0 I1 W1 I2 W2 I3 W3 .
    rank 1 | .  F0 F1 F2 I0 F3 I1 .  I2 W0 I3 W1 W2 W3
    rank 2 | .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

H1: bubble (p - 1)(F + I - W) a rank; peak activations min(m, p) on every rank. H2: bubble (p - 1)(F + I - 2W) within a
rank's own span, which is none at all for F = I = W (and m >= 2p - 1); from the first action of the first rank to the
last of all, the skew (p - 1)F of the fill remains unless the optimizer steps without waiting for other ranks. Peak
activations min(m, 2p - 1) on every rank.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", 2023 (the handcrafted schedules ZB-H1 and ZB-H2).
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.schedule.action import Action, Op

__all__ = ["zero_bubble_h1", "zero_bubble_h2"]


def zero_bubble_h1(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank at the peak memory of 1F1B; stage = rank.

    Example:
        >>> " ".join(map(str, zero_bubble_h1(1, 2, 3)))
        '1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2'
    """
    return _order(rank, num_microbatches, warmup=num_ranks - rank, lag=rank)


def zero_bubble_h2(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank at twice the peak memory of 1F1B; stage = rank.

    Example:
        >>> " ".join(map(str, zero_bubble_h2(1, 2, 3)))
        '1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2'
    """
    return _order(rank, num_microbatches, warmup=2 * (num_ranks - rank) - 1, lag=2 * rank)


def _order(rank: int, num_microbatches: int, *, warmup: int, lag: int) -> Iterator[Action]:
    """After `warmup` forwards, I and F in turn; each W follows `lag` micro-batches behind its I.

    `warmup + lag` micro-batches are in flight on every rank: what a late rank saves on forwards it spends on W.
    """
    warmup = min(warmup, num_microbatches)
    for i in range(warmup):
        yield Action(rank, Op.FORWARD, i)
    for i in range(num_microbatches):
        yield Action(rank, Op.INPUT_GRAD, i)
        if i >= lag:
            yield Action(rank, Op.WEIGHT_GRAD, i - lag)
        if warmup + i < num_microbatches:
            yield Action(rank, Op.FORWARD, warmup + i)
    for i in range(max(0, num_microbatches - lag), num_microbatches):
        yield Action(rank, Op.WEIGHT_GRAD, i)
