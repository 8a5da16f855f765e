"""From datasets to the batches of steps, as a trainer's arguments say.

::

    dataset --BatchSource--> raw batches --read_batch--> batches without padding rows --grouped--> batches of one step

Neighbours: `batches.py` says which rows and when, `batch_reading.py` what is what in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from torchdistpackage.errors import TrainerError
from torchdistpackage.topology import tpc
from torchdistpackage.trainer.arguments import PipelineTrainingArguments
from torchdistpackage.trainer.batches import Batch, BatchSource, RawBatch, read_batch
from torchdistpackage.trainer.process_layout import any_rank_wants, from_every_rank

__all__ = ["Feed", "first_rows", "grouped"]


@dataclass(frozen=True)
class Feed:
    """Makes this replica's batches.

    Attributes:
        args: Say how.
        seed: Of the order of the data and of random transforms.
        collator: List of rows -> batch.
        default_labels: Whether tokens are their own labels where a batch has none.
    """

    args: PipelineTrainingArguments
    seed: int
    collator: Callable[[list[Any]], Any] | None = None
    default_labels: bool = False

    def source(self, dataset: Any, *, training: bool) -> BatchSource:
        """The batches of a dataset, epoch by epoch.

        Raises:
            TrainerError: The dataset is of no known kind, or empty.
        """
        args = self.args
        return BatchSource(
            dataset,
            batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            replica=tpc.get_dp_rank(),
            replicas=tpc.get_dp_size(),
            collator=self.collator,
            seed=self.seed if args.data_seed is None else args.data_seed,
            shuffle=training,
            drop_last=training and args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            even=args.data_parallel == "fsdp2",
        )

    def batches_per_epoch(self, source: BatchSource) -> int | None:
        """Batches of an epoch, the same on every rank; None if nobody knows. Collective for a user's DataLoader."""
        length = source.batches_per_epoch
        if not isinstance(source.dataset, DataLoader):
            return length
        lengths: list[int | None] = from_every_rank(length)  # they may differ: the shortest ends the epoch
        return None if None in lengths else min(each for each in lengths if each is not None)

    def batches(self, source: BatchSource, epoch: int, skip_rows: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, read and without padding.

        Args:
            source: From `source`.
            epoch: Its number.
            skip_rows: Rows of all replicas that are done.

        Raises:
            TrainerError: A batch has no labels, or cannot be read.
        """
        raw_batches = source.epoch(epoch, skip_rows)
        if isinstance(source.dataset, DataLoader) and tpc.get_dp_size() > 1:
            raw_batches = _while_all_have_some(raw_batches)
        for raw in raw_batches:
            batch = read_batch(raw.data, self.args.label_names, self.default_labels)
            if batch.labels is None:
                raise TrainerError(
                    f"the batch has no labels: a dict needs one of the keys {', '.join(self.args.label_names)}, a "
                    "tuple a second entry; for a causal language model they are made of input_ids"
                )
            yield self._without_padding(batch, raw.pad_rows)

    def example(self, source: BatchSource) -> Batch:
        """The first batch, for a splitter; labels need not be known yet.

        Raises:
            TrainerError: There is none.
        """
        for raw in source.epoch(0):
            return read_batch(raw.data, self.args.label_names)
        raise TrainerError(f"the dataset ({type(source.dataset).__name__}) has no rows")

    def _without_padding(self, batch: Batch, pad_rows: int) -> Batch:
        rows = batch.rows - pad_rows
        if self.args.data_parallel == "fsdp2":
            # Each micro-batch gathers weights over the replicas, so all of them must run as many; where some have a row
            # of padding, the others have one row more than they.
            batch = replace(batch, most_microbatches=max(1, batch.rows - 1))
        if not pad_rows:
            return batch
        if rows < 1:
            return replace(batch, real=False)
        args, kwargs, labels = first_rows((batch.args, batch.kwargs, batch.labels), batch.rows, rows)
        return replace(batch, args=args, kwargs=kwargs, labels=labels, rows=rows)


def first_rows(value: Any, rows: int, wanted: int) -> Any:
    """The first rows of all tensors that have as many as the batch.

    Args:
        value: Any pytree.
        rows: Rows of the batch.
        wanted: How many to keep.

    Example:
        >>> first_rows([torch.arange(4), torch.zeros(1, 2)], 4, 2)
        [tensor([0, 1]), tensor([[0., 0.]])]
    """

    def cut(leaf: Tensor) -> Tensor:
        return leaf[:wanted] if leaf.dim() and leaf.shape[0] == rows else leaf

    return pytree.tree_map_only(torch.Tensor, cut, value)


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of each step; the last step of an epoch may have fewer.

    Example:
        >>> [len(group) for group in grouped([Batch(())] * 5, 2)]
        [2, 2, 1]
    """
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _while_all_have_some(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    """A user's own loaders may differ in length; where one ends, all end."""
    while True:
        batch = next(batches, None)
        if any_rank_wants([batch is None])[0]:
            return
        assert batch is not None
        yield batch
