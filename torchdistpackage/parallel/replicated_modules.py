"""Data parallelism around a pipeline: wrappers that keep a whole replica of a module, for one step.

::

    quiet ------------------> arm -------------> finish
    from the first forward    right before       gradients are reduced, and the wrapper is as it was
    on                        the last backward

Here is what torch's own have to be told: `DistributedDataParallel`, and `torch.distributed._composable.replicate`,
which keeps one out of sight. `NaiveDDP` and experts bring a `ReductionOfStep`, which says the same of buckets of ours.

Neighbours: `data_parallel.py` finds these modules and calls this; `gradient_reduction.py` has the other kind.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Sequence
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.backward import reachable_leaves
from torchdistpackage.topology.expert_replicas import LEAVE_ALONE, different_experts

__all__ = ["Replicated", "TorchReplica", "is_torch_replica", "reduce_now", "refuse_different_experts", "tensors"]

_cut_off: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


class Replicated(Protocol):
    """One wrapper for one step, from its first forward on; made quiet by being made."""

    @property
    def module(self) -> Any:
        """What the user knows it by."""

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient."""

    def arm(self, roots: list[Tensor]) -> None:
        """Comes right before the last backward, which starts from `roots`."""

    def finish(self, reached: frozenset[int] | None, output: Any) -> None:
        """Comes after the last backward; `reached` and `output` as in `GradientReducer.arm`."""

    def reduce(self, done: Collection[int]) -> None:
        """Comes in place of both, after all backwards: reduces all but the parameters with these ids."""

    def release(self, *, whole: bool) -> None:
        """Leaves the wrapper as it was; `whole` is False if a reduction was cut off. A second time changes nothing."""


def is_torch_replica(module: Any) -> bool:
    """Whether it is a DistributedDataParallel, or torch's composable `replicate` was applied to it.

    Example:
        >>> is_torch_replica(torch.nn.Linear(2, 2))
        False
    """
    return isinstance(module, DistributedDataParallel) or _replicate_state(module) is not None


def _replicate_state(module: Any) -> Any:
    """What `replicate` has noted about a module; None if it was not applied to it."""
    loaded = sys.modules.get("torch.distributed._composable.replicate")  # the package's attribute is the function
    kind = getattr(loaded, "DDP", None)
    if loaded is None or kind is None or not isinstance(module, kind):
        return None
    return loaded.replicate.state(module)


@final
class TorchReplica:
    """One of torch's wrappers, for one step.

    Args:
        module: A DistributedDataParallel, or what `replicate` was applied to.

    Attributes:
        is_idle: There is nothing to do: the user is inside of no_sync() and reduces later, or has one replica.

    Raises:
        PipelineError: It cannot be pipelined.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._state = _replicate_state(module)
        if self._state is not None and (self._state._init_args or self._state._init_kwargs):
            self._state.lazy_init()  # else its first forward would, and all replicas are here now
        self._ddp: DistributedDataParallel = module if self._state is None else self._state._ddp
        if self._ddp in _cut_off:
            raise PipelineError(
                "a failure has cut off the reduction of this DistributedDataParallel wrapper, and torch cannot take it "
                "up again: wrap its module anew"
            )
        idle = bool(self._state._no_sync) if self._state is not None else not self._ddp.require_backward_grad_sync
        self.is_idle = idle or getattr(self._ddp, "_passes_through", False)
        if self.is_idle:
            return
        if self._ddp.static_graph:
            raise PipelineError(
                "DistributedDataParallel(static_graph=True) counts the backwards of its first step and cannot be "
                "pipelined with several micro-batches; use static_graph=False (find_unused_parameters=True if some "
                "parameters get no gradient)"
            )
        refuse_different_experts(self._ddp.module, self._ddp.parameters_to_ignore, self._ddp.process_group)
        self._set_quiet(True)

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient."""
        return [p for p in self._ddp.module.parameters() if p.requires_grad]

    def arm(self, roots: list[Tensor]) -> None:
        """Arms torch's reducer: the next gradient of each parameter, or its absence from the roots' graph, counts."""
        self._ddp.require_backward_grad_sync = True
        self._ddp.require_forward_param_sync = True
        self._ddp.reducer.prepare_for_backward(roots if self._ddp.find_unused_parameters else [])

    def finish(self, reached: frozenset[int] | None, output: Any) -> None:
        """Reports the gradients that became complete before the reducer was armed.

        A parameter without a gradient, which the last micro-batch did not use either, is left for torch to complain of.
        """
        if reached is None:
            return  # torch's reducer has waited for its buckets at the end of the backward
        finds = self._ddp.find_unused_parameters
        ready = [p for p in self.parameters() if id(p) not in reached]
        if finds or any(p.grad is None for p in ready):
            used = {id(leaf) for leaf in reachable_leaves(tensors(output))}
            ready = [p for p in ready if id(p) in used or not (finds or p.grad is None)]
        _add_nothing(ready)

    def reduce(self, done: Collection[int]) -> None:
        """Reduces gradients that are complete.

        What is done is out of the way meanwhile: a sum over the replicas, or a lossy hook of the user's, must not be
        applied to it once more.
        """
        own = self.parameters()
        aside = [(p, p.grad) for p in own if id(p) in done]
        if len(aside) == len(own):
            return
        for parameter, _ in aside:
            parameter.grad = None
        ready = [p for p in own if p.grad is not None or id(p) in done]
        with torch.enable_grad():
            self.arm([p.view_as(p) for p in ready])
        _add_nothing(ready)
        for parameter, gradient in aside:
            parameter.grad = gradient

    def release(self, *, whole: bool) -> None:
        """Leaves the wrapper as it was; torch's reducer cannot be told to forget a reduction that has begun."""
        if not whole:
            _cut_off.add(self._ddp)
            self._ddp.reducer._remove_autograd_hooks()  # it would go on in the backwards of another wrapper
        self._set_quiet(False)
        self._ddp.require_forward_param_sync = True  # the quiet forwards have turned it off

    def _set_quiet(self, quiet: bool) -> None:
        self._ddp.require_backward_grad_sync = not quiet
        if self._state is not None:
            self._state._no_sync = quiet  # each forward copies it; also one that a checkpoint runs again


def refuse_different_experts(module: nn.Module, ignored: Collection[str], group: dist.ProcessGroup) -> None:
    """Raises if a wrapper over this group would average experts that its ranks do not share.

    Raises:
        PipelineError: A parameter whose name is not ignored is such a one.
    """
    if wrong := different_experts((p for name, p in module.named_parameters() if name not in ignored), group):
        raise PipelineError(f"DistributedDataParallel: {wrong}; {LEAVE_ALONE}")


def reduce_now(members: Sequence[Replicated]) -> None:
    """Reduces gradients that are complete, one after the other, each parameter with the first that has it."""
    done: set[int] = set()
    for member in dict.fromkeys(members):
        member.reduce(done)
        done |= {id(p) for p in member.parameters()}


def tensors(output: Any) -> list[Tensor]:
    """The tensors in what a stage has returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _add_nothing(parameters: list[Tensor]) -> None:
    """A backward that adds zero to the gradients of these leaves, which runs the reducer's hooks; costs no memory."""
    zeros = [
        torch.zeros_like(p.grad) if p.grad is not None and p.grad.is_sparse else p.new_zeros(()).expand_as(p)
        for p in parameters
    ]
    if parameters:
        torch.autograd.backward(parameters, zeros)
