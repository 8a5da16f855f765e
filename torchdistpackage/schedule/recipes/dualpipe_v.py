"""DualPipeV: DualPipe cut in half, a v of two chunks a rank; in the steady state F and B of opposite chunks pair up.

::

    p = 2, m = 4, a chunk takes F = I = W = 1, B = 2
    (upper case: chunk 0, stage r; lower case: chunk 1, stage 2p - 1 - r)

    rank 0 | F0 F1 F2 f0 i0 w0 f1 F3 b1 -- f2 B0 -- b2 -- f3 .  B1 -- b3 -- I2 W2 I3 W3
    rank 1 | .  F0 f0 F1 f1 F2 b0 -- f2 B0 -- F3 b1 -- f3 B1 -- b2 -- B2 -- i3 I3 w3 W3

The pairs (F3 b1, f2 B0 and so on) belong to two micro-batches that do not depend on each other, which lets an executor
overlap the compute of one with the communication of the other; run one after the other, forward first, the bubble is
(p - 1)F / 2 for F = I = W, F being that of both chunks of a rank together. The published figure for pairs that take
F&B together is (p - 1)(F&B + B - 3W) in times of a chunk. Peak activations: p + 1/2 micro-batches. The backward is
whole in the steady state and split in fill and drain only, where W has a gap to fill.

The order needs m >= 2p. Fewer micro-batches are run as 2p of which some are missing: without a micro-batch its whole
chain of dependencies is gone, so an order that was feasible stays feasible.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (DualPipe); Sea AI Lab, "DualPipe Could Be Better Without the
Dual", 2025 (the cut in half).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count

from torchdistpackage.schedule.action import Action, Op

__all__ = ["dualpipe_v"]


def dualpipe_v(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank` and `2p - 1 - rank` (a v).

    Example:
        >>> " ".join(map(str, dualpipe_v(0, 1, 2)))
        '0F0 1F0 0F1 1B0 1F1 0B0 1B1 0I1 0W1'
    """
    order = _order(rank, num_ranks, max(num_microbatches, 2 * num_ranks))
    return (Action(*action) for action in order if action[2] < num_microbatches)


def _order(r: int, p: int, m: int) -> Iterator[tuple[int, Op, int]]:
    """The order for m >= 2p. The counters hold the next micro-batch of each chunk, `late` the W that are still due."""
    first, last = r, 2 * p - 1 - r
    F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD  # noqa: E741
    f0, b0, f1, b1 = (count() for _ in range(4))
    late: deque[tuple[int, Op, int]] = deque()
    for _ in range(2 * (p - r - 1)):
        yield first, F, next(f0)
    for _ in range(r + 1):
        yield first, F, next(f0)
        yield last, F, next(f1)
    for _ in range(p - r - 1):
        i = next(b1)
        yield last, I, i
        yield last, W, i
        yield last, F, next(f1)
    for _ in range(m - 2 * p + r + 1):
        yield first, F, next(f0)
        yield last, B, next(b1)
        yield last, F, next(f1)
        yield first, B, next(b0)
    for _ in range(p - r - 1):
        yield last, B, next(b1)
        yield last, F, next(f1)
        yield first, B, next(b0)
    for k in range(r + 1):
        for stage, done, switch in ((last, b1, r // 2 + 1), (first, b0, (r + 1) // 2)):
            i = next(done)
            if k < switch:
                yield stage, B, i
            else:
                yield stage, I, i
                late.append((stage, W, i))
    for _ in range(p - r - 1):
        yield late.popleft()
        i = next(b0)
        yield first, I, i
        late.append((first, W, i))
    yield from late
