"""What was done to tensors while a model was built, as data; and doing it again for a few of them.

::

    entry                                    wanted: w2      memory held while replaying
    0  s0 = empty        w1                  -
    1  s0: uniform_      w1   draws          drawn, dropped  s0
    2  s1 = empty        w2                  -
    3  s1: uniform_      w2   draws          drawn, dropped       s1      (4 overwrites all of it)
    4  s1: normal_       w2   draws          drawn                s1
    5  s1: mul_ 0.02     w2                  done                 s1
    6  s0: normal_       w1   draws          drawn, dropped  s0

Tensors are named by storage and geometry, so views, `detach`, `.data` and shared parameters need no entries. Random
numbers are drawn for all, in order, or the generator would not be where it was; everything else is done only for values
that somebody reads later. Neighbours: `init_recorder.py` writes the tape, `deferred_init.py` is the face.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Entry", "NotRepeatable", "Region", "Tape", "Work"]


class NotRepeatable(Exception):
    """The tape does not say what building the model does; it must be built for real. Its text says why."""


@dataclass(frozen=True)
class Region:
    """A tensor: the number of its storage, and where in it."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, storage: int) -> Region:
        """Where a tensor is in its storage."""
        return cls(storage, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The same place in another storage."""
        device = storage.device
        return torch.empty(0, dtype=self.dtype, device=device).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False)
class Entry:
    """One operation that wrote memory.

    Attributes:
        function: The operator.
        args: Its arguments, with regions in the place of tensors; other tensors are constants.
        kwargs: Its keyword arguments.
        made: Regions of its results that have storages of their own; None for a result that has not.
        reads: Storages whose values it needs.
        writes: Storages that it changes or makes.
        overwrites: Those of them of which no earlier value is left.
        random: Whether it draws from the generator.
        state: What the generator was set to before it: a state, the number of the entry behind which that state was
            seen (-1: at the start), or None for "left alone".
        default_dtype: Torch's at that time.
    """

    function: Any
    args: Any
    kwargs: Any
    made: tuple[Region | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    overwrites: frozenset[int]
    random: bool
    state: Tensor | int | None
    default_dtype: torch.dtype


@final
@dataclass(eq=False)
class Tape:
    """All that was recorded.

    The first replay has to draw all random numbers to learn where the generator is before each of them. From then on it
    is known, and only those that are wanted are drawn.

    Attributes:
        start: The generator's state at the start.
        entries: What was done, in order.
        sizes: The bytes of each storage.
        end: As `Entry.state`, for what comes after the last entry.
    """

    start: Tensor
    entries: list[Entry] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    end: Tensor | int | None = None
    _states: _States = field(default_factory=lambda: _States())

    def replay(self, wanted: Collection[int], device: torch.device) -> dict[int, torch.UntypedStorage]:
        """Does it again for some storages; torch's CPU generator ends where building the whole model would leave it.

        Args:
            wanted: Numbers of storages.
            device: Where their values go, one storage at a time, as soon as nothing writes them any more.

        Raises:
            NotRepeatable: An operation gave something else this time.
        """
        done = self._do(self.plan(wanted), device)
        torch.default_generator.set_state(self._state(self.end, len(self._states.rows)))
        for storage in set(wanted) - set(done):  # nobody has ever written it
            done[storage] = _moved(_zeros(self.sizes[storage]), device)
        return done

    def plan(self, wanted: Collection[int]) -> Work:
        """What `replay` is going to do."""
        return Work.of(self, wanted, draws_from=self._states.known)

    def peek(self, region: Region) -> Look:
        """The present value of a tensor while the tape is being written; the generator stays where it is."""
        work = Work.of(self, {region.storage}, draws_from=len(self.entries))
        if any(self.entries[number].random and number >= self._states.known for number in work.frees):
            work = Work.of(self, {region.storage}, draws_from=self._states.known)
        state = torch.default_generator.get_state()
        try:
            done = self._do(work, torch.device("cpu"))
        finally:
            torch.default_generator.set_state(state)
        storage = done.get(region.storage)
        return Look(region.on(_zeros(self.sizes[region.storage]) if storage is None else storage), len(work.frees))

    def _do(self, work: Work, device: torch.device) -> dict[int, torch.UntypedStorage]:
        held: dict[int, torch.UntypedStorage] = {}
        done: dict[int, torch.UntypedStorage] = {}
        default, states = torch.get_default_dtype(), self._states
        states.make_room(sum(entry.random for entry in self.entries[states.known :]), self.start)
        try:
            with torch.no_grad():
                for number in sorted(work.frees):
                    entry = self.entries[number]
                    if entry.random:
                        row = states.rows.setdefault(number, len(states.rows))
                        torch.default_generator.set_state(self._state(entry.state, row))
                    _run(entry, held, self.sizes)
                    if entry.random and number >= states.known:
                        states.behind[row] = torch.default_generator.get_state()
                    for storage in work.frees[number]:
                        value = held.pop(storage)
                        if work.last.get(storage) == number:
                            done[storage] = _moved(value, device)
        finally:
            torch.set_default_dtype(default)
        if work.draws_from == states.known:
            states.known = len(self.entries)
        return done

    def _state(self, state: Tensor | int | None, row: int) -> Tensor:
        """The generator's state, where it was set to one, or left alone behind the draw before this one."""
        if isinstance(state, Tensor):
            return state
        before = row - 1 if state is None else self._states.rows.get(state, -1)
        return self.start if before < 0 else self._states.behind[before].clone()  # set_state takes no views


@final
class _States:
    """The generator's states behind the draws, in one piece of memory.

    Small pieces would lie between the large ones that are given back all the time, and these could not be used again:
    it made a process several times as large.

    Attributes:
        known: The states of all entries before this one are known.
        rows: The number of an entry that draws -> its row.
        behind: (rows, bytes of a state)
    """

    def __init__(self) -> None:
        self.known = 0
        self.rows: dict[int, int] = {}
        self.behind = torch.empty(0, 0, dtype=torch.uint8)

    def make_room(self, draws: int, like: Tensor) -> None:
        """Gets memory for more of them."""
        needed = len(self.rows) + draws
        if needed > len(self.behind):
            behind = torch.empty(2 * needed, like.numel(), dtype=torch.uint8)
            if self.rows:
                behind[: len(self.rows)] = self.behind[: len(self.rows)]
            self.behind = behind


@dataclass(frozen=True)
class Look:
    """A value, and how many entries had to be done again for it."""

    value: Tensor
    entries: int


@dataclass(frozen=True)
class Work:
    """What a replay does.

    Attributes:
        frees: The number of each entry that is run -> the storages that are not needed behind it.
        last: Wanted storage -> the last of those entries that touches it: behind it, its value is handed over.
        draws_from: From this entry on all random numbers are drawn.
    """

    frees: Mapping[int, set[int]]
    last: Mapping[int, int]
    draws_from: int

    @classmethod
    def of(cls, tape: Tape, wanted: Collection[int], *, draws_from: int) -> Work:
        """Goes backwards over the tape with the set of storages whose values somebody is going to read."""
        live, frees, last = set(wanted), dict[int, set[int]](), dict[int, int]()
        for number in range(len(tape.entries) - 1, -1, -1):
            entry = tape.entries[number]
            if not (entry.writes & live or (entry.random and number >= draws_from)):
                continue
            touched = entry.reads | entry.writes
            ends = {storage for storage in touched if storage in wanted and storage not in last}
            last.update(dict.fromkeys(ends, number))
            frees[number] = {storage for storage in touched if storage not in live} | ends
            live -= entry.overwrites
            live |= entry.reads
        return cls(frees, last, draws_from)


def _run(entry: Entry, held: dict[int, torch.UntypedStorage], sizes: list[int]) -> None:
    for storage in (entry.reads | entry.writes) - {region.storage for region in entry.made if region}:
        if storage not in held:  # written before anybody reads it
            held[storage] = torch.empty(sizes[storage], dtype=torch.uint8).untyped_storage()
    if torch.get_default_dtype() is not entry.default_dtype:
        torch.set_default_dtype(entry.default_dtype)
    args, kwargs = tree_map_only(Region, lambda region: region.on(held[region.storage]), (entry.args, entry.kwargs))
    results = [result for result in tree_leaves(entry.function(*args, **kwargs)) if isinstance(result, Tensor)]
    if len(results) != len(entry.made):
        raise NotRepeatable(f"{entry.function} gave {len(results)} tensors, and {len(entry.made)} without memory")
    for region, result in zip(entry.made, results, strict=True):
        if region is None:
            continue
        fresh = result.untyped_storage()
        if Region.of(result, region.storage) != region or fresh.nbytes() < sizes[region.storage]:
            raise NotRepeatable(
                f"{entry.function} gave a tensor {tuple(result.shape)} with strides {result.stride()}, and "
                f"{region.size} with strides {region.stride} without memory"
            )
        if "empty" in entry.function.overloadpacket.__name__:
            _bytes(fresh).zero_()  # what nobody fills is the same on all ranks
        held[region.storage] = fresh


def _moved(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    return storage if device.type == "cpu" else _bytes(storage).to(device).untyped_storage()


def _zeros(size: int) -> torch.UntypedStorage:
    return torch.zeros(size, dtype=torch.uint8).untyped_storage()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
