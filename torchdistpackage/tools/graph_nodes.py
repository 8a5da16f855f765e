"""Which call of which module made which nodes of the autograd graph.

Backward hooks of modules cannot tell: `register_full_backward_hook` puts an identity around the module, with which
layers that work in place no longer run, and a gradient that several modules feed is seen only once it is summed up.
Nodes know exactly what came in and went out. They are found by walking back from a call's inputs and outputs to nodes
that an earlier call made::

    block:  y = norm(x);  z = y * 2;  attn(z)
                |             |          |
    walked at   norm's end    attn's     attn's end
    belongs to  norm          start:     attn
                              block

Only what is between the inputs and outputs of modules is found, and that is all that a backward pass runs, unless a
module keeps a tensor and hands it out elsewhere: then the module that hands it out owns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias, final

import torch
from torch.autograd.graph import Node

__all__ = ["GraphNodes", "is_leaf"]

Tensors: TypeAlias = Iterable[torch.Tensor]


def is_leaf(node: Node) -> bool:
    """Whether a node accumulates the gradient of a leaf, in which case it has a `variable`."""
    return type(node).__name__ == "AccumulateGrad"  # its class has no public name


@final
class GraphNodes:
    """The nodes met so far. They keep their graph alive: `forget` them when the outermost module is done.

    Example:
        >>> nodes = GraphNodes()
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = x * 2
        >>> nodes.skip([y])
        >>> z = y.exp().sum()
        >>> [node.name() for node in nodes.new([z])]
        ['SumBackward0', 'ExpBackward0']
        >>> list(nodes.new([z]))
        []
    """

    def __init__(self) -> None:
        self._met: set[Node] = set()

    def new(self, tensors: Tensors) -> Iterator[Node]:
        """Nodes behind tensors that were not met before, which now they are."""
        pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node not in self._met:
                self._met.add(node)
                yield node
                pending.extend(behind for behind, _ in node.next_functions if behind is not None)

    def skip(self, tensors: Tensors) -> None:
        """What made these tensors is nobody's, and what is behind it is not walked to."""
        self._met.update(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)

    def forget(self) -> None:
        """Lets go of the graph."""
        self._met.clear()
