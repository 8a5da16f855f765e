"""Interleaved 1F1B and interleaved zero bubble: each rank has v chunks, so that fill and drain take v times less.

::

    p = 2, m = 4, v = 2, a chunk takes F = I = W = 1, B = 2 (upper case: chunk 0 of the rank; lower case: chunk 1)

    interleaved 1F1B

    rank 0 | F0 F1 f0 f1 F2 .  b0 -- F3 b1 -- f2 B0 -- f3 B1 -- .  b2 -- .  b3 -- B2 -- B3 --
    rank 1 | .  F0 F1 f0 b0 -- f1 b1 -- F2 B0 -- F3 B1 -- f2 b2 -- f3 b3 -- B2 -- B3 -- .  .

    interleaved zero bubble: B is split, and on rank r each W follows r actions behind its I

    rank 0 | F0 F1 f0 f1 F2 i0 w0 F3 i1 w1 f2 I0 W0 f3 I1 W1 i2 w2 .  i3 w3 I2 W2 I3 W3
    rank 1 | .  F0 F1 f0 i0 f1 i1 w0 F2 I0 w1 F3 I1 W0 f2 i2 W1 f3 i3 w2 I2 w3 I3 W2 W3

Micro-batches go in groups of g: a group passes chunk 0, then chunk 1, and so on, before the next group starts. With
g = p (the default) the group comes round to chunk 1 just when the rank has sent its last member off.

Bubble a rank, F, I and W being those of all chunks together: (p - 1)(F + B) / v, and (p - 1)(F + I - W) / v with the
split. Peak activations (2(p - 1) + (v - 1)g + 1) / v on the first rank, p + (p - 1) / v for g = p. Every hop happens v
times as often.

If g does not divide m, the last group runs with members missing: without a micro-batch its whole chain of dependencies
is gone, so an order that was feasible stays feasible; the gaps that it leaves are the price.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021; the
split as in Qi et al., "Zero Bubble Pipeline Parallelism", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action, Op

__all__ = ["interleaved_one_f_one_b", "interleaved_zero_bubble"]


def interleaved_one_f_one_b(
    rank: int, num_ranks: int, num_microbatches: int, *, chunks: int = 2, group_size: int | None = None
) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank, rank + p, rank + 2p, ...` (a loop).

    Args:
        rank: Whose actions.
        num_ranks: Ranks of the pipeline, p.
        num_microbatches: Micro-batches of a step, m.
        chunks: v, the stages of a rank.
        group_size: g, the micro-batches that pass a chunk before the rank turns to the next one; p unless given.
            Larger groups hide messages better and hold more activations, g >= m is breadth-first. With more than one
            chunk p - 1 leaves a gap in every round, and less cannot work: the first backward would wait for forwards
            that come after it.

    Raises:
        ScheduleError: The groups are too small.

    Example:
        >>> " ".join(map(str, interleaved_one_f_one_b(1, 2, 2)))
        '1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1'
    """
    return _order(rank, num_ranks, num_microbatches, chunks, group_size, lag=None)


def interleaved_zero_bubble(
    rank: int, num_ranks: int, num_microbatches: int, *, chunks: int = 2, group_size: int | None = None
) -> Iterator[Action]:
    """Yields the compute actions of one rank with a split backward; stages and options are those of the other recipe.

    Raises:
        ScheduleError: The groups are too small.

    Example:
        >>> " ".join(map(str, interleaved_zero_bubble(1, 2, 2)))
        '1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 3W1 1I1 1W0 1W1'
    """
    return _order(rank, num_ranks, num_microbatches, chunks, group_size, lag=rank)


def _order(
    rank: int, num_ranks: int, num_microbatches: int, chunks: int, group_size: int | None, *, lag: int | None
) -> Iterator[Action]:
    """Groups of micro-batches through the chunks, forwards and backwards each in one list; `lag` is that of W."""
    group = num_ranks if group_size is None else group_size
    smallest = max(1, num_ranks - 1) if chunks > 1 else 1
    if group < smallest:
        raise ScheduleError(
            f"groups of {group} micro-batches cannot be interleaved on {num_ranks} ranks with {chunks} chunks each; "
            f"pass a group_size of at least {smallest}, or leave it out for {num_ranks}"
        )
    stages = range(rank, chunks * num_ranks, num_ranks)
    starts = range(0, num_microbatches, group)
    forwards = [(stage, i) for start in starts for stage in stages for i in range(start, start + group)]
    backwards = [(stage, i) for start in starts for stage in reversed(stages) for i in range(start, start + group)]
    warmup = min(len(forwards), 2 * (num_ranks - rank - 1) + (chunks - 1) * group)
    order = _alternate(forwards, backwards, warmup, lag)
    return (Action(*action) for action in order if action[2] < num_microbatches)


def _alternate(
    forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], warmup: int, lag: int | None
) -> Iterator[tuple[int, Op, int]]:
    """After `warmup` forwards, one forward and one backward in turn; with a `lag` the backward is split."""
    F, W = Op.FORWARD, Op.WEIGHT_GRAD
    B = Op.BACKWARD if lag is None else Op.INPUT_GRAD
    for stage, i in forwards[:warmup]:
        yield stage, F, i
    for k, (stage, i) in enumerate(backwards):
        if warmup + k < len(forwards):
            ahead = forwards[warmup + k]
            yield ahead[0], F, ahead[1]
        yield stage, B, i
        if lag is not None and k >= lag:
            behind = backwards[k - lag]
            yield behind[0], W, behind[1]
    if lag is not None:
        for stage, i in backwards[max(0, len(backwards) - lag) :]:
            yield stage, W, i
