"""An exponential moving average of a model's weights, of which each data-parallel rank holds its share.

::

    unsharded:  every rank    ema = decay * ema + (1 - decay) * parameter     for all elements
    here:       rank r        the same operation                             for its 1/d of the elements

Replicas hold equal parameters, so each can average any part of them without communication: an update costs 1/d of the
time and of the memory, and only reading the average moves data. Neighbours: `ema_layout.py` says which elements are
whose, `ema_tensors.py` reads a model, `ema_exchange.py` moves bytes, `ema_whole.py` puts tensors together.

See Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError, PipelineError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.ema_agreement import common_layout, description
from torchdistpackage.parallel.ema_exchange import Exchange, Stream
from torchdistpackage.parallel.ema_layout import Entry, Segment
from torchdistpackage.parallel.ema_pieces import AveragePiece, average_pieces
from torchdistpackage.parallel.ema_tensors import differences, entries_of, flat, listed, named_tensors
from torchdistpackage.parallel.ema_whole import Blocks, Whole, bitwise_differences, part_of, unfit

__all__ = ["ShardedEMA"]


@final
class ShardedEMA:
    """The exponential moving average of a model's parameters, sharded over a group of replicas by elements.

    Bit by bit it is what `ema.mul_(decay).add_(parameter, alpha=1 - decay)` makes of an unsharded copy in the same
    dtype. Buffers are not averaged: the average has those that the model had at the last update. Making it is
    collective over the group, and every rank's replica must have its starting values already (DDP equalises them).

    Parameters that do not require grad keep the value that they had when the average was made, unless `update` is told
    otherwise; those of an integer dtype are then copied. A tied parameter is held once. A DTensor is cut where its
    blocks are equal over the group: a tensor-parallel shard is divided over the data group, and of a module that
    `fully_shard` was applied to each rank averages its own block. A pipeline stage has an average of its own, with
    the names of the whole model if `flatten_model` or a splitter made its layers.

    With bfloat16 or float16 parameters a decay near 1 loses most updates to rounding; in bfloat16, 0.9999 changes next
    to nothing. An unsharded average does that, too; `dtype=torch.float32` holds the average in float32, as an unsharded
    `copy.deepcopy(model).float()` does. On the CPU with several threads, torch's own result in these two dtypes depends
    on the number of threads, in the last bit of a few elements; so does this one's.

    Args:
        model: Plain, a stage, or wrapped in DDP, `fully_shard`, `torch.compile`.
        group: Its replicas; None for the data group of `tpc`, or the world if `tpc` is not set up.
        dtype: In which floating parameters are averaged; None for each parameter's own.

    Raises:
        CheckpointError: The ranks' models differ, have other experts, or have no values yet. On every rank.
        TopologyError: This rank is not in the group.
        ValueError: dtype is not a floating dtype.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> ema = ShardedEMA(model)
        >>> _ = nn.init.constant_(model.weight, 3.0)  # in a loop: optimizer.step()
        >>> ema.update(model, decay=0.5)
        >>> with ema.applied_to(model):
        ...     model(torch.ones(1, 2)).item()
        4.0
        >>> ema.state_dict_cpu()  # called on every rank; {} on all but the first of each data group
        {'weight': tensor([[2., 2.]])}
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating dtype such as torch.float32, or None, got {dtype!r}")
        self._exchange = Exchange(group)
        self._num_updates = 0
        self._applied = False
        tensors: dict[str, Tensor] = {}
        entries: list[Entry] = []

        def look() -> tuple[str, list[Any]]:
            tensors.update(named_tensors(model))
            entries.extend(entries_of(tensors, dtype))
            return description(entries, tensors, self._exchange.group)

        self._layout = common_layout(self._exchange, entries, self._exchange.together("", look))
        numbers = {name: index for index, entry in enumerate(entries) for name in entry.names}
        self._names = {name: numbers[name] for name in tensors}  # in the model's order
        rank = self._exchange.rank
        self._segments = self._layout.segments(rank)
        self._shards = [
            _piece(tensors, entries[one.entry], one.begin, one.end).to(entries[one.entry].dtype, copy=True)
            for one in self._segments
        ]
        self._buffers = {
            index: local_tensor(tensors[entry.name].detach()).clone(memory_format=torch.contiguous_format)
            for index, entry in enumerate(entries)
            if not entry.is_parameter
        }

    @property
    def num_updates(self) -> int:
        """How often the average was updated."""
        return self._num_updates

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds: its share of the parameters, and the buffers."""
        return sum(one.numel() * one.element_size() for one in [*self._shards, *self._buffers.values()])

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float = 0.9999, only_trainable: bool = True) -> None:
        """Moves the average towards the model's parameters as they are now, and takes over its buffers.

        Not collective; call it on every rank, with the same arguments, after the optimizer's step. What it reads is on
        the device where the model was when the average was made: with that on the CPU and the model moved to a GPU
        since, the average stays in the host's memory.

        Args:
            model: The model, wrapped or not.
            decay: 0 to 1; the share of the average that stays.
            only_trainable: Leave parameters that do not require grad as they are, even if their values have changed.

        Raises:
            CheckpointError: It has other parameters, or other shapes, than the one that the average was made of.
            PipelineError: Called inside of `applied_to`.
            ValueError: decay is not between 0 and 1.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, got {decay}; 0.999 to 0.9999 is usual")
        if self._applied:
            raise PipelineError("update inside of applied_to would average the average; leave the with block first")
        tensors = self._tensors_of(model)
        for one, shard in zip(self._segments, self._shards, strict=True):
            entry = self._layout.entries[one.entry]
            if only_trainable and not tensors[entry.name].requires_grad:
                continue
            value = _piece(tensors, entry, one.begin, one.end).to(shard.device)
            if value.is_floating_point() and value.itemsize == 1:
                value = value.to(shard.dtype)  # float8, which torch does not promote; the others it does, as unsharded
            if shard.is_floating_point() or shard.is_complex():
                shard.mul_(decay).add_(value, alpha=1 - decay)
            else:
                shard.copy_(value)
        for index, buffer in self._buffers.items():
            buffer.copy_(local_tensor(tensors[self._layout.entries[index].name]))
        self._num_updates += 1

    def average_pieces(self) -> list[AveragePiece]:
        """What this rank holds, for `torchdistpackage.checkpoint`, which saves it by name for any other layout."""
        return [*average_pieces(self._layout, self._exchange.rank, self._segments, self._shards, self._buffers)]

    def average_loaded(self, num_updates: int) -> None:
        """The pieces have other values now.

        Args:
            num_updates: What `num_updates` is to be.
        """
        self._num_updates = num_updates

    def state_dict_shard(self) -> OrderedDict[str, Tensor]:
        """What this rank holds, to be saved by every rank for itself; not copies.

        Returns:
            Name -> 1-D tensor: elements of the parameter in the order of memory. Where they begin, whose they are and
            the buffers are in its attribute `_metadata`, which `torch.save` keeps, as for a module's state dict.
            `torch.load(weights_only=True)` reads it.
        """
        entries = self._layout.entries
        named = [(entries[one.entry].name, one, shard) for one, shard in zip(self._segments, self._shards, strict=True)]
        state = OrderedDict((name, shard) for name, _, shard in named)
        state._metadata = {  # type: ignore[attr-defined]
            "rank": self._exchange.rank,
            "size": self._exchange.size,
            "num_updates": self._num_updates,
            "begins": {name: one.begin for name, one, _ in named},
            "buffers": {entries[index].name: buffer for index, buffer in self._buffers.items()},
        }
        return state

    @torch.no_grad()
    def load_state_dict_shard(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state_dict_shard` gave on this rank of a group of the same size. Collective.

        Raises:
            CheckpointError: It is another rank's or another model's, or the ranks' shards are of different updates.
        """
        own: Any = self.state_dict_shard()
        facts = getattr(state, "_metadata", {})

        def look() -> int:
            if missing := [key for key in own._metadata if key not in facts]:
                raise CheckpointError(
                    f"the state's _metadata lacks {listed(missing)}; pass the very object that state_dict_shard "
                    "returned, or that torch.load gave for it, not a copy of its items"
                )
            theirs, here = (f"rank {one['rank']} of {one['size']}" for one in (facts, own._metadata))
            if theirs != here:
                raise CheckpointError(
                    f"the shard is of {theirs} and this is {here}; for another number of ranks save state_dict_cpu() "
                    "and load that with load_state_dict"
                )
            fits = _shapes(state) == _shapes(own) and facts["begins"] == own._metadata["begins"]
            if not fits or _shapes(facts["buffers"]) != _shapes(own._metadata["buffers"]):
                raise CheckpointError("the shard is of another model, or of another order of its parameters")
            return int(facts["num_updates"])

        updates = self._exchange.together("load_state_dict_shard", look)
        if len({*updates}) > 1:
            raise CheckpointError(
                f"ShardedEMA: load_state_dict_shard: the ranks' shards are of different updates, {updates} in order "
                "of the ranks; load files that were saved together"
            )
        for mine, given in ((own, state), (own._metadata["buffers"], facts["buffers"])):
            for name, tensor in mine.items():
                tensor.copy_(given[name])
        self._num_updates = updates[0]

    @torch.no_grad()
    def state_dict_cpu(self) -> dict[str, Tensor]:
        """The whole average, in CPU memory, on the first rank of the group; {} on the others. Collective.

        It loads into a plain model, and those of all stages of a pipeline together into the whole model. A parameter
        whose blocks lie on ranks outside of the group (tensor parallel) comes as the block that the group holds: save
        one file for each rank of the tensor group (`get_mp_ckpt_suffix`), and read it with `load_state_dict` and
        `copy_to`. For whole tensors ask the model: `with ema.applied_to(model)`, each parameter's `full_tensor()`.

        Returns:
            Name -> tensor, in the order of the model's state dict, without its extra state; new tensors.
        """
        layout, first = self._layout, self._exchange.rank == 0
        whole = Whole(layout) if first else None
        with self._exchange.guarded("state_dict_cpu"):
            lengths = [layout.nbytes(rank) for rank in range(layout.size)]
            self._exchange.gather(Stream.of(self._shards), lengths, whole.stream if whole is not None else None)
        if whole is None:
            return {}
        found = whole.finish()
        found.update({index: buffer.to("cpu", copy=True) for index, buffer in self._buffers.items()})
        return {name: found[index] for name, index in self._names.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor] | None, *, num_updates: int | None = None) -> None:
        """Takes over a whole average, saved by any number of ranks. Collective.

        Args:
            state: What `state_dict_cpu` gave, or the state dict of an unsharded average; for a stage also that of the
                whole model. On every rank, or on the first one of the group, with None or {} on the others.
            num_updates: What `num_updates` is to be; None leaves it. The first rank's counts.

        Raises:
            CheckpointError: Names are missing or shapes differ, or only some ranks have a state. On every rank, and
                nothing was changed.
        """
        layout, given = self._layout, state or {}

        def look() -> tuple[bool, int | None]:
            if given and (problem := unfit(layout, given)):
                raise CheckpointError(problem)
            return bool(given), num_updates

        answers = self._exchange.together("load_state_dict", look)
        have = [rank for rank, (has, _) in enumerate(answers) if has]
        everywhere = len(have) == layout.size or not layout.entries
        if not everywhere and have != [0]:
            raise CheckpointError(
                f"ShardedEMA: load_state_dict: ranks {have} of the {layout.size} ranks of the group have "
                "a state; give one to the first, or to all"
            )
        mine = [*self._shards, *(buffer.view(-1) for buffer in self._buffers.values())]
        if everywhere:
            for target, value in zip(mine, self._parts(given, self._exchange.rank), strict=True):
                target.copy_(value)
        else:
            with self._exchange.guarded("load_state_dict"):
                everyone = range(layout.size) if self._exchange.rank == 0 else ()
                streams = [Stream.of(self._parts(given, rank)) for rank in everyone]
                buffers = sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
                lengths = [layout.nbytes(rank) + buffers for rank in range(layout.size)]
                self._exchange.scatter(streams, lengths, Stream.of(mine))
        updates = answers[0][1]
        self._num_updates = self._num_updates if updates is None else updates

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites a model's parameters and persistent buffers with the average. Collective.

        Raises:
            CheckpointError: Its parameters or shapes differ. On every rank, and nothing was changed.
        """
        self._write_into(model, {})

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Lends the average to a model: inside of the block it has those weights, behind it its own, bit by bit.

        Collective. It holds a copy of the model's weights and buffers meanwhile, beside them.

        Example:
            >>> model = nn.BatchNorm1d(2)
            >>> ema = ShardedEMA(model)
            >>> _ = nn.init.zeros_(model.weight)
            >>> with ema.applied_to(model):
            ...     model.weight.tolist()
            [1.0, 1.0]
            >>> model.weight.tolist()
            [0.0, 0.0]
        """
        saved: dict[str, Tensor] = {}
        before = self._applied
        try:
            self._write_into(model, saved, keep=True)
            self._applied = True
            yield
        finally:
            self._applied = before
            with torch.no_grad():
                tensors = named_tensors(model) if saved else {}
                for name, value in saved.items():
                    local_tensor(tensors[name]).copy_(value)

    def verify_with_gt(self, ema_model: nn.Module) -> None:
        """Compares the parameters, bit by bit, with an average that was kept in the plain way. Collective.

        Args:
            ema_model: That average, as a model; on the first rank of the group, the others' do not matter.

        Raises:
            CheckpointError: They differ in values, dtype or shape, or one has a parameter that the other lacks; it says
                which and by how much. On every rank.
        """
        state = self.state_dict_cpu()

        def look() -> None:
            if self._exchange.rank > 0:
                return
            if problem := bitwise_differences(self._layout, state, named_tensors(ema_model)):
                raise CheckpointError(problem)

        self._exchange.together("verify_with_gt", look)

    @torch.no_grad()
    def _write_into(self, model: nn.Module, saved: dict[str, Tensor], *, keep: bool = False) -> None:
        """Overwrites a model's tensors; if they are to be kept, `saved` gets what they were."""
        layout, rank = self._layout, self._exchange.rank
        tensors: dict[str, Tensor] = {}

        def look() -> None:
            tensors.update(self._tensors_of(model))
            if keep:
                saved.update({one.name: local_tensor(tensors[one.name].detach()).clone() for one in layout.entries})

        self._exchange.together("copy_to", look)
        blocks = Blocks(layout, rank, tensors)
        with self._exchange.guarded("copy_to"):
            if layout.shares:
                lengths = [layout.nbytes(other) for other in range(layout.size)]
                self._exchange.gather(Stream.of(self._shards), lengths, blocks.stream, everyone=True)
            else:
                blocks.write(self._segments, self._shards)
        blocks.finish()
        for index, buffer in self._buffers.items():
            local_tensor(tensors[layout.entries[index].name]).copy_(buffer)

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = named_tensors(model)
        if text := differences(self._layout, self._exchange.rank, tensors):
            raise CheckpointError(
                f"this is not the model that the average was made of: {text}. Make a new ShardedEMA after changing a "
                "model, and before wrapping it the same way"
            )
        return tensors

    def _parts(self, state: Mapping[str, Tensor], rank: int) -> list[Tensor]:
        """A rank's part of a whole state: its segments, then all buffers; 1-D."""
        parts = [part_of(self._layout, state, one, rank) for one in self._layout.segments(rank)]
        for index, own in self._buffers.items():
            one = Segment(index, 0, own.numel())
            parts.append(part_of(self._layout, state, one, rank))
        return parts


def _piece(tensors: Mapping[str, Tensor], entry: Entry, begin: int, end: int) -> Tensor:
    return flat(tensors[entry.name], entry.order)[begin:end]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
