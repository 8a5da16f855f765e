"""The data of a run: which rows every replica gets in which step, the same on all ranks of a pipeline.

Global batch k is a piece of the epoch's order; replica r of d takes every d-th row of it. So with the same global batch
another number of replicas sees the same batches, and a resumed run goes on at the row where it stopped::

    order of the epoch, by (seed, epoch)   | 8 3 0 5 | 9 1 7 2 | 6 4 |      batch_size 2, replicas 2
    replica 0                              | 8   0   | 9   7   | 6   |
    replica 1                              |   3   5 |   1   2 |   4 |      a short last batch, or none: drop_last

All replicas have the same number of batches, since they reduce gradients together. One that has no row left in the last
batch gets a row of another as padding, and is told so (`RawBatch.pad_rows`); rows that are not padding come once each.

Neighbours: `seeded_data.py` loads rows repeatably, `batch_reading.py` says what in a batch is what.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchdistpackage.errors import TrainerError
from torchdistpackage.trainer.batch_reading import Batch, default_collator, read_batch
from torchdistpackage.trainer.seeded_data import (
    EpochShares,
    RowsAhead,
    SeededCollator,
    SeededRows,
    SeededStream,
    random_numbers_of,
)

__all__ = ["Batch", "BatchSource", "RawBatch", "default_collator", "read_batch"]

_log = logging.getLogger(__name__)
_ORDER = 3  # the epoch's order has a stream of its own; see seeded_data.py


@dataclass(frozen=True)
class RawBatch:
    """A batch as the collator has made it.

    Attributes:
        data: What `read_batch` reads.
        pad_rows: How many of its last rows are padding: rows of another replica, which must not count.

    Example:
        >>> source = BatchSource("abcde", batch_size=2, replica=1, replicas=2, seed=0, shuffle=False, collator=list)
        >>> list(source.epoch(0))
        [RawBatch(data=['b', 'd'], pad_rows=0), RawBatch(data=['e'], pad_rows=1)]
    """

    data: Any
    pad_rows: int = 0


@final
class BatchSource:
    """One replica's batches of a dataset, epoch by epoch.

    Every rank of a pipeline makes one with the same arguments and gets the same batches. A row is loaded, and a batch
    collated, with random numbers that follow from (seed, epoch, row): training's own are never touched.

    A stream (IterableDataset) is read whole by every replica, by one worker process at most, and its rows are dealt out
    as they come: its order and its shuffling are its own. A DataLoader is used as it is: which rows its replica gets is
    its own affair (a DistributedSampler's, say), but its random numbers are seeded here, too.

    Args:
        dataset: With `__getitem__` and `__len__`, or an IterableDataset (torch's, or of Hugging Face's datasets), or a
            DataLoader.
        batch_size: Rows of a replica's batch.
        replica: Which replica this is.
        replicas: How many there are.
        collator: List of rows -> batch; `default_collator` if None.
        seed: Of the order and of random transforms; at least 0.
        shuffle: A new order in each epoch; else the dataset's own.
        drop_last: Leave out an epoch's last batch if it is short.
        num_workers: Processes that load.
        pin_memory: Batches in page-locked memory, where there is CUDA.
        persistent_workers: Keep the processes between epochs.
        prefetch_factor: Batches that each process loads ahead; None for torch's default.
        even: Padding so that all replicas have the same number of rows in the last batch.

    Attributes:
        batch_size: Rows of a replica's batch.
        global_batch_size: Rows of all replicas' batches together.

    Raises:
        TrainerError: There are no rows, or with `drop_last` not enough for a batch; or the dataset is of no known kind.

    Example:
        >>> source = BatchSource(list(range(10)), batch_size=2, replica=0, replicas=2, seed=0, shuffle=False)
        >>> [(batch.data.tolist(), batch.pad_rows) for batch in source.epoch(0)]
        [([0, 2], 0), ([4, 6], 0), ([8], 0)]
        >>> [batch.data.tolist() for batch in source.epoch(0, skip_rows=8)]
        [[8]]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        replica: int,
        replicas: int,
        seed: int,
        shuffle: bool,
        collator: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        even: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= replica < replicas or seed < 0:
            raise TrainerError(
                f"batch_size must be at least 1, replica one of {replicas} from 0, seed at least 0; got batch_size "
                f"{batch_size}, replica {replica}, seed {seed}"
            )
        self.dataset, self._seed, self._shuffle = dataset, seed, shuffle
        self._replica, self._replicas, self._drop_last, self._even = replica, replicas, drop_last, even
        workers: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory and torch.cuda.is_available()}
        if num_workers:
            workers |= {"persistent_workers": persistent_workers, "prefetch_factor": prefetch_factor}
        seeded = SeededCollator(collator or default_collator, seed)
        self._stream: SeededStream | None = None
        self._ahead = RowsAhead()
        if isinstance(dataset, DataLoader):
            batch_size = getattr(dataset.batch_sampler, "batch_size", None) or batch_size
            self._loader: DataLoader[Any] = dataset
            _warn_if_not_sharded(dataset, replicas)
        elif _is_stream(dataset):
            self._stream = SeededStream(dataset, seed, replica, replicas, batch_size, seeded, drop_last, even)
            # one that lives on would not hear of the next epoch
            workers |= {"num_workers": min(1, num_workers), "persistent_workers": False}
            self._loader = _loader(self._stream, **workers, batch_size=None, collate_fn=_as_it_is)
        else:
            rows = SeededRows(dataset, seed)
            self._loader = _loader(rows, **workers, batch_sampler=self._ahead, collate_fn=seeded)
        self.batch_size, self.global_batch_size = batch_size, batch_size * replicas
        self._check_length(num_workers)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch, the same for all replicas; None for a stream that does not know its length.

        Example:
            >>> BatchSource(range(9), batch_size=2, replica=0, replicas=2, seed=0, shuffle=True).batches_per_epoch
            3
        """
        length = _length(self.dataset)
        if length is None or isinstance(self.dataset, DataLoader):
            return length
        return (math.floor if self._drop_last else math.ceil)(length / self.global_batch_size)

    def __len__(self) -> int:
        length = self.batches_per_epoch
        if length is None:
            raise TypeError(f"{type(self.dataset).__name__} does not know its length")
        return length

    def epoch(self, number: int, skip_rows: int = 0) -> Iterator[RawBatch]:
        """The batches of one epoch.

        Args:
            number: Of the epoch, from 0.
            skip_rows: Rows of all replicas that were taken in this epoch before: batches go on behind them. They are
                not loaded; those of a stream or a DataLoader are read and dropped.

        Example:
            >>> source = BatchSource("abc", batch_size=2, replica=0, replicas=1, seed=0, shuffle=False, collator=list)
            >>> [batch.data for batch in source.epoch(0)]
            [['a', 'b'], ['c']]
        """
        if isinstance(self.dataset, DataLoader):
            yield from self._own_batches(self.dataset, number, skip_rows // self.global_batch_size)
            return
        if self._stream is not None:
            self._stream.epoch, self._stream.skip = number, skip_rows
            for data, pad in self._loader:
                yield RawBatch(data, int(pad))
            return
        shares = self._shares(number, skip_rows)
        self._ahead.epoch, self._ahead.batches = number, shares
        for data, mine in zip(self._loader, shares, strict=True):
            yield RawBatch(data, mine.pad)

    def _shares(self, number: int, skip_rows: int) -> EpochShares:
        length, size = len(self.dataset), self.global_batch_size
        order = torch.arange(length)
        if self._shuffle:
            with random_numbers_of(self._seed, number, 0, _ORDER):
                order = torch.randperm(length)
        end = length - (length - skip_rows) % size if self._drop_last else length
        return EpochShares(order, range(skip_rows, end, size), self._replica, self._replicas, self._even)

    def _own_batches(self, loader: DataLoader[Any], number: int, skip: int) -> Iterator[RawBatch]:
        """A DataLoader's batches; each replica's random numbers are its own, the same on all ranks of its pipeline."""
        for part in (loader.sampler, loader.batch_sampler, loader.dataset):
            getattr(part, "set_epoch", _nothing)(number)
        place = (self._seed, number, self._replica)
        with random_numbers_of(*place, 0):
            batches = iter(loader)
        for k in count():
            with random_numbers_of(*place, k + 1):
                try:
                    data = next(batches)
                except StopIteration:
                    return
            if k >= skip:
                yield RawBatch(data)

    def _check_length(self, num_workers: int) -> None:
        length = _length(self.dataset)
        if length == 0:
            raise TrainerError(f"the dataset ({type(self.dataset).__name__}) is empty")
        if self.batches_per_epoch == 0:
            raise TrainerError(
                f"drop_last leaves nothing: the dataset has {length} rows, less than one batch of {self.batch_size} "
                f"rows x {self._replicas} replicas; pass dataloader_drop_last=False or a smaller batch"
            )
        if self._stream is not None and num_workers > 1:
            _log.info("a stream is read by one worker process, not by %d: its rows come in one order", num_workers)


def _is_stream(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return True
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    if hasattr(dataset, "__iter__"):
        return True
    raise TrainerError(
        f"a dataset has __getitem__ and __len__, or is an IterableDataset or a DataLoader; got {type(dataset).__name__}"
    )


def _loader(data: Dataset[Any], **options: Any) -> DataLoader[Any]:
    # a generator of its own: the seed of workers would be drawn from training's random stream
    return DataLoader(data, generator=torch.Generator(), **options)


def _as_it_is(batch: Any) -> Any:
    return batch


def _nothing(_: int) -> None:
    return None


def _length(dataset: Any) -> int | None:
    """None where `len` does not work: streams, and loaders of streams."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _warn_if_not_sharded(loader: DataLoader[Any], replicas: int) -> None:
    rows, drawn = _length(loader.dataset), _length(loader.sampler)
    if replicas > 1 and rows is not None and rows == drawn:
        _log.warning(
            "the DataLoader draws all %d rows in each of %d replicas: give the dataset itself, or a loader with a "
            "DistributedSampler over the replicas",
            rows,
            replicas,
        )
