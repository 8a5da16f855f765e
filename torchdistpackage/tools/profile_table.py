"""What the modules of a model cost, and the table of it, level by level: what to checkpoint first comes first.

The numbers come from `profile.py`; this file only knows how to order and show them, with every column in one unit, so
that rows of all levels can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

__all__ = ["ModelProfile", "ModuleCost", "report_prof", "sort_mem_time_ratio"]


@dataclass(frozen=True)
class ModuleCost:
    """What one module cost in one pass, all its calls together.

    Times and `kept` are given twice: of the whole module, and `_self` without the modules inside it. The own parts of
    all modules add up to the whole model (times that are medians of several runs do so roughly).

    Attributes:
        kind: Name of its class.
        parameters: Elements of its parameters, those of the modules inside included.
        calls: How often it was called; 0 if never. A call repeated by checkpointing is no call.
        forward: Seconds of the forward pass.
        backward: Seconds of the backward pass, what checkpointing computes again included; 0 if there was none.
        kept: Bytes that autograd keeps for the backward pass. Each storage counts once and whole, at the module that
            saved it first; parameters and buffers do not count.
        freed: Bytes of it that would not be kept if this module were checkpointed: without its inputs, and without
            what modules outside of it keep as well.
        output: Bytes of the tensors that it returned.

    Example:
        >>> ModuleCost("Linear", parameters=6, calls=1, forward=0.002, kept=4000, freed=3000).freed_per_second
        1500000.0
    """

    kind: str
    parameters: int = 0
    calls: int = 0
    forward: float = 0.0
    forward_self: float = 0.0
    backward: float = 0.0
    backward_self: float = 0.0
    kept: int = 0
    kept_self: int = 0
    freed: int = 0
    output: int = 0

    @classmethod
    def of(cls, module: nn.Module, **spent: float) -> ModuleCost:
        """The cost of a module that has spent this much.

        Example:
            >>> ModuleCost.of(nn.Linear(2, 3), calls=1).parameters
            9
        """
        parameters = sum(parameter.numel() for parameter in module.parameters())
        return cls(type(module).__name__, parameters, **spent)  # type: ignore[arg-type]

    @property
    def freed_per_second(self) -> float:
        """Bytes that a checkpoint frees for each second that it computes again: the larger, the better."""
        return self.freed / self.forward if self.forward else 0.0


@final
class ModelProfile(dict[str, ModuleCost]):
    """The cost of every module by its name; the model's own is "root". `str` is the table.

    Args:
        costs: What is known already.
        topn: As for `report_prof`, for `str`; likewise the others.
        max_depth: Levels shown.
        min_mem: MB that a row must keep to be shown.
        sort: Whether to sort and filter.
        operations: A table of the operations that took longest, which `str` puts below the modules; an attribute, too.

    Example:
        >>> mb = 10**6
        >>> net = ModuleCost("Net", 30, 1, 0.010, 0.002, kept=90 * mb, freed=80 * mb, output=4 * mb)
        >>> block = ModuleCost("Block", 10, 1, 0.008, 0.008, kept=70 * mb, freed=60 * mb, output=2 * mb)
        >>> linear = ModuleCost("Linear", 20, 1, 0.002, 0.002, kept=20 * mb, output=8 * mb)
        >>> costs = {"root": net, "fc": linear, "layer1.0": block}
        >>> print(ModelProfile(costs, min_mem=0))
        module    kind    calls  params  forward        self   kept        freed  per time  output
                                            [ms]     %  [ms]   [MB]     %   [MB]   [MB/ms]    [MB]
        level 0
        root      Net         1      30    10.00  100%  2.00  90.00  100%  80.00      8.00    4.00
        level 1
        layer1.0  Block       1      10     8.00   80%  8.00  70.00   78%  60.00      7.50    2.00
        fc        Linear      1      20     2.00   20%  2.00  20.00   22%   0.00      0.00    8.00
        kept: for the backward pass; freed: of that, what checkpointing the module saves, for its forward time
    """

    def __init__(
        self,
        costs: Mapping[str, ModuleCost] | None = None,
        *,
        topn: int = 20,
        max_depth: int = 5,
        min_mem: float = 50,
        sort: bool = True,
        operations: str | None = None,
    ) -> None:
        super().__init__(costs or {})
        self.topn, self.max_depth, self.min_mem, self.sort = topn, max_depth, min_mem, sort
        self.operations = operations
        self._removers: list[Callable[[], None]] = []

    def on_remove(self, remover: Callable[[], None]) -> None:
        """Has `remove` call this, too."""
        self._removers.append(remover)

    def remove(self) -> None:
        """Takes the hooks off the models that `register_profile_hooks` fills this from; the costs stay."""
        while self._removers:
            self._removers.pop()()

    def __repr__(self) -> str:
        root = self.get("root")
        told = "" if root is None else f": {root.forward * 1000:.3g} ms forward, {root.kept / 1e6:.3g} MB kept"
        return f"<ModelProfile of {len(self)} modules{told}>"

    def __str__(self) -> str:
        levels: dict[int, list[str]] = {}
        for name, cost in self.items():
            if cost.calls:
                levels.setdefault(_level(name), []).append(name)
        shown = {level: self._chosen(names) for level, names in sorted(levels.items()) if level <= self.max_depth}
        columns = self._columns([name for names in shown.values() for name in names])
        lines = [_line(columns, [column.title for column in columns]), _line(columns, [c.unit for c in columns])]
        for level, names in shown.items():
            lines.append(f"level {level}" + self._left_out(levels[level], names))
            lines.extend(_line(columns, [column.cells[name] for column in columns]) for name in names)
        lines += self._notes(max(levels, default=0))
        if self.operations is not None:
            lines += ["", "operations by their own time, in a run under torch.profiler", self.operations]
        return "\n".join(lines)

    @property
    def _keeps(self) -> bool:
        """Whether anything is kept; if not, nothing can be freed, and time is what is left to sort by."""
        return any(cost.kept for cost in self.values())

    def _chosen(self, names: list[str]) -> list[str]:
        """The rows of a level, in their order."""
        if not self.sort or names == ["root"]:
            return names
        if not self._keeps:
            return sorted(names, key=lambda name: -self[name].forward)[: self._most]
        large = [name for name in names if self[name].kept >= self.min_mem * 1e6]
        return sorted(large, key=lambda name: (-self[name].freed_per_second, -self[name].kept))[: self._most]

    @property
    def _most(self) -> int | None:
        return self.topn if self.topn >= 0 else None

    def _left_out(self, names: list[str], shown: list[str]) -> str:
        """Why some rows of a level are not there."""
        left = [self[name].kept for name in names if name not in shown]
        if not left:
            return ""
        if self._keeps and max(left) < self.min_mem * 1e6:
            largest = f"{max(left) / 1e6:.3g} MB" if max(left) else "nothing"
            return f" ({len(left)} of {len(names)} keep less than min_mem={self.min_mem:g} MB: {largest} at most)"
        small = f" and min_mem={self.min_mem:g} MB" if self._keeps else ""
        return f" ({len(shown)} of {len(names)}, by topn={self.topn}{small})"

    def _columns(self, names: Sequence[str]) -> list[_Column]:
        costs = {name: self[name] for name in names}
        whole = self.get("root", ModuleCost(""))
        seconds = _unit(_SECONDS, [cost.forward for cost in costs.values()])
        size = _unit(_BYTES, [max(cost.kept, cost.output) for cost in costs.values()])
        parameters = _unit(_THOUSANDS, [cost.parameters for cost in costs.values()])
        columns = [
            _Column("module", "", {name: name for name in names}, is_text=True),
            _Column("kind", "", {name: cost.kind for name, cost in costs.items()}, is_text=True),
            _Column("calls", "", {name: str(cost.calls) for name, cost in costs.items()}),
            _numbers("params", parameters, {name: cost.parameters for name, cost in costs.items()}),
            _numbers("forward", seconds, {name: cost.forward for name, cost in costs.items()}),
            _shares({name: cost.forward for name, cost in costs.items()}, whole.forward),
            _numbers("self", seconds, {name: cost.forward_self for name, cost in costs.items()}),
        ]
        if any(cost.backward for cost in costs.values()):
            columns += [
                _numbers("backward", seconds, {name: cost.backward for name, cost in costs.items()}),
                _numbers("self", seconds, {name: cost.backward_self for name, cost in costs.items()}),
            ]
        if self._keeps:
            per_time = {name: cost.freed_per_second for name, cost in costs.items()}
            columns += [
                _numbers("kept", size, {name: cost.kept for name, cost in costs.items()}),
                _shares({name: cost.kept for name, cost in costs.items()}, whole.kept),
                _numbers("freed", size, {name: cost.freed for name, cost in costs.items()}),
                _numbers("per time", _Unit(1e9, "MB/ms"), per_time),
            ]
        return [*columns, _numbers("output", size, {name: cost.output for name, cost in costs.items()})]

    def _notes(self, deepest: int) -> list[str]:
        notes = []
        if deepest > self.max_depth:
            deeper = f"level {deepest} is" if deepest == self.max_depth + 1 else f"levels to {deepest} are"
            notes.append(f"{deeper} not shown: max_depth={self.max_depth}")
        idle = self._idle()
        if idle:
            notes.append(f"never called as modules: {', '.join(_alike(idle))}")
        if self._keeps:
            notes.append(
                "kept: for the backward pass; freed: of that, what checkpointing the module saves, for its forward time"
            )
        elif any(cost.calls for cost in self.values()):
            notes.append("nothing is kept for a backward pass: are gradients on, and does anything require one?")
        return notes

    def _idle(self) -> list[str]:
        """Modules that were not called, nor any inside them, without those inside another one of these."""
        busy = {"root"}
        for name, cost in self.items():
            parts = name.split(".") if cost.calls else []
            busy.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return [name for name in self if name not in busy and (name.rpartition(".")[0] or "root") in busy]


def report_prof(
    infos: Mapping[str, ModuleCost], topn: int = 20, max_depth: int = 5, min_mem: float = 50, sort: bool = True
) -> ModelProfile:
    """Prints what modules cost, level by level; the first rows of a level are the first to checkpoint.

    A level is how deep a module is in the model, where numbers do not count: `layer1` and `layer1.0` are of level 1,
    `layer1.0.conv1` is of level 2, and the model itself, `root`, of level 0. Rows are sorted by `freed_per_second`.
    Where nothing is kept (under `torch.no_grad`, in a frozen model) they are sorted by time, all of them.

    Args:
        infos: What `register_profile_hooks` or `get_model_profile` has returned. Operations in it are printed as they
            are.
        topn: Rows shown a level; all of them, if it is negative.
        max_depth: The deepest level shown.
        min_mem: Modules that keep less than this many MB (10**6 bytes) are left out.
        sort: Whether to sort and to leave rows out; without, all modules are shown as they are in the model.

    Returns:
        The costs, whose `str` is what was printed.

    Raises:
        ValueError: Nothing was measured.

    Example:
        >>> profile = report_prof({"root": ModuleCost("Net", calls=1, forward=0.002, output=3_000_000)})
        module  kind  calls  params  forward        self  output
                                        [ms]     %  [ms]    [MB]
        level 0
        root    Net       1       0     2.00  100%  0.00    3.00
        nothing is kept for a backward pass: are gradients on, and does anything require one?
    """
    if not infos:
        raise ValueError("nothing was measured: run the model after register_profile_hooks, then report")
    operations = infos.operations if isinstance(infos, ModelProfile) else None
    profile = ModelProfile(infos, topn=topn, max_depth=max_depth, min_mem=min_mem, sort=sort, operations=operations)
    sys.stdout.write(f"{profile}\n")
    return profile


sort_mem_time_ratio = report_prof


def _level(name: str) -> int:
    """How deep a module is; the numbers in its name are places in a list, not levels."""
    if name == "root":
        return 0
    return 1 + sum(not part.isdigit() for part in name.split(".")[1:])


def _alike(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers only become one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return [of[0] if len(of) == 1 else f"{pattern} ({len(of)})" for pattern, of in groups.items()]


@dataclass(frozen=True)
class _Unit:
    scale: float
    name: str


_THOUSANDS = (_Unit(1, ""), _Unit(1e3, "k"), _Unit(1e6, "M"), _Unit(1e9, "G"))
_SECONDS = (_Unit(1e-6, "us"), _Unit(1e-3, "ms"), _Unit(1, "s"))
_BYTES = (_Unit(1, "B"), _Unit(1e3, "kB"), _Unit(1e6, "MB"), _Unit(1e9, "GB"))


def _unit(units: Sequence[_Unit], numbers: Sequence[float]) -> _Unit:
    """The largest in which the largest number is 1 or more."""
    largest = max(numbers, default=0)
    return max((unit for unit in units if largest >= unit.scale), key=lambda unit: unit.scale, default=units[0])


@dataclass(frozen=True)
class _Column:
    """Titles and cells; the cells by the name of the module."""

    title: str
    unit: str
    cells: Mapping[str, str]
    is_text: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.title, self.unit, *self.cells.values())))


def _numbers(title: str, unit: _Unit, numbers: Mapping[str, float]) -> _Column:
    """A column of numbers with as many decimals as the largest leaves room for; what is smaller is not 0."""
    largest = max(numbers.values(), default=0.0) / unit.scale
    decimals = 0 if unit.scale == 1 and unit.name in ("", "B") else 0 if largest >= 1000 else 1 if largest >= 100 else 2
    smallest = 10**-decimals

    def cell(number: float) -> str:
        return f"<{smallest:g}" if 0 < number / unit.scale < smallest / 2 else f"{number / unit.scale:.{decimals}f}"

    unit_text = f"[{unit.name}]" if unit.name else ""
    return _Column(title, unit_text, {name: cell(number) for name, number in numbers.items()})


def _shares(numbers: Mapping[str, float], whole: float) -> _Column:
    return _Column("", "%", {name: f"{number / whole:.0%}" if whole else "-" for name, number in numbers.items()})


def _line(columns: Sequence[_Column], cells: Sequence[str]) -> str:
    """One line of the table."""
    padded = [
        cell.ljust(column.width) if column.is_text else cell.rjust(column.width)
        for cell, column in zip(cells, columns, strict=True)
    ]
    return "  ".join(padded).rstrip()
