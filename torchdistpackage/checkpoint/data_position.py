"""A place in the data that fits any number of replicas: rows of the whole data set that were trained on.

::

    epoch order     7 2 9 4 0 5 1 8 3 6        one permutation, from (seed, epoch)
    2 replicas      7   9   0   1   3          replica 0: rows 0::2, replica 1: rows 1::2
    rows = 4 ------------->|
    then 3          ........ 0     8           replica 0: rows 4::3, ...

`torch.utils.data.DistributedSampler` knows no position; a position of a rank's own would mean other rows for another
number of ranks. The loop advances the position, because worker processes read ahead of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, final

import torch
from torch.utils.data import Sampler

from torchdistpackage.errors import CheckpointError

__all__ = ["ResumableSampler"]


@final
class ResumableSampler(Sampler[int]):
    """The rows of one replica, in an order that depends on seed and epoch only, from a position on.

    Give it to a torch DataLoader as `sampler=`, and to `Checkpointer` as `objects={"sampler": sampler}`: it is the same
    on every rank. After each step tell it how many rows all replicas together have taken.

    Args:
        dataset: The data set, or anything with a length.
        num_replicas: How many share the rows; `tpc.get_dp_size()`.
        rank: Which of them this is; `tpc.get_dp_rank()`.
        shuffle: False: in the order of the data set.
        seed: Of the permutations.
        drop_last: Leave out the last rows of an epoch that do not make one for each replica; False: rows of the
            beginning are taken again, so that every replica has as many.

    Raises:
        CheckpointError: rank is not one of the replicas, or the data set has no rows.

    Example:
        >>> sampler = ResumableSampler(range(10), num_replicas=2, rank=0, shuffle=False)
        >>> list(sampler)
        [0, 2, 4, 6, 8]
        >>> sampler.advance(4)
        >>> list(sampler), len(sampler)
        ([4, 6, 8], 3)
        >>> other = ResumableSampler(range(10), num_replicas=3, rank=1, shuffle=False)
        >>> other.load_state_dict(sampler.state_dict())
        >>> list(other)
        [5, 8]
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise CheckpointError(f"rank {rank} is not one of {num_replicas} replicas; ranks count from 0")
        if not len(dataset):
            raise CheckpointError("the data set has no rows")
        self._length, self._replicas, self._rank = len(dataset), num_replicas, rank
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._epoch, self._rows = 0, 0

    @property
    def epoch(self) -> int:
        """Which permutation."""
        return self._epoch

    @property
    def rows(self) -> int:
        """How many rows of the epoch all replicas together have taken."""
        return self._rows

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; the one that it is in already goes on where it is.

        Args:
            epoch: Its number.
        """
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, 0

    def advance(self, rows: int) -> None:
        """After a step: so many rows more were taken, by all replicas together.

        Raises:
            CheckpointError: A negative number.
        """
        if rows < 0:
            raise CheckpointError(f"a step takes rows, it does not give back {-rows}")
        self._rows += rows

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        rest = order[min(self._rows, len(order)) :]
        per_replica = self._per_replica()
        if len(rest) < per_replica * self._replicas and rest:
            again = order * (1 + per_replica * self._replicas // len(order))
            rest = rest + again[: per_replica * self._replicas - len(rest)]
        return iter(rest[self._rank : per_replica * self._replicas : self._replicas])

    def __len__(self) -> int:
        """The rows of this replica that are left of the epoch."""
        return self._per_replica()

    def _per_replica(self) -> int:
        left = max(0, self._length - self._rows)
        return left // self._replicas if self._drop_last else -(-left // self._replicas)

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(self._length))
        generator = torch.Generator()
        generator.manual_seed((self._seed << 32) + self._epoch)
        return [int(row) for row in torch.randperm(self._length, generator=generator)]

    def state_dict(self) -> dict[str, int]:
        """The position, in rows of the whole data set."""
        return {"epoch": self._epoch, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position, with any number of replicas.

        Raises:
            CheckpointError: It is not a position.
        """
        try:
            self._epoch, self._rows = int(state["epoch"]), int(state["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"a position has 'epoch' and 'rows', whole numbers; this is {state!r}") from error
