"""Moves the shards of an average between the ranks of a group, as bytes, in rounds of a bounded size.

What a rank holds is a stream: the bytes of its tensors, one after the other. A round moves the next piece of every
rank's stream at once, so that no rank needs more than 64 MiB besides the tensors themselves::

    rank 0   |====|====|==  |                 round 0: gather the first |====| of all ranks, put each where it belongs
    rank 1   |====|====|=== |                 round 1: ...

Bytes, because gloo does not reduce or gather every dtype, and so that dtypes need no streams of their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import CheckpointError, TopologyError
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["Exchange", "Stream"]

_STAGING = 64 << 20


@final
class Stream:
    """The bytes of some tensors, one after the other.

    Args:
        parts: 1-D contiguous tensors, on any device; None for bytes that are passed over.
        lengths: Bytes of each part.

    Example:
        >>> first, second = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.int16)
        >>> stream, three = Stream([first, second], [2, 2]), torch.zeros(3, dtype=torch.uint8)
        >>> stream.read(1, three)
        >>> three.tolist()
        [2, 3, 0]
    """

    def __init__(self, parts: Sequence[Tensor | None], lengths: Sequence[int]) -> None:
        self._parts = [None if part is None else part.view(torch.uint8) for part in parts]
        self._starts = [0, *accumulate(lengths)]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Stream:
        """The stream of tensors that are all there."""
        return cls(parts, [part.numel() * part.element_size() for part in parts])

    @property
    def length(self) -> int:
        """Bytes."""
        return self._starts[-1]

    def read(self, begin: int, into: Tensor) -> None:
        """Fills `into` (uint8) with what begins there; what lies behind the end is left as it is."""
        for part, low, high in self._spans(begin, into.numel()):
            if part is not None:
                into[low:high].copy_(part)

    def write(self, begin: int, values: Tensor) -> None:
        """Overwrites what begins there; values behind the end are passed over."""
        for part, low, high in self._spans(begin, values.numel()):
            if part is not None:
                part.copy_(values[low:high])

    def _spans(self, begin: int, length: int) -> Iterator[tuple[Tensor | None, int, int]]:
        """Pieces of the parts, and where each lies in the `length` bytes from `begin` on."""
        at, end = begin, min(begin + length, self.length)
        index = bisect_right(self._starts, begin) - 1
        while at < end:
            start, stop, part = self._starts[index], min(end, self._starts[index + 1]), self._parts[index]
            if at < stop:
                yield None if part is None else part[at - start : stop - start], at - begin, stop - begin
            at, index = stop, index + 1


@final
class Exchange:
    """One rank's end of a group; a rank on its own needs no processes.

    Args:
        group: None for the data group of `tpc`; before `tpc` is set up for the world.
        staging: Bytes that a round moves at most, of all ranks together.

    Attributes:
        group: None if this rank is on its own.
        rank: This rank in the group.
        size: Ranks in the group.

    Raises:
        TopologyError: It is no group, or one that this rank is not in.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, staging: int = _STAGING) -> None:
        self._staging = staging
        self.group = _default_group() if group is None else group
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            outside = self.group == dist.GroupMember.NON_GROUP_MEMBER
            what = "a group that this rank is not in" if outside else f"a {type(self.group).__name__}"
            raise TopologyError(f"group is {what}; pass a process group of this rank, such as tpc.get_group('data')")
        self.rank, self.size = (0, 1) if self.group is None else (self.group.rank(), self.group.size())

    def guarded(self, action: str) -> AbstractContextManager[None]:
        """Surrounds what waits for other ranks: where `tpc` is set up, a failure of one is an error on all.

        Args:
            action: The method that waits; "" for making the average.
        """
        return guarded_if_set_up(f"ShardedEMA.{action}" if action else "ShardedEMA")

    def together(self, action: str, look: Callable[[], Any]) -> list[Any]:
        """What `look` returns on every rank. Collective.

        Args:
            action: The method that asks, for messages to people.
            look: Returns what JSON can say.

        Raises:
            CheckpointError: It raised an exception on some rank.
        """
        cause: Exception | None = None
        with self.guarded(action):
            try:
                mine = ["", look()]
            except CheckpointError as error:
                cause, mine = error, [str(error), None]
            except Exception as error:  # or the others would wait: out of memory, what is no model, ...
                cause, mine = error, [f"{type(error).__name__}: {error}", None]
            found = [mine] if self.group is None or self.size == 1 else gather_json(mine, self.group)
        bad = {rank: text for rank, (text, _) in enumerate(found) if text}
        if not bad:
            return [value for _, value in found]
        rank, text = next(iter(bad.items()))
        if len({*bad.values()}) > 1 or len(bad) < self.size:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            text = f"on rank {rank} of the {self.size} ranks of the group{more}: {text}"
        raise CheckpointError(f"ShardedEMA: {action}: {text}" if action else f"ShardedEMA: {text}") from cause

    def gather(
        self, mine: Stream, lengths: Sequence[int], into: Callable[[int], Stream] | None, *, everyone: bool = False
    ) -> None:
        """Writes the streams of all ranks where they belong: on the first rank, or on all. Collective.

        Args:
            mine: This rank's stream.
            lengths: Of the streams of all ranks.
            into: Rank -> where its stream goes; needed where they arrive.
            everyone: They arrive on all ranks.
        """
        targets = [into(rank) for rank in range(self.size)] if into is not None else []
        for begin, chunk in self._rounds(lengths):
            own = torch.zeros(chunk, dtype=torch.uint8, device=self._device)
            mine.read(begin, own)
            if self.size == 1:
                rows = [own]
            else:
                rows = [torch.empty_like(own) for _ in range(self.size)] if targets else []
                if everyone:
                    dist.all_gather(rows, own, group=self.group)
                else:
                    dist.gather(own, rows or None, dst=self._first, group=self.group)
            for target, row in zip(targets, rows, strict=True):
                target.write(begin, row)

    def scatter(self, streams: Sequence[Stream], lengths: Sequence[int], into: Stream) -> None:
        """Writes to every rank the stream that the first rank has for it. Collective.

        Args:
            streams: Of all ranks; on the first rank.
            lengths: Of the streams of all ranks.
            into: Where this rank's goes.
        """
        for begin, chunk in self._rounds(lengths):
            rows = [torch.zeros(chunk, dtype=torch.uint8, device=self._device) for _ in streams]
            for stream, row in zip(streams, rows, strict=True):
                stream.read(begin, row)
            own = torch.empty(chunk, dtype=torch.uint8, device=self._device)
            dist.scatter(own, rows or None, src=self._first, group=self.group)
            into.write(begin, own)

    def _rounds(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each round begins, and its bytes of each rank."""
        longest, most = max(lengths), max(1, self._staging // self.size)
        for begin in range(0, longest, most):
            yield begin, min(most, longest - begin)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.group is None else communication_device(self.group)

    @property
    def _first(self) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, 0)


def _default_group() -> dist.ProcessGroup | None:
    if tpc._is_inited("global"):
        return tpc.get_group("data") if tpc._is_inited("data") else None
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
