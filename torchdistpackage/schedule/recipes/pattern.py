"""Patterns: schedules that repeat. A table of offsets, one entry a stage, and a period say all there is to say.

Micro-batch i of an operation stands in slot `offset + step * (i % group) + period * (i // group)`, and a rank runs its
actions in the order of the slots. Slots only order the actions: no time is attached to them. 1F1B, for one, is
F at s and B at 2p - 1 - s with period 2. The named patterns here::

    p = 3, m = 4, a chunk takes F = I = W = 1 (upper case: chunk 0, stage r; lower case: chunk 1, stage 2p - 1 - r)

    V-Half: half of the memory of 1F1B

    rank 0 | F0 F1 .  .  .  f0 i0 w0 F2 .  f1 i1 w1 I0 W0 F3 f2 i2 w2 I1 W1 f3 i3 w3 I2 W2 .  .  .  I3 W3
    rank 1 | .  F0 .  .  f0 F1 .  i0 w0 f1 F2 I0 i1 W0 f2 w1 F3 I1 i2 W1 f3 w2 .  I2 i3 W2 w3 .  I3 W3 .
    rank 2 | .  .  F0 f0 .  .  F1 f1 i0 w0 I0 W0 F2 f2 i1 w1 I1 W1 F3 f3 i2 w2 I2 W2 .  i3 w3 I3 W3 .  .

    V-Min: a third of the memory of 1F1B

    rank 0 | F0 .  .  .  .  f0 F1 i0 w0 .  .  f1 F2 I0 i1 W0 w1 f2 F3 I1 i2 W1 w2 f3 .  I2 i3 W2 w3 .  .  I3 W3
    rank 1 | .  F0 .  .  f0 .  .  F1 i0 .  f1 w0 I0 F2 W0 i1 f2 w1 I1 F3 W1 i2 f3 w2 I2 W2 .  i3 w3 .  I3 W3 .
    rank 2 | .  .  F0 f0 .  .  .  .  F1 f1 i0 I0 w0 W0 F2 f2 i1 I1 w1 W1 F3 f3 i2 I2 w2 W2 .  .  i3 I3 w3 W3 .

    Hanayo with one wave, m = 3, B = 2: stages run there and back, as in a v, but the backward is whole

    rank 0 | F0 F1 F2 .  .  f0 b0 -- f1 b1 -- f2 b2 -- .  .  B0 -- .  .  B1 -- .  .  B2 --
    rank 1 | .  F0 F1 .  f0 F2 f1 .  b0 -- f2 b1 -- .  B0 -- b2 -- B1 -- .  .  B2 -- .  .
    rank 2 | .  .  F0 f0 F1 f1 F2 f2 .  .  b0 -- B0 -- b1 -- B1 -- b2 -- B2 -- .  .  .  .

V-Half: peak activations floor((p + 2) / 2) on every rank, bubble about 7(p - 1) / 4. V-Min: peak floor((p + 4) / 3),
bubble 2p - 5/2, and 1 more if 3 divides p. Both bubbles are for F = I = W = 1 of both chunks of a rank together, where
1F1B has 3(p - 1). V-Min packs its slots so tightly that its bubble grows with m as soon as F, I and W differ.

Hanayo with w waves (2w chunks a rank): bubble (p - 1) / 2w * ((F + B) + (2m/p - 1)(B - F)), which is that of a 2w-fold
interleaving where F = B and grows with m where B is longer. Peak activations: p on the last rank.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", 2024 (building blocks; V-Half, V-Min); Liu et al.,
"Hanayo: Harnessing Wave-like Pipeline Parallelism for Enhanced Large Model Training Efficiency", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action, Op

__all__ = ["hanayo", "pattern", "v_half", "v_min"]

Offsets = tuple[tuple[int, int] | tuple[int, int, int | None], ...]

_OPS = {2: (Op.FORWARD, Op.BACKWARD), 3: (Op.FORWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD)}


def pattern(
    rank: int,
    num_ranks: int,
    num_microbatches: int,
    *,
    offsets: Offsets,
    period: int,
    group: int = 1,
    step: int = 0,
    owners: tuple[int, ...] | None = None,
) -> Iterator[Action]:
    """Yields the compute actions of one rank of a repeated pattern.

    Args:
        rank: Whose actions.
        num_ranks: Ranks of the pipeline, p.
        num_microbatches: Micro-batches of a step, m.
        offsets: For every stage the slots of micro-batch 0: (F, B) with a whole backward, (F, I, W) with a split one;
            None for W is the first free slot after its I, first come, first served.
        period: Slots from one group of micro-batches to the next.
        group: Micro-batches that start `step` slots apart within a period.
        step: Slots from one micro-batch of a group to the next.
        owners: The rank of every stage; one stage a rank unless given.

    Raises:
        ScheduleError: Two actions of the rank fall into the same slot, or the sizes do not fit each other.

    Example:
        >>> " ".join(map(str, pattern(0, 2, 3, offsets=((0, 3), (1, 2)), period=2)))
        '0F0 0F1 0B0 0F2 0B1 0B2'
    """
    owners = tuple(range(num_ranks)) if owners is None else owners
    if len(owners) != len(offsets) or any(len(entry) not in _OPS for entry in offsets) or group < 1:
        raise ScheduleError(
            f"a pattern needs one entry of offsets a stage, (F, B) or (F, I, W), and groups of at least 1 micro-batch; "
            f"got {offsets} for {len(owners)} stages and groups of {group}; pass the rank of every stage as owners"
        )
    starts = [step * (i % group) + period * (i // group) for i in range(num_microbatches)]
    slots: dict[int, Action] = {}
    late: list[tuple[int, int, int]] = []
    for stage, entry in enumerate(offsets):
        if owners[stage] == rank:
            for op, offset in zip(_OPS[len(entry)], entry, strict=True):
                if offset is None:
                    late += [(entry[1] + start, stage, i) for i, start in enumerate(starts)]
                else:
                    _fill(slots, rank, [(offset + start, Action(stage, op, i)) for i, start in enumerate(starts)])
    slot = min(slots, default=0)
    for ready, stage, i in sorted(late):
        slot = max(slot, ready) + 1
        while slot in slots:
            slot += 1
        slots[slot] = Action(stage, Op.WEIGHT_GRAD, i)
    return (slots[slot] for slot in sorted(slots))


def _fill(slots: dict[int, Action], rank: int, actions: list[tuple[int, Action]]) -> None:
    for slot, action in actions:
        other = slots.setdefault(slot, action)
        if other is not action:
            raise ScheduleError(
                f"rank {rank} cannot run {other} and {action} in the same slot {slot}; move an offset of stage "
                f"{other.stage} or stage {action.stage}, or take another period"
            )


def v_half(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank` and `2p - 1 - rank` (a v).

    Example:
        >>> " ".join(map(str, v_half(0, 1, 2)))
        '0F0 1F0 1I0 1W0 0I0 0W0 0F1 1F1 1I1 1W1 0I1 0W1'
    """
    p, t = num_ranks, 0 if num_ranks % 2 else 3
    there = tuple((2 * r, 6 * p + t - r - 2, None) for r in range(p))
    back = tuple((3 * p - r - 2, 3 * p + t + 2 * r - 1, None) for r in reversed(range(p)))
    return _v(rank, num_ranks, num_microbatches, there + back)


