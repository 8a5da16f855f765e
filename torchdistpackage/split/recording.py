"""What `tracer.py` and `exported.py` make, and what everything behind them works on: a forward as a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from torchdistpackage.split.operations import Ambient

__all__ = ["Recording"]


@dataclass(frozen=True)
class Recording:
    """A forward as a graph, in the order of execution.

    Attributes:
        graph: `node.meta` has `stack` (the opened modules whose forwards made it, each with the number of that call),
            `where` (file and line) and, where it is not the usual one, `ambient` (a context to run in). The output's
            argument is a flat tuple.
        values: What every node gave on the example; empty without one.
        changed: Node -> the nodes whose tensors it changed in place.
        constants: What else the forward uses, by the names of the nodes: tensors that are neither parameters nor
            buffers, and objects that cannot be written down in code.
        inputs: Structure of the bound arguments; leaves that are no tensors are in `fixed`.
        fixed: Place among the leaves of `inputs` -> the value that the recording holds for.
        output: Structure of what the forward returns.
        literals: Place among the leaves of `output` -> a value that is the same in each run.
        hidden_marks: Names of modules that are nodes and have called `pipe_split` inside.
        usual: The contexts around the forward.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    changed: dict[fx.Node, tuple[fx.Node, ...]]
    constants: dict[str, Any]
    inputs: pytree.TreeSpec
    fixed: dict[int, Any]
    output: pytree.TreeSpec
    literals: dict[int, Any]
    hidden_marks: frozenset[str]
    usual: Ambient
