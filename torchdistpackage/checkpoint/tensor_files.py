"""The tensors of a checkpoint that is on the disk: any box of any of them, into tensors of any layout.

::

    written      | a a a a | b b b b | c c c c |          the boxes of another layout, in the files that DCP describes
    wanted              | x x x x x x |                   a part of this rank: half of a, all of b

DCP's reader does the reading; the planner here says what, and sees to it that each box that was written is read once.
`.metadata` is a pickle, and is read by an unpickler that knows only what belongs in there. Neighbour:
`tensor_writing.py`, which also says what is in the files.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from torchdistpackage.checkpoint.boxes import Box, whole_box
from torchdistpackage.checkpoint.parts import Part
from torchdistpackage.errors import CheckpointError

__all__ = ["TensorFiles"]

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size"],
    "pathlib": ["PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"],
}


@final
class TensorFiles:
    """The tensors of a checkpoint that is on the disk.

    Args:
        folder: With a `.metadata` of DCP.

    Raises:
        CheckpointError: It cannot be read.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchdistpackage.checkpoint import Checkpointer
        >>> run = tempfile.TemporaryDirectory()
        >>> Checkpointer(run.name, nn.Linear(2, 3)).save(120)
        >>> files = TensorFiles(Path(run.name, "step-00000120"))
        >>> files.read_whole("model.weight").shape, files.dtype("model.bias"), files.chunks("model.bias")
        (torch.Size([3, 2]), torch.float32, [Box(offsets=(0,), sizes=(3,))])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = _Reader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError, AttributeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{folder / '.metadata'} cannot be read ({type(error).__name__}: {error}); the checkpoint is torn or "
                "not one: load another one"
            ) from error
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def keys(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor as it was saved."""
        return self._tensors[key].properties.dtype

    def chunks(self, key: str) -> list[Box]:
        """The boxes that it was written in."""
        return [_box(chunk) for chunk in self._tensors[key].chunks]

    @torch.no_grad()
    def read(self, targets: Sequence[tuple[str, Part]]) -> None:
        """Fills parts, cast to their dtypes; each box that was written is read once, however many parts overlap it.

        Args:
            targets: A key of the checkpoint, and the part that is to have its values.

        Raises:
            CheckpointError: A key is missing, or has another shape, or a box of it was not written.
        """
        planner = _BoxLoadPlanner(targets)
        planner.set_up_planner({}, self._metadata, True)
        self._reader.set_up_storage_reader(self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()

    def read_whole(self, key: str) -> Tensor:
        """A whole tensor, in CPU memory.

        Raises:
            CheckpointError: There is no such key.
        """
        if key not in self:
            raise CheckpointError(f"{self.folder.name} has no {key}; it has {len(self._tensors)} tensors, see .keys")
        value = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read([(key, Part(key, self.shape(key), whole_box(self.shape(key)), value))])
        return value


def _box(chunk: ChunkStorageMetadata) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


@final
class _BoxLoadPlanner(LoadPlanner):
    """Reads from each box that was written what the wanted parts need of it.

    Where several parts need one box, what they need is read once, into a tensor beside them, and dealt out: a piece of
    `Bf16ZeroOptimizer` is several parts, and they lie in one box of what a plain run has written.
    """

    def __init__(self, targets: Sequence[tuple[str, Part]]) -> None:
        self._targets = targets
        self._wanted: dict[int, tuple[Box, list[tuple[Part, Box]]]] = {}  # by number of the item: what it brings
        self._beside: dict[int, Tensor] = {}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._metadata: Mapping[str, Any] = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        by_key: dict[str, list[Part]] = {}
        for key, part in self._targets:
            by_key.setdefault(key, []).append(part)
        return LoadPlan([item for key, parts in by_key.items() for item in self._items(key, parts)])

    def _items(self, key: str, parts: list[Part]) -> list[ReadItem]:
        entry = self._metadata.get(key)
        for part in parts:
            if entry is None or tuple(entry.size) != part.shape:
                found = "is not in the checkpoint" if entry is None else f"is {tuple(entry.size)} in the checkpoint"
                raise CheckpointError(f"{key} {found}, and {part.shape} here; it is a checkpoint of another model")
        items, covered = [], 0
        for chunk in entry.chunks:  # type: ignore[union-attr]
            box = _box(chunk)
            common = [(part, both) for part in parts if (both := part.box.overlap(box)) is not None]
            covered += sum(both.numel for _, both in common)
            if common:
                items.append(self._item(key, box, common))
        if covered != sum(part.box.numel for part in parts):
            raise CheckpointError(f"the checkpoint has only some of the elements of {key}; it was not written whole")
        return items

    def _item(self, key: str, box: Box, common: list[tuple[Part, Box]]) -> ReadItem:
        bounds = _bounds([both for _, both in common])
        number = len(self._wanted)
        self._wanted[number] = (bounds, common)
        inside = bounds.moved([-at for at in box.offsets])
        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(key, torch.Size(bounds.offsets), number),
            dest_offsets=torch.Size([0] * len(bounds.sizes)),
            storage_index=MetadataIndex(key, torch.Size(box.offsets)),
            storage_offsets=torch.Size(inside.offsets),
            lengths=torch.Size(bounds.sizes),
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("no item of these plans is bytes")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        number = _number(read_item)
        bounds, common = self._wanted[number]
        if len(common) == 1:
            part, both = common[0]
            return part.tensor[both.within(part.box)]
        dtype = self._metadata[read_item.storage_index.fqn].properties.dtype
        return self._beside.setdefault(number, torch.empty(bounds.sizes, dtype=dtype))

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        beside = self._beside.pop(_number(read_item), None)
        if beside is None:
            return
        bounds, common = self._wanted[_number(read_item)]
        for part, both in common:
            part.tensor[both.within(part.box)].copy_(beside[both.within(bounds)])


def _number(item: ReadItem) -> int:
    assert item.dest_index.index is not None
    return item.dest_index.index


def _bounds(boxes: Sequence[Box]) -> Box:
    low = [min(at) for at in zip(*(box.offsets for box in boxes), strict=True)]
    ends = [[a + n for a, n in zip(box.offsets, box.sizes, strict=True)] for box in boxes]
    high = [max(at) for at in zip(*ends, strict=True)]
    return Box(tuple(low), tuple(end - begin for begin, end in zip(low, high, strict=True)))


@final
class _Reader(FileSystemReader):
    """DCP's reader, but for its `.metadata`: an unpickler that runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not the Metadata of a checkpoint")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no metadata of a checkpoint does")
