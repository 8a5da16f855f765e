"""The modules' names in the traces of torch.profiler, whoever runs the profiler.

A call is a range on the way there. On the way back every autograd node that the call made is one, as the engine's own
event around a node would be cut by anything longer::

    forward     |  root                                             |
                  |  fc1          |  |  act       |  |  fc2       |
                    | aten::linear |   | aten::gelu |  | aten::linear |

    backward    | evaluate_function: AddmmBackward0 |   | evaluate_function: GeluBackward0 |
                  | fc2 (backward)                |       | act (backward)               |
                    | AddmmBackward0             |          | GeluBackward0             |

While no profiler runs, nothing is opened and no node is hooked: asking is all that a call or node costs, a tenth of a
microsecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import Any, final

import torch
from torch.autograd.graph import Node
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from torchdistpackage.tools.graph_nodes import is_leaf
from torchdistpackage.tools.module_calls import ModuleCall

__all__ = ["ModuleRanges", "backward_name", "profiler_runs"]


def profiler_runs() -> bool:
    """Whether a profiler records what this thread does.

    Example:
        >>> from torch.profiler import ProfilerActivity, profile
        >>> with profile(activities=[ProfilerActivity.CPU]):
        ...     during = profiler_runs()
        >>> profiler_runs(), during
        (False, True)
    """
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def backward_name(name: str) -> str:
    """What the ranges of a module are called in the backward pass.

    Example:
        >>> backward_name("layer1.0")
        'layer1.0 (backward)'
    """
    return f"{name} (backward)"


@dataclass(frozen=True)
class _NodeRange:
    """The range around a node that computes now; None where another hook on the same leaf has opened it."""

    leaf: int | None
    range: record_function | None


@final
class ModuleRanges:
    """Ranges that are open; a range ends with its call, even if the profiler has ended before."""

    def __init__(self) -> None:
        self._calls: dict[ModuleCall, record_function] = {}
        self._nodes: dict[int, list[_NodeRange]] = {}  # by thread: each device has one in the backward pass

    def start(self, call: ModuleCall) -> None:
        """Opens the range of a call, if a profiler runs."""
        if profiler_runs():
            self._calls[call] = _opened(call.name)

    def end(self, call: ModuleCall) -> None:
        """Closes it, if it was opened."""
        _close(self._calls.pop(call, None))

    def around(self, node: Node, call: ModuleCall) -> list[RemovableHandle]:
        """Has a range of the call around what a node computes in the backward pass, if a profiler runs now.

        Checkpointing calls modules again, and then their parameters' nodes are met again while they have hooks. So
        the hooks of a node close what was opened last, as hooks run in their order, and a leaf gets one range.

        Returns:
            The hooks, for you to remove.
        """
        if not profiler_runs():
            return []
        leaf = id(node.variable) if is_leaf(node) else None  # type: ignore[attr-defined]

        def start(*_: Any) -> None:
            opened = self._nodes.setdefault(get_ident(), [])
            same = leaf is not None and bool(opened) and opened[-1].leaf == leaf
            opened.append(_NodeRange(leaf, None if same else _opened(backward_name(call.name))))

        def end(*_: Any) -> None:
            opened = self._nodes.get(get_ident())
            if opened:
                _close(opened.pop().range)

        return [node.register_prehook(start), node.register_hook(end)]

    def forget(self) -> None:
        """Closes what nodes that failed have left open."""
        for opened in self._nodes.values():
            while opened:
                _close(opened.pop().range)
        self._nodes.clear()


def _opened(name: str) -> record_function:
    opened = record_function(name)
    opened.__enter__()  # type: ignore[no-untyped-call]
    return opened


def _close(opened: record_function | None) -> None:
    if opened is not None:
        opened.__exit__(None, None, None)
