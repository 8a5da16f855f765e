"""The state of a sharded optimizer as a checkpoint: whole, in the wrapped optimizer's own format, or one rank's shard.

::

    whole   {"state": {0: {"step": .., "exp_avg": [whole parameter]}}, "param_groups": [..], "master_weights": {0: ..}}
    shard   {"layout": {..numbers..}, "optimizer": the wrapped one's state_dict over pieces, "master_weights": [..]}

The whole format has parameters numbered as the optimizer numbered them before it was wrapped, so that it loads into
the optimizer without sharding, and into any number of shards. Parameters are put together one at a time: no rank needs
more memory than the result, and those that do not get it hardly any.

What the ranks tell each other about their state travels as JSON; pickled objects would be programs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import CheckpointError
from torchdistpackage.parallel.zero_buckets import Bucket, Member, Piece
from torchdistpackage.parallel.zero_group import ShardGroup

__all__ = ["ShardedState"]

_MASTER = "master_weights"


class _Owned(NamedTuple):
    rank: int
    start: int
    stop: int


@final
class ShardedState:
    """What is in the buckets and the wrapped optimizer, for one call.

    Args:
        optimizer: The wrapped one, over pieces.
        members: All of them.
        buckets: All of them.
        shards: Who shares.
        counts: The number of parameters in each group of the original optimizer.
        partition: How parameters are divided, in a word.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        members: Sequence[Member],
        buckets: Sequence[Bucket],
        shards: ShardGroup,
        counts: Sequence[int],
        partition: str,
    ) -> None:
        self._optimizer, self._shards, self._counts, self._partition = optimizer, shards, counts, partition
        self._members = sorted(members, key=lambda member: member.index)
        self._buckets = buckets
        self._pieces = [piece for bucket in buckets for piece in bucket.pieces]

    # ---- whole ----

    @torch.no_grad()
    def gather(self, groups: Sequence[Mapping[str, Any]], *, everywhere: bool) -> dict[str, Any]:
        """The whole state, on the first rank or on all; {} on the others. Collective.

        Args:
            groups: The options of the parameter groups.
            everywhere: On all.
        """
        owned = self._owned()
        told = self._tell()
        mine = {(id(piece.member), piece.start): piece for piece in self._pieces}
        state: dict[int, dict[str, Any]] = {}
        masters: dict[int, Tensor] = {}
        for member in self._members:
            parts = owned.get(id(member), [])
            if not parts:
                continue
            collect = _Collector(
                self._shards, parts, [mine.get((id(member), part.start)) for part in parts], everywhere
            )
            known = told[parts[0].rank].get(str(member.index), {})
            found = {key: collect.entry(self._optimizer, key, kind, member) for key, kind in known.items()}
            if member.master:
                whole = collect.whole([piece and piece.tensor for piece in collect.pieces], torch.float32)
                if whole is not None:
                    masters[member.index] = whole.view(member.local().shape)
            if found:
                state[member.index] = found
        if not everywhere and self._shards.rank:
            return {}
        starts = [sum(self._counts[:number]) for number in range(len(self._counts))]
        numbered = [
            {**group, "params": list(range(start, start + count))}
            for group, start, count in zip(groups, starts, self._counts, strict=True)
        ]
        return {"state": state, "param_groups": numbered, **({_MASTER: masters} if masters else {})}

    def _owned(self) -> dict[int, list[_Owned]]:
        """Who owns what: id of a member -> its parts, in order."""
        found: dict[int, list[_Owned]] = {}
        for bucket in self._buckets:
            by_number = {slot.parameter: member for slot, member in bucket.slots}
            for rank in range(self._shards.size):
                for slot in bucket.layout.owned(rank):
                    parts = found.setdefault(id(by_number[slot.parameter]), [])
                    parts.append(_Owned(rank, slot.start, slot.stop))
        return {key: sorted(parts, key=lambda part: part.start) for key, parts in found.items()}

    def _tell(self) -> list[dict[str, Any]]:
        """What each rank has of the parameters of which it owns the first elements: {index: {key: kind}}."""
        own: dict[str, Any] = {}
        for piece in self._pieces:
            state = self._optimizer.state.get(piece.tensor)
            if state and piece.start == 0:
                own[str(piece.member.index)] = {key: _kind(value, piece) for key, value in state.items()}
        return _all_told(own, self._shards)

    @torch.no_grad()
    def scatter(self, whole: Mapping[str, Any]) -> None:
        """Takes this rank's part of a whole state. Not collective.

        Raises:
            CheckpointError: It is of another model or optimizer.
        """
        groups = self._checked(whole)
        numbers = [number for group in groups for number in group["params"]]
        masters = whole.get(_MASTER, {})
        state: dict[int, Any] = {}
        packed, at = [], 0
        by_tensor = {id(piece.tensor): piece for piece in self._pieces}
        for saved, group in zip(groups, self._optimizer.param_groups, strict=True):
            count = len(group["params"])
            options = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
            packed.append({**options, "params": list(range(at, at + count))})
            for place, tensor in enumerate(group["params"], start=at):
                piece = by_tensor[id(tensor)]
                number = numbers[piece.member.index]
                if number in whole["state"]:
                    entries = whole["state"][number].items()
                    state[place] = {key: _part(value, piece, key) for key, value in entries}
                if piece.copied:
                    values = masters.get(number) if piece.member.master else None
                    piece.tensor.copy_(piece.read(piece.member.local() if values is None else values))
            at += count
        self._optimizer.load_state_dict({"state": state, "param_groups": packed})
        for member in self._members:
            member.version = member.parameter._version

    def _checked(self, whole: Mapping[str, Any]) -> list[Any]:
        if "param_groups" not in whole or "state" not in whole:
            raise CheckpointError(
                f"this is not the whole state of an optimizer: it has the keys {sorted(map(str, whole))}. state_dict() "
                "gives it on the first rank of the group, and to='all' on every rank; pass it on every rank here"
            )
        groups = list(whole["param_groups"])
        found = [len(group["params"]) for group in groups]
        if found != list(self._counts):
            raise CheckpointError(
                f"the state has parameter groups of {found} parameters, the optimizer of {list(self._counts)}; make "
                "the optimizer with the groups that it had when the state was saved"
            )
        return groups

    # ---- by name, for checkpoint/ ----

    def pieces(self) -> list[Piece]:
        """What this rank steps on."""
        return list(self._pieces)

    @torch.no_grad()
    def loaded(self) -> None:
        """Parameters and master weights have new values that belong together."""
        for piece in self._pieces:
            if piece.copied and not piece.is_master:
                piece.tensor.copy_(piece.read(piece.member.local()))
        for member in self._members:
            member.version = member.parameter._version

    # ---- one shard ----

    def layout(self) -> dict[str, Any]:
        """What two shards must have alike to hold the same elements."""
        return {
            "ranks": self._shards.size,
            "rank": self._shards.rank,
            "partition": self._partition,
            "parameters": [[member.index, member.local().numel()] for member in self._members],
            "buckets": [list(bucket.layout.bounds) for bucket in self._buckets],
        }

    def shard(self) -> dict[str, Any]:
        """This rank's part as it is."""
        return {
            "layout": self.layout(),
            "optimizer": self._optimizer.state_dict(),
            _MASTER: [piece.tensor.detach() for piece in self._pieces if piece.copied],
        }

    @torch.no_grad()
    def load_shard(self, saved: Mapping[str, Any]) -> None:
        """Takes back what `shard` gave.

        Raises:
            CheckpointError: It is of another layout.
        """
        mine, theirs = self.layout(), dict(saved.get("layout", {}))
        differ = [f"{key} {theirs.get(key)} (here {mine[key]})" for key in mine if theirs.get(key) != mine[key]]
        copies = [piece for piece in self._pieces if piece.copied]
        if differ or len(copies) != len(saved[_MASTER]):
            differ = differ or [f"{len(saved[_MASTER])} master weights (here {len(copies)})"]
            raise CheckpointError(
                f"the shard was saved with another layout: {'; '.join(differ)[:600]}. Load it with the same number of "
                "ranks, bucket_size, partition and overlap_comm, or save with state_dict(), which loads into any"
            )
        self._optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        for piece, values in zip(copies, saved[_MASTER], strict=True):
            piece.tensor.copy_(values)
        for member in self._members:
            member.version = member.parameter._version