def v_min(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[Action]:
    """Yields the compute actions of one rank; stages `rank` and `2p - 1 - rank` (a v).

    Example:
        >>> " ".join(map(str, v_min(0, 1, 2)))
        '0F0 1F0 1I0 0I0 1W0 0W0 0F1 1F1 1I1 0I1 1W1 0W1'
    """
    p, t = num_ranks, 0 if num_ranks % 3 else 2
    there = tuple((r, 4 * p + t - r - 1, None) for r in range(p))
    back = tuple((2 * p - r - 1, 2 * p + t + r, None) for r in reversed(range(p)))
    return _v(rank, num_ranks, num_microbatches, there + back)


def _v(rank: int, num_ranks: int, num_microbatches: int, offsets: Offsets) -> Iterator[Action]:
    owners = (*range(num_ranks), *reversed(range(num_ranks)))
    return pattern(rank, num_ranks, num_microbatches, offsets=offsets, period=6, owners=owners)


def hanayo(rank: int, num_ranks: int, num_microbatches: int, *, waves: int = 1) -> Iterator[Action]:
    """Yields the compute actions of one rank; the `2 * waves` rows of stages run there and back (a zigzag).

    Example:
        >>> " ".join(map(str, hanayo(0, 1, 2)))
        '0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1'
    """
    there = tuple(range(num_ranks))
    owners = (there + there[::-1]) * waves
    end = 2 * len(owners)
    offsets = tuple((stage, end - 1 - stage) for stage in range(len(owners)))
    return pattern(
        rank, num_ranks, num_microbatches, offsets=offsets, period=end, group=num_ranks, step=2, owners=owners
    )
