r"""The backward in two halves: the gradient of the stage's input now (I), that of its weights later (W).

The graph that autograd recorded is cut, not the user's code. A node on the way to the input that also leads to
parameters is where the halves part::

    loss <- Addmm_2 <- Relu <- Addmm_1 <- input       I: runs Addmm_2, Relu, Addmm_1 for their input only, and keeps
              \                  \                       the gradient that arrives at each Addmm
               T <- weight_2      T <- weight_1       W: runs each Addmm again with that gradient, for its weight only

The engine computes only what it is asked for, so that no product is computed twice: a matrix product or a convolution
has one formula for its input and another for its weight. Everything else runs with I, exactly once, as in a whole
backward:

- parameters of nodes that compute all their gradients together (normalisation, custom `autograd.Function`\ s);
- parameters that are reached over two nodes (a weight used twice, a module called twice): their sum has one order;
- nodes inside of non-reentrant checkpointing: asking them twice would run the forward twice.

Where nothing can be put off, or where the engine must not be asked for parts (reentrant checkpointing, compiled
graphs, fully_shard), the whole backward runs as I and W does nothing; the executor counts that.

Sources: the split is that of Qi et al., "Zero Bubble Pipeline Parallelism", 2023; cutting it out of the recorded graph
rather than out of the layers is what makes it hold for any module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from torchdistpackage.runtime.backward import Roots, beginning, run_backward

__all__ = ["Cut", "PutOff", "find_cut"]

# One formula for the input, another for the weight: asking for them one after the other computes nothing twice.
_SEPARABLE = frozenset(
    {
        "AddbmmBackward",
        "AddmmBackward",
        "AddmvBackward",
        "BaddbmmBackward",
        "BmmBackward",
        "ConvolutionBackward",
        "ConvolutionOverrideableBackward",
        "GroupedMmBackward",
        "LinearBackward",
        "MkldnnConvolutionBackward",
        "MkldnnLinearBackward",
        "MmBackward",
        "MvBackward",
        "SlowConvTranspose2DBackward",
        "ThnnConv2DBackward",
    }
)
# Custom functions that forbid parts (reentrant checkpointing), free what a second part needs (compiled graphs), or take
# the end of the input's gradient for the end of the backward (fully_shard).
_WHOLE = ("Checkpoint", "Compiled", "RegisterPostBackward")
_ACCUMULATE: type = torch._C._functions.AccumulateGrad
_SavedTensor: type = torch._C._autograd.SavedTensor


class PutOff:
    """One node whose weight gradients wait, with the gradient that arrived at it.

    Serves as the node's pre-hook: in I it keeps what comes, in W it hands out the same, so that hooks of the user's
    that change gradients count once.
    """

    __slots__ = ("before", "gradients", "node", "parameters")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.parameters: list[Tensor] = []
        self.before: list[Node] = []  # when a gradient arrives here they have run, for good
        self.gradients: tuple[Tensor | None, ...] | None = None

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """Keeps the gradients the first time, and replaces them by the kept ones the second time."""
        if self.gradients is None:
            self.gradients = gradients
            _free(self.before)
            self.before = []
            return None
        return self.gradients

    @property
    def is_reached(self) -> bool:
        """Whether a gradient came by: not if nothing after the node used what it made."""
        return self.gradients is not None and self.gradients[0] is not None

    def run(self) -> None:
        """Computes and accumulates the weight gradients. The node's memory is free afterwards."""
        if self.gradients is None or self.gradients[0] is None:
            del self.node
            return
        run_backward(Roots((GradientEdge(self.node, 0),), (self.gradients[0],)), inputs=tuple(self.parameters))
        del self.node  # it holds this hook: the circle would keep the graph until the garbage collector comes


class Cut:
    """Where a recorded graph parts.

    Attributes:
        put_off: The nodes whose weights wait.
        at_once: Parameters whose gradient belongs to I.
        done: Nodes that have run with I, for good.
    """

    __slots__ = ("at_once", "done", "put_off")

    def __init__(self, put_off: list[PutOff], at_once: list[Tensor], done: list[Node]) -> None:
        self.put_off, self.at_once, self.done = put_off, at_once, done

    def free(self) -> None:
        """Comes after I: lets go of what its nodes have saved and W does not need."""
        _free(self.done)
        self.done = []


