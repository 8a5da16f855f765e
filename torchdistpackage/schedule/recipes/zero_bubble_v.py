"""ZB-V: zero bubble on a v of two chunks a rank, at the memory of 1F1B.

::

    p = 3, m = 5, a chunk takes F = I = W = 1 (upper case: chunk 0, stage r; lower case: chunk 1, stage 2p - 1 - r)

    rank 0 | F0 F1 F2 F3 F4 f0 i0 w0 f1 i1 w1 f2 i2 w2 I0 W0 f3 i3 w3 I1 W1 f4 i4 w4 I2 W2 I3 W3 I4 W4 .  .
    rank 1 | .  F0 F1 F2 f0 F3 f1 i0 w0 f2 i1 w1 F4 I0 W0 f3 i2 w2 I1 W1 f4 i3 w3 I2 i4 I3 W2 I4 W3 w4 W4 .
    rank 2 | .  .  F0 f0 F1 f1 F2 f2 i0 w0 F3 I0 W0 f3 i1 w1 F4 I1 W1 f4 i2 w2 I2 i3 I3 i4 I4 W2 w3 w4 W3 W4

No bubble within a rank's own span for F = I = W and m >= 2p - 1; from the first action of the first rank to the last
of all, (p - 1)F / 2 remains (F being that of both chunks of a rank together). Peak activations: p micro-batches on
every rank. The turn of the v stays on the last rank, and the loss comes back to the first.

Fewer micro-batches than 2p - 1 are run as 2p - 1 of which some are missing: without a micro-batch its whole chain of
dependencies is gone, so an order that was feasible stays feasible.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", 2024, and "Zero Bubble Pipeline Parallelism", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from torchdistpackage.schedule.action import Action, Op

__all__ = ["zero_bubble_v"]


def zero_bubble_v(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank` and `2p - 1 - rank` (a v).

    Example:
        >>> " ".join(map(str, zero_bubble_v(0, 1, 2)))
        '0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1'
    """
    padded = max(num_microbatches, 2 * num_ranks - 1)
    order = _order(rank, num_ranks, padded)
    return (Action(*action) for action in order if action[2] < num_microbatches)


def _order(r: int, p: int, m: int) -> Iterator[tuple[int, Op, int]]:
    """The order for m >= 2p - 1. The counters hold the next micro-batch of each operation of each chunk."""
    first, last = r, 2 * p - 1 - r
    F, I, W = Op.FORWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD  # noqa: E741
    f0, i0, w0, f1, i1, w1 = (count() for _ in range(6))
    for _ in range(2 * (p - r) - 1):
        yield first, F, next(f0)
    for _ in range(r):
        yield last, F, next(f1)
        yield first, F, next(f0)
    for _ in range(p - r):
        yield last, F, next(f1)
        yield last, I, next(i1)
        yield last, W, next(w1)
    for k in range(m - p):
        if 2 * p - r - 1 + k < m:
            yield first, F, next(f0)
        yield first, I, next(i0)
        yield first, W, next(w0)
        yield last, F, next(f1)
        yield last, I, next(i1)
        yield last, W, next(w1)
    for _ in range(r):
        yield first, I, next(i0)
        yield last, I, next(i1)
    for _ in range(p - r):
        yield first, I, next(i0)
        yield first, W, next(w0)
    for _ in range(r):
        yield last, W, next(w1)
    for _ in range(r):
        yield first, W, next(w0)
