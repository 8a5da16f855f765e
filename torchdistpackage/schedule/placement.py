"""Which rank owns which stage.

::

    loop, p = 4, v = 2                    v, p = 4, v = 2
    rank 0 | stage 0       stage 4        rank 0 | stage 0       stage 7
    rank 1 | stage 1       stage 5        rank 1 | stage 1       stage 6
    rank 2 | stage 2       stage 6        rank 2 | stage 2       stage 5
    rank 3 | stage 3       stage 7        rank 3 | stage 3       stage 4

In a loop every hop goes to the next rank, the last one wraps round. In a v the second half runs back, so that the turn
(stage 3 to 4) stays on one rank and so do the first and the last stage. With more than two chunks the v becomes a
zigzag.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torchdistpackage.errors import ScheduleError

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """Stage -> rank, as data.

    Attributes:
        num_ranks: Ranks of the pipeline, p.
        owners: The rank of every stage, in the order of the stages.

    Raises:
        ScheduleError: A rank owns no stage or does not exist.

    Example:
        >>> Placement.loop(2, chunks=2).owners, Placement.v(2).owners
        ((0, 1, 0, 1), (0, 1, 1, 0))
    """

    num_ranks: int
    owners: tuple[int, ...]

    def __post_init__(self) -> None:
        if set(self.owners) != set(range(self.num_ranks)):
            raise ScheduleError(
                f"stages are placed on ranks {sorted(set(self.owners))}, but each of the ranks 0..{self.num_ranks - 1} "
                "must own at least one stage and no other rank exists"
            )

    @classmethod
    def loop(cls, num_ranks: int, chunks: int = 1) -> Placement:
        """Stage s on rank s mod p."""
        _check(num_ranks, chunks)
        return cls(num_ranks, tuple(range(num_ranks)) * chunks)

    @classmethod
    def v(cls, num_ranks: int, chunks: int = 2) -> Placement:
        """Rows of stages run there and back: the zigzag."""
        _check(num_ranks, chunks)
        there = tuple(range(num_ranks))
        return cls(num_ranks, tuple(rank for row in range(chunks) for rank in (there[::-1] if row % 2 else there)))

    @property
    def num_stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.owners)

    @property
    def loss_rank(self) -> int:
        """The rank that owns the last stage, and with it the loss."""
        return self.owners[-1]

    def owner(self, stage: int) -> int:
        """The rank that owns a stage."""
        return self.owners[stage]

    @cached_property
    def _chunks(self) -> tuple[tuple[int, ...], ...]:
        table: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for stage, rank in enumerate(self.owners):
            table[rank].append(stage)
        return tuple(map(tuple, table))

    def local_stages(self, rank: int) -> tuple[int, ...]:
        """The stages of one rank, in the order of the model; chunk c of the rank is entry c."""
        return self._chunks[rank]


def _check(num_ranks: int, chunks: int) -> None:
    if num_ranks < 1 or chunks < 1:
        raise ScheduleError(f"a placement needs at least 1 rank and 1 chunk a rank, got {num_ranks} and {chunks}")
