"""Parts to files, in the format of `torch.distributed.checkpoint` (DCP): its tools read these folders, too.

::

    __0_0.distcp  __1_0.distcp  ...    the boxes that each rank wrote, one after another, each as torch.save writes it
    .metadata                          shape and dtype of each tensor; file, place and length of each of its boxes

DCP's planners decide what is written: the one here writes the boxes that it is given. DCP's own `save` is not called:
it passes pickled objects between ranks, and would decide anew what `plan.py` has decided. What ranks tell each other
goes as JSON (`job.py`). Neighbour: `tensor_files.py` reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from torchdistpackage.checkpoint.boxes import Box
from torchdistpackage.checkpoint.plan import Chosen
from torchdistpackage.errors import CheckpointError

__all__ = ["finish_tensors", "write_tensors"]


def write_tensors(folder: Path, chosen: Sequence[Chosen], tensors: Sequence[Tensor], rank: int) -> list[list[Any]]:
    """Writes this rank's boxes; on the disk when it returns.

    Args:
        folder: Exists, and has no such file yet.
        chosen: The boxes.
        tensors: The values of each.
        rank: In the world: it names the file.

    Returns:
        File, place and length of each box, for `finish_tensors`.

    Raises:
        CheckpointError: They cannot be written; the disk is full, most often.
    """
    if not chosen:
        return []
    planner = _BoxSavePlanner(chosen, tensors)
    planner.set_up_planner({})
    writer = _writer(folder)
    writer.set_up_storage_writer(rank == 0)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]
    try:
        written = writer.write_data(planner.finish_plan(plan), planner).wait()
    except (OSError, RuntimeError) as error:  # of a full disk torch.save says no more than "unexpected pos"
        need, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(folder).free
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder} cannot be written ({why}): {need:,} bytes are to be written, and {free:,} are free now on that "
            "file system; if that is too little, free some or keep fewer checkpoints, and save again"
        ) from error
    where = {(result.index.fqn, tuple(result.index.offset or ())): result.storage_data for result in written}
    found = [where[one.key, one.box.offsets] for one in chosen]
    return [[info.relative_path, info.offset, info.length] for info in found]


def finish_tensors(folder: Path, chosen: Sequence[Sequence[Chosen]], stored: Sequence[Sequence[list[Any]]]) -> None:
    """Writes `.metadata`, on one rank, after all have written.

    Args:
        folder: The same.
        chosen: Of every rank.
        stored: What `write_tensors` has returned on every rank.
    """
    tensors: dict[str, Any] = {}
    for one in (one for mine in chosen for one in mine):
        properties = TensorProperties(dtype=getattr(torch, one.dtype))
        entry = tensors.setdefault(one.key, TensorStorageMetadata(properties, torch.Size(one.shape), []))
        entry.chunks.append(_chunk(one.box))
    results = [
        [WriteResult(_index(one), length, _StorageInfo(file, at, length)) for one, (file, at, length) in both]
        for both in (zip(mine, places, strict=True) for mine, places in zip(chosen, stored, strict=True))
    ]
    writer = _writer(folder)
    writer.set_up_storage_writer(True)
    writer.finish(Metadata(tensors), results)


def _writer(folder: Path) -> FileSystemWriter:
    # Nothing is copied ahead: that is done on a stream of the device, if there is one, and this may be another thread.
    return FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)


def _index(one: Chosen) -> MetadataIndex:
    return MetadataIndex(one.key, torch.Size(one.box.offsets))


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


@final
class _BoxSavePlanner(SavePlanner):
    """Writes the boxes that it is given: all of them, as they are."""

    def __init__(self, chosen: Sequence[Chosen], tensors: Sequence[Tensor]) -> None:
        self._chosen = chosen
        self._tensors = {(one.key, one.box.offsets): tensor for one, tensor in zip(chosen, tensors, strict=True)}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for one in self._chosen:
            properties = TensorProperties(dtype=getattr(torch, one.dtype))
            data = TensorWriteData(_chunk(one.box), properties, torch.Size(one.shape))
            items.append(WriteItem(index=_index(one), type=WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("plan.py has planned, and finish_tensors writes the metadata")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn, tuple(write_item.index.offset or ())].detach()