@final
class _Collector:
    """Puts one parameter's state together from its owners, on the CPU."""

    def __init__(
        self, shards: ShardGroup, parts: Sequence[_Owned], pieces: Sequence[Piece | None], everywhere: bool
    ) -> None:
        self._shards, self._parts, self.pieces, self._everywhere = shards, parts, pieces, everywhere

    def entry(self, optimizer: torch.optim.Optimizer, key: str, kind: Any, member: Member) -> Any:
        """One entry of the parameter's state; None on ranks that do not get it."""
        what, dtype, shape = kind["what"], getattr(torch, kind["dtype"] or "float32"), kind["shape"]
        if what == "value":
            return torch.tensor(kind["value"], dtype=dtype) if kind["dtype"] else kind["value"]
        mine = [None if piece is None else optimizer.state[piece.tensor].get(key) for piece in self.pieces]
        if what == "shared":
            whole = self.whole(mine, dtype)
            return None if whole is None else whole.view(member.local().shape)
        return self._pass_on(self._parts[0].rank, mine[0], torch.Size(shape), dtype)

    def whole(self, mine: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """The elements of all parts, one after another."""
        receives = self._everywhere or self._shards.rank == 0
        total = torch.empty(self._parts[-1].stop, dtype=dtype) if receives else None
        for part, own in zip(self._parts, mine, strict=True):
            found = self._pass_on(part.rank, own, torch.Size([part.stop - part.start]), dtype)
            if total is not None and found is not None:
                total[part.start : part.stop] = found
        return total

    def _pass_on(self, source: int, own: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        shards = self._shards
        here = None if own is None or shards.rank != source else own.detach().reshape(shape)
        if shards.group is None or (not self._everywhere and source == 0):
            return None if here is None else here.to("cpu", copy=True)
        if self._everywhere or shards.rank in (0, source):
            device = shards.device
            buffer = torch.empty(shape, dtype=dtype, device=device) if here is None else here.to(device).contiguous()
            if self._everywhere:
                dist.broadcast(buffer, src=shards.owner(source), group=shards.group)
            elif shards.rank == source:
                dist.send(buffer, dst=shards.owner(0), group=shards.group)
            else:
                dist.recv(buffer, src=shards.owner(source), group=shards.group)
            return buffer.to("cpu", copy=True) if self._everywhere or shards.rank == 0 else None
        return None


def _kind(value: Any, piece: Piece) -> dict[str, Any]:
    """How an entry of the state travels: a number; a tensor like the piece; another tensor, as it is."""
    if not isinstance(value, Tensor):
        return {"what": "value", "dtype": "", "shape": [], "value": value}
    dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
    if value.shape == piece.shape and (value.dim() or not piece.whole):
        return {"what": "shared", "dtype": dtype, "shape": shape}
    if value.dim() == 0:
        return {"what": "value", "dtype": dtype, "shape": [], "value": value.item()}
    return {"what": "tensor", "dtype": dtype, "shape": shape}


def _part(value: Any, piece: Piece, key: str) -> Any:
    """A piece's part of an entry of the whole state."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if piece.whole or value.dim() == 0:
        return value.clone()
    if value.numel() != piece.member.local().numel():
        raise CheckpointError(
            f"{key!r} of parameter {piece.member.index} has the shape {tuple(value.shape)}, but the parameter has "
            f"{tuple(piece.member.local().shape)}; the state is of another model, or needs partition='parameters'"
        )
    return piece.read(value).clone()


def _all_told(own: dict[str, Any], shards: ShardGroup) -> list[dict[str, Any]]:
    """Every rank's words, in order."""
    if shards.group is None:
        return [own]
    text = torch.frombuffer(bytearray(json.dumps(own), "utf-8"), dtype=torch.uint8).to(shards.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=shards.device) for _ in range(shards.size)]
    dist.all_gather(lengths, torch.tensor([text.numel()], device=shards.device), group=shards.group)
    sizes = [int(length) for length in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=shards.device)
    padded[: text.numel()] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=shards.group)
    return [json.loads(bytes(one[:size].tolist())) for one, size in zip(texts, sizes, strict=True)]
