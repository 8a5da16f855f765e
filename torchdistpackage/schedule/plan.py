"""A plan: the full list of what every rank does in one step. Data, not code.

One program runs it (`runtime/executor.py`), one judge proves it (`verify.py`), and the same object is drawn, exported
and printed when something fails. As text, 1F1B on two ranks with three micro-batches::

    rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
    rank 1: 1F0 1B0 1F1 1B1 1F2 1B2

As CSV the same without the names: one line a rank, one cell an action, empty cells allowed. The files that
`torch.distributed.pipelining` writes read as they are: an overlapped pair `(2F1;5B0)OVERLAP_F_B` is its two actions in
that order, and what torch notes of sharding and of waiting has no counterpart here. Skips belong to the model's cut,
not to the order of actions: they are in neither.
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.routing import Skips, check_skips, skips_of

__all__ = ["Plan"]

ActionLists = tuple[tuple[Action, ...], ...]

_COMMUNICATION = (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B)
_OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_FOREIGN = re.compile(r"\d+(UNSHARD|RESHARD|WAIT_SEND_[FB]|WAIT_REDUCE_GRAD)\d*")


@dataclass(frozen=True)
class Plan:
    r"""Placement plus one action list a rank.

    Attributes:
        name: The schedule's name, for people and for the ranks to compare.
        placement: Which rank owns which stage.
        num_microbatches: m, the micro-batches of one step.
        actions: For every rank, what it does, in order.
        skips: Every (from, to) of stages over which values go past the stages between, sorted; see `routing.py`.
            No action stands for them: they leave right behind the forward (a gradient: the backward) that makes them,
            and are taken right before the one that uses them.

    Example:
        >>> plan = Plan.from_text("rank 0: 0F0 0B0\nrank 1: 1F0 1B0", name="mine")
        >>> plan.num_microbatches, plan.forward_only, plan.placement.owners
        (1, False, (0, 1))
        >>> Plan.from_csv(plan.to_csv(), name="mine") == plan
        True
    """

    name: str
    placement: Placement
    num_microbatches: int
    actions: ActionLists
    skips: Skips = ()

    def __hash__(self) -> int:
        # Two plans of one name and size are almost always the same object: hashing 100,000 actions buys nothing.
        return hash((self.name, self.placement, self.num_microbatches, self.forward_only))

    @cached_property
    def forward_only(self) -> bool:
        """Whether the plan has no backward at all (evaluation)."""
        backwards = (Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD)
        return not any(action.op in backwards for row in self.actions for action in row)

    @cached_property
    def has_communication(self) -> bool:
        """Whether there is any send or receive beside the compute actions."""
        return any(action.op in _COMMUNICATION for row in self.actions for action in row)

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of every action of every rank, the same in every process."""
        crc = zlib.crc32(repr(self.placement.owners).encode())
        for row in self.actions:
            numbers = array("q")
            for stage, op, i in row:
                numbers.extend((stage, op.number, -1 if i is None else i))
            crc = zlib.crc32(numbers.tobytes(), crc)
        return crc

    @cached_property
    def signature(self) -> str:
        """What two ranks must agree on before they exchange the first byte, readable in an error message."""
        kind = "forward only" if self.forward_only else "training"
        return (
            f"schedule {self.name!r}, {kind}, {self.num_microbatches} micro-batches, {self.placement.num_ranks} ranks, "
            f"{self.placement.num_stages} stages, checksum {self.fingerprint:08x}"
            + (f", skips {', '.join(f'{a}>{b}' for a, b in self.skips)}" if self.skips else "")
        )

    def with_actions(self, actions: Iterable[Iterable[Action]]) -> Plan:
        """The same plan with other action lists: what every pass of `lowering.py` returns."""
        return replace(self, actions=tuple(map(tuple, actions)))

    def with_skips(self, skips: Iterable[Iterable[int]]) -> Plan:
        r"""The same plan for a model with skips; an empty table takes them away.

        Args:
            skips: Pairs (from, to) of stages with to > from + 1.

        Raises:
            ScheduleError: The table does not fit the plan's stages.

        Example:
            >>> Plan.from_text("0F0\n1F0\n2F0").with_skips([(0, 2)]).skips
            ((0, 2),)
        """
        table = skips_of(skips)
        check_skips(table, self.placement.num_stages)
        return self if table == self.skips else replace(self, skips=table)

    def to_text(self, *, mark: tuple[int, int] | None = None, window: int | None = None) -> str:
        """One line a rank.

        Args:
            mark: (rank, index) of an action to point at, written `>>2F0<<`.
            window: Show only this many actions on each side of the mark's index.

        Returns:
            The grid; without mark and window `from_text` reads it back.
        """
        lines = []
        for rank, row in enumerate(self.actions):
            cells = [str(action) for action in row]
            if mark is not None and rank == mark[0] and mark[1] < len(cells):
                cells[mark[1]] = f">>{cells[mark[1]]}<<"
            if window is not None and mark is not None:
                cells = _around(cells, mark[1], window)
            lines.append(f"rank {rank}: {' '.join(cells)}".rstrip())
        return "\n".join(lines)

    @classmethod
    def from_text(cls, text: str, *, name: str = "custom") -> Plan:
        """Reads the lines of `to_text` back.

        Raises:
            ScheduleError: A word is not an action, ranks are not 0, 1, 2, ..., or a stage sits on two ranks.
        """
        rows: list[list[Action]] = []
        for line in filter(str.strip, text.splitlines()):
            match = re.fullmatch(r"\s*(?:rank\s+(\d+)\s*:)?(.*)", line)
            assert match is not None
            if match[1] is not None and int(match[1]) != len(rows):
                raise ScheduleError(f"expected the line of rank {len(rows)}, found {line.strip()!r}")
            rows.append([action for word in match[2].split() for action in _read_cell(word)])
        return cls._from_rows(rows, name)

    def to_csv(self) -> str:
        """One line a rank, one cell an action."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([str(action) for action in row] for row in self.actions)
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, name: str = "csv") -> Plan:
        """Reads a plan from CSV, compute only or with communication; empty cells are idle time and are dropped.

        Raises:
            ScheduleError: A cell is not an action, or a stage sits on two ranks.
        """
        rows = [[a for cell in row for a in _read_cell(cell)] for row in csv.reader(io.StringIO(text)) if row]
        return cls._from_rows(rows, name)

    @classmethod
    def _from_rows(cls, rows: list[list[Action]], name: str) -> Plan:
        owner: dict[int, int] = {}
        for rank, row in enumerate(rows):
            for action in row:
                if owner.setdefault(action.stage, rank) != rank:
                    raise ScheduleError(f"stage {action.stage} is used by rank {owner[action.stage]} and rank {rank}")
        if sorted(owner) != list(range(len(owner))) or not owner:
            raise ScheduleError(f"stages must be numbered 0, 1, 2, ...; the plan has {sorted(owner)}")
        placement = Placement(len(rows), tuple(owner[stage] for stage in range(len(owner))))
        count = 1 + max(action.microbatch or 0 for row in rows for action in row)
        return cls(name, placement, count, tuple(map(tuple, rows)))


def _read_cell(cell: str) -> list[Action]:
    """The actions of one cell: usually one, none in an idle cell, two in an overlapped pair."""
    cell = cell.strip()
    pair = _OVERLAPPED.fullmatch(cell)
    parts = pair[1].split(";") if pair else [cell]
    return [Action.parse(part) for part in parts if part.strip() and not _FOREIGN.fullmatch(part.strip())]


def _around(cells: list[str], index: int, window: int) -> list[str]:
    low, high = max(0, index - window), index + window + 1
    return ["..."] * (low > 0) + cells[low:high] + ["..."] * (high < len(cells))