def find_cut(roots: Sequence[Any], leaves: Sequence[Tensor]) -> Cut | str:
    """Looks where the graph of one micro-batch can be cut.

    Cost: about 2 us a node, once for each micro-batch: a graph is new each time, and one that was cut by the picture of
    an earlier one would be wrong as soon as the user's code takes another branch.

    Args:
        roots: What the backward starts from.
        leaves: The stage's inputs that want a gradient.

    Returns:
        The cut, or the reason why the backward runs whole, in words.
    """
    start = [root.node if isinstance(root, GradientEdge) else root.grad_fn or beginning(root).node for root in roots]
    inputs = {id(leaf) for leaf in leaves}
    edges: dict[Node, list[Node]] = {}
    to_input: dict[Node, bool] = {}
    stack: list[Node] = list(start)
    while stack:  # depth first, children before parents
        node = stack[-1]
        if node in edges:
            stack.pop()
            if node not in to_input:
                to_input[node] = any(to_input[child] for child in edges[node])
            continue
        children = edges[node] = [child for child, _ in node.next_functions if child is not None]
        if not children:
            to_input[node] = type(node) is _ACCUMULATE and id(_leaf(node)) in inputs
            stack.pop()
            continue
        if isinstance(node, BackwardCFunction) and type(node).__name__.startswith(_WHOLE):
            return f"its graph holds {type(node).__name__}, which can only run as a whole"
        stack.extend(child for child in children if child not in edges)
    return _cut(start, edges, to_input)


def _cut(start: list[Node], edges: dict[Node, list[Node]], to_input: dict[Node, bool]) -> Cut | str:
    """Gives every node that does not lead to the input to the one node that it hangs on, or to I."""
    owner: dict[Node, PutOff | None] = {}  # None: belongs to I
    stack: list[tuple[Node, PutOff | None]] = [(node, None) for node in start if not to_input[node]]
    found: list[PutOff] = []
    for node, children in edges.items():
        if not to_input[node]:
            continue
        aside = [child for child in children if not to_input[child]]
        if aside:
            waits = PutOff(node) if _is_separable(node) else None
            if waits is not None:
                found.append(waits)
            stack.extend((child, waits) for child in aside)
    while stack:
        node, waits = stack.pop()
        if node in owner:
            if owner[node] is waits or owner[node] is None:
                continue
            waits = None  # reached over two nodes
        elif waits is not None and _unpacks_by_hook(node):
            waits = None
        owner[node] = waits
        stack.extend((child, waits) for child in edges[node])
    at_once: list[Tensor] = []
    for node, waits in owner.items():
        if type(node) is _ACCUMULATE:
            (at_once if waits is None else waits.parameters).append(_leaf(node))
    put_off = [waits for waits in found if waits.parameters]
    again = {waits.node: waits for waits in put_off}
    done: list[Node] = []
    for node, children in edges.items():
        if node not in again and (to_input[node] or owner.get(node) is None):
            following = next((again[child] for child in children if child in again), None)
            (done if following is None else following.before).append(node)
    return Cut(put_off, at_once, done) if put_off else "it has no weight gradient that can be computed by itself"


def _leaf(node: Any) -> Tensor:
    variable: Tensor = node.variable
    return variable


def _is_separable(node: Node) -> bool:
    return type(node).__name__.rstrip("0123456789") in _SEPARABLE and not _unpacks_by_hook(node)


def _unpacks_by_hook(node: Node) -> bool:
    """Whether a tensor that the node saved comes back through a hook, as under checkpointing and offloading."""
    return any(_has_hook(getattr(node, name)) for name in _saved_names(type(node)))


@lru_cache(maxsize=1024)
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _has_hook(saved: Any) -> bool:
    if isinstance(saved, (tuple, list)):
        return any(map(_has_hook, saved))
    if hasattr(saved, "unpack_hook"):
        return saved.unpack_hook is not None
    try:  # older torch tells only by refusing a second pair of hooks
        saved.register_hooks(_unchanged, _unchanged)
    except RuntimeError as error:
        return "already been set" in str(error)
    return False


def _free(nodes: list[Node]) -> None:
    """Lets go of what nodes have saved that run no more.

    The graph as a whole has to be kept for W, and with it all that any node of it has saved: after I, where nothing
    is needed any more but the inputs of the put-off nodes, a stage would hold more than before. A hook that keeps
    nothing is the way to free a single node.
    """
    for node in nodes:
        for name in _saved_names(type(node)):
            _let_go(getattr(node, name))


def _let_go(saved: Any) -> None:
    if isinstance(saved, (tuple, list)):
        for part in saved:
            _let_go(part)
    elif isinstance(saved, _SavedTensor):
        with suppress(RuntimeError):  # it has hooks of the user's, or nothing is saved
            saved.register_hooks(_nothing, _gone)  # type: ignore[attr-defined]


def _nothing(_: Tensor) -> None:
    return


def _gone(_: None) -> Tensor:
    raise RuntimeError(
        "Trying to backward through the graph a second time: what it saved is freed by the first backward. Does the "
        "stage use a result that was computed once, outside of its forward, in several micro-batches?"
    )


def _unchanged(value: Any) -> Any:
    return value
