"""Data that are the same on every rank of a pipeline and after any restart, whatever they draw at random.

::

    training's random stream   ----------------------------------------------->   never touched
                                    |              |               |
    (seed, epoch, row index)        +-- row 17 --+ +-- row 4 --+   +-- collate --+
                                    seed, load, put back

A random crop depends on (seed, epoch, index) only: not on which rank loads it, in which process, or what was loaded
before. (It must come from Python's, numpy's or torch's own generator: one that a dataset keeps for itself goes on by
itself.) So the ranks of a pipeline agree on a batch without sending it, and what is passed over on a resume need not be
loaded. Neighbours: `batches.py` decides who gets which rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

__all__ = [
    "EpochShares",
    "Rows",
    "RowsAhead",
    "SeededCollator",
    "SeededRows",
    "SeededStream",
    "random_numbers_of",
    "share",
]

_COLLATE, _SAMPLE, _START = 0, 1, 2  # what is drawn for: the streams of one index must differ


@contextmanager
def random_numbers_of(*numbers: int) -> Iterator[None]:
    """Seeds Python, numpy and torch (on the CPU) from whole numbers; their states are put back afterwards.

    Args:
        *numbers: At least 0, such as (seed, epoch, index).

    Example:
        >>> with random_numbers_of(1, 2): first = torch.rand(3)
        >>> with random_numbers_of(1, 2): torch.equal(torch.rand(3), first)
        True
    """
    with _states_put_back():
        _seed(*numbers)
        yield


@contextmanager
def _states_put_back() -> Iterator[None]:
    """Costs 70 us, most of it numpy's: so it is done once a batch, and the seeding (25 us) once a row."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed(*numbers: int) -> None:
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))  # not torch.manual_seed: CUDA is not ours


@dataclass(frozen=True)
class Rows:
    """One replica's share of a global batch; the last `pad` rows are padding."""

    rows: list[Any]
    pad: int = 0


def share(rows: Sequence[Any], replica: int, replicas: int, even: bool) -> Rows:
    """Cuts a global batch (at least one row) into replicas: row i is of replica `i % replicas`.

    Nobody gets an empty batch: who would, gets the first row as padding. With `even` all have the same number of rows.

    Example:
        >>> share([4, 7, 1], 1, 2, even=False), share([4, 7, 1], 1, 2, even=True)
        (Rows(rows=[7], pad=0), Rows(rows=[7, 4], pad=1))
    """
    mine = list(rows[replica::replicas])
    wanted = -(-len(rows) // replicas) if even else max(1, len(mine))
    return Rows([*mine, *[rows[0]] * (wanted - len(mine))], wanted - len(mine))


@dataclass(frozen=True, eq=False)
class EpochShares:
    """One replica's rows of every batch that is left of an epoch; made batch by batch, as often as it is gone through.

    Attributes:
        order: All rows of the epoch, in order.
        rows: The places in it that are left; its step is the size of a global batch.
        replica: This one.
        replicas: All of them.
        even: As `share`.
    """

    order: Tensor
    rows: range
    replica: int
    replicas: int
    even: bool

    def __iter__(self) -> Iterator[Rows]:
        for start in self.rows:
            chunk = self.order[start : min(start + self.rows.step, self.rows.stop)].tolist()
            yield share(chunk, self.replica, self.replicas, self.even)


@dataclass(frozen=True)
class _Sample:
    epoch: int
    index: int
    data: Any


@final
class SeededRows(Dataset[_Sample]):
    """Loads rows of a map-style dataset, by (epoch, index), each with random numbers of its own."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[_Sample]:
        """What a DataLoader calls for a batch."""
        samples = []
        with _states_put_back():
            for epoch, index in keys:
                _seed(self.seed, epoch, index, _SAMPLE)
                samples.append(_Sample(epoch, index, self.data[index]))
        return samples


@final
class SeededCollator:
    """Makes a batch of rows, with random numbers that depend on the epoch and the first row."""

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.collate, self.seed = collate, seed

    def __call__(self, samples: list[_Sample]) -> Any:
        """Collates."""
        with random_numbers_of(self.seed, samples[0].epoch, samples[0].index, _COLLATE):
            return self.collate([sample.data for sample in samples])


@final
class RowsAhead(Sampler[list[tuple[int, int]]]):
    """The batch sampler: keys of the rows of one epoch, set before each epoch.

    Workers get keys, not epochs: so they can live through all epochs.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Iterable[Rows] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = self.epoch, self.batches  # an iterator that is still alive keeps its own
        return ([(epoch, int(index)) for index in batch.rows] for batch in batches)


@final
class SeededStream(IterableDataset[tuple[Any, int]]):
    """One replica's batches of a stream, as (batch, rows of padding); every replica reads the whole stream.

    Each row is read with random numbers of (seed, epoch, place in the stream).

    Args:
        data: The stream.
        seed: As above.
        replica: This one.
        replicas: All of them.
        size: Rows of a replica's batch.
        collate: Rows -> batch.
        drop_last: Leave out a short last batch.
        even: As `share`.
    """

    def __init__(
        self,
        data: Iterable[Any],
        seed: int,
        replica: int,
        replicas: int,
        size: int,
        collate: SeededCollator,
        drop_last: bool,
        even: bool,
    ) -> None:
        self.data, self.seed, self.collate = data, seed, collate
        self.replica, self.replicas, self.size = replica, replicas, size
        self.drop_last, self.even = drop_last, even
        self.epoch, self.skip = 0, 0

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(self.epoch)
        rows = islice(self._rows(), self.skip, None)
        size = self.size * self.replicas
        while True:
            with _states_put_back():
                chunk = list(islice(rows, size))
            if not chunk or (self.drop_last and len(chunk) < size):
                return
            mine = share(chunk, self.replica, self.replicas, self.even)
            yield self.collate(mine.rows), mine.pad

    def _rows(self) -> Iterator[_Sample]:
        """All rows of the stream; whoever asks for one puts the generators' states back."""
        _seed(self.seed, self.epoch, 0, _START)
        stream = iter(self.data)
        for index in count():
            _seed(self.seed, self.epoch, index, _SAMPLE)
            try:
                data = next(stream)
            except StopIteration:
                return
            yield _Sample(self.epoch, index, data)
