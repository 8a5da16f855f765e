"""Data parallelism around a pipeline: torch's wrappers, reduced exactly once a step.

DistributedDataParallel arms its reduction in `forward` and fires it in the next backward. A pipeline runs several
forwards before the first backward, so left alone it reduces the first micro-batch and silently nothing after it. Here
it is kept quiet during the step and armed right before the last backward, so that the reduction overlaps with that::

    F0  F1  B0  F2  B1  F3  B2  [arm] B3
    quiet ................. quiet | buckets are all-reduced while B3 still runs

A split backward is armed before its last W; what got all of its gradient with an I before that is reported then. Two
chunks of one rank that share a parameter (a tie under v placement) are reduced together, when both are complete: the
sum over the replicas must not be taken while one chunk still adds to it, nor be taken twice.

Neighbours: `pipeline_sched.py` hands a reducer to each stage; `runtime/stage.py` calls it and knows only its protocol;
`fully_sharded.py` has what modules need that torch's `fully_shard` was applied to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import is_dtensor
from torchdistpackage.parallel.fully_sharded import FullySharded, is_fully_sharded
from torchdistpackage.runtime.backward import reachable_leaves
from torchdistpackage.topology import tpc

__all__ = ["DDP", "DistributedDataParallelReducer"]

_cut_off: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


class DDP(DistributedDataParallel):
    """torch's DistributedDataParallel with the data group of `tpc` as its default process group.

    torch's own default is the whole world, which under a pipeline holds unlike stages. A stage without trainable
    parameters, or a topology without a `"data"` dimension, is wrapped just the same and reduces nothing.

    Args:
        module: The stage.
        process_group: Another group than the data group.
        **options: As for `torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TopologyError: Process groups have not been set up.
        PipelineError: A parameter is a DTensor, which torch's wrapper cannot hold.

    Example:
        >>> model = DDP(torch.nn.Sequential(*partition_uniform(layers)))
    """

    def __init__(self, module: nn.Module, *, process_group: Any = None, **options: Any) -> None:
        alone = process_group is None and tpc.get_dp_size() == 1 and not tpc._is_inited("data")
        self._passes_through = alone or not any(p.requires_grad for p in module.parameters())
        if self._passes_through:
            nn.Module.__init__(self)
            self._passes_through = True  # nn.Module.__init__ starts from an empty __dict__
            self.module = module
            self.require_backward_grad_sync = True
            return
        if any(is_dtensor(parameter) for parameter in module.parameters()):
            raise PipelineError(
                f"torch's DistributedDataParallel cannot hold DTensors, and {type(module).__name__} has some (tensor "
                "parallelism): wrap it in NaiveDDP, or use Bf16ZeroOptimizer or fully_shard over the data group"
            )
        super().__init__(module, process_group=process_group or tpc.get_group("data"), **options)
        self._passes_through = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        if self._passes_through:
            return self.module(*args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]


@final
class DistributedDataParallelReducer:
    """Finds the data-parallel modules of a stage and reduces them once, with the last backward.

    Those are DistributedDataParallel wrappers, and modules that `fully_shard` was applied to.

    They are found while the first micro-batch's forward runs, by a global hook that lives for that forward only: it
    does not matter how `fwd_fn` reaches them, whether it is a new closure every step, or which of several models this
    step is about. Cost: about 1 us for each module call of one micro-batch.

    Args:
        modules: The modules, if known: then nothing is searched.
        agree: Returns when all replicas are about to reduce; raises if one of them has failed.
    """

    def __init__(self, modules: Sequence[nn.Module] | None = None, agree: Callable[[], None] | None = None) -> None:
        self._modules, self._agree = modules, agree
        self._family = [self]
        self._together: list[DistributedDataParallelReducer] = []
        self._complete = self._under_way = False
        self._quiet: list[DistributedDataParallel] = []
        self._sharded: list[FullySharded] = []
        self._reached: frozenset[int] | None = None
        self._output: Any = None

    @classmethod
    def of_chunks(
        cls, modules: Sequence[Sequence[nn.Module] | None], agree: Callable[[], None] | None = None
    ) -> list[DistributedDataParallelReducer]:
        """The reducers of all chunks of this rank for one step, which know of each other.

        Args:
            modules: One entry a chunk: its modules, or None to find them.
            agree: Comes once a step, before the first reduction; see `replicas.py`.

        Example:
            >>> first, second = DistributedDataParallelReducer.of_chunks([None, None])
        """
        reducers = [cls(known, agree) for known in modules]
        for reducer in reducers:
            reducer._family = reducers
        return reducers

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Surrounds the first forward of the step."""
        if self._modules is not None:
            for module in self._modules:
                self._silence(module)
            yield
            return
        search = _Search(self._silence)
        try:
            search.start()
            yield
        finally:
            search.stop()

    def arm(self, output: Any, parameters: frozenset[int] | None = None) -> None:
        """Comes right before the last backward: from here on gradients are reduced as they become ready.

        No replica reduces before all have come here.

        By then the first forward of every chunk of this rank has run, because what a backward starts from went through
        all stages. A chunk that shares a parameter with another one is not armed but reduced by `finish`.

        Args:
            output: What this backward starts from. With `find_unused_parameters` its graph says which parameters the
                last micro-batch does not reach; those are reduced with what earlier micro-batches gave them.
            parameters: If the backward is split, the ids of the parameters that its second half still reaches; the
                others have all that they get, and `finish` says so to torch's reducer.
        """
        if (self._quiet or self._sharded) and self._agree is not None:
            self._agree()
            for reducer in self._family:
                reducer._agree = None
        for sharded in self._sharded:
            self._under_way = True
            sharded.arm(split=parameters is not None)
        self._reached, self._output = parameters, output
        self._together = self._connected()
        if len(self._together) == 1:
            self._under_way = bool(self._quiet or self._sharded)
            for module in self._quiet:
                _prepare(module, _tensors(output))

    def finish(self) -> None:
        """Comes after the last backward; torch's reducer has waited for its buckets at the end of that."""
        self._complete = True
        while self._sharded:
            self._sharded[-1].finish()
            self._sharded.pop()
        together = self._together or [self]
        if not all(reducer._complete for reducer in together):
            return  # the last of the chunks that share a parameter reduces for all of them
        self._under_way = True
        if len(together) > 1:
            _reduce_now([module for reducer in together for module in reducer._quiet])
        elif self._reached is not None:
            for module in self._quiet:
                _report_ready(module, self._reached, self._output)
        self._under_way = False
        for reducer in together:
            reducer.cancel()

    def cancel(self) -> bool:
        """Leaves the user's modules as they were.

        Returns:
            Whether it could: torch's reducer cannot be told to forget a reduction that has begun.
        """
        whole, self._under_way = not self._under_way, False
        for module in self._quiet:
            if not whole:
                _cut_off.add(module)
                module.reducer._remove_autograd_hooks()  # it would go on in the backwards of another wrapper
            module.require_backward_grad_sync = True
            module.require_forward_param_sync = True  # the quiet forwards have turned it off
        for sharded in self._sharded:
            sharded.cancel()
        self._quiet, self._sharded = [], []
        self._reached = self._output = None
        self._together, self._complete = [], False
        return whole

    def _connected(self) -> list[DistributedDataParallelReducer]:
        """This chunk and those that share parameters with it, directly or by way of others, in the model's order."""
        if len(self._family) == 1:
            return [self]
        found, rest, mine = [self], [other for other in self._family if other is not self], self._parameters()
        while near := [other for other in rest if mine & other._parameters()]:
            found += near
            rest = [other for other in rest if other not in near]
            mine = mine.union(*(other._parameters() for other in near))
        return [reducer for reducer in self._family if reducer in found]

    def _parameters(self) -> set[int]:
        return {id(p) for module in self._quiet for p in _trainable(module)}

    def _silence(self, module: nn.Module) -> None:
        if not isinstance(module, DistributedDataParallel):
            if any(module is sharded.module for reducer in self._family for sharded in reducer._sharded):
                raise PipelineError(
                    f"one fully sharded {type(module).__name__} runs several stages of this rank; apply fully_shard to "
                    "each stage's own module"
                )
            self._sharded.append(FullySharded(module))
            return
        if module in _cut_off:
            raise PipelineError(
                "a failure has cut off the reduction of this DistributedDataParallel wrapper, and torch cannot take it "
                "up again: wrap its module anew"
            )
        if any(module is quiet for reducer in self._family for quiet in reducer._quiet):
            if not any(module is quiet for quiet in self._quiet):
                self._quiet.append(module)  # one module runs several chunks
            return
        if not module.require_backward_grad_sync or getattr(module, "_passes_through", False):
            return  # the user is inside of no_sync() and reduces later; or there is nothing to reduce
        if module.static_graph:
            raise PipelineError(
                "DistributedDataParallel(static_graph=True) counts the backwards of its first step and cannot be "
                "pipelined with several micro-batches; use static_graph=False (find_unused_parameters=True if some "
                "parameters get no gradient)"
            )
        module.require_backward_grad_sync = False
        self._quiet.append(module)


# --- what torch's reducer is told -------------------------------------------------------------------------------------


def _prepare(module: DistributedDataParallel, roots: list[Tensor]) -> None:
    """Arms torch's reducer: the next gradient of each parameter, or its absence from the roots' graph, counts."""
    module.require_backward_grad_sync = True
    module.require_forward_param_sync = True
    module.reducer.prepare_for_backward(roots if module.find_unused_parameters else [])


def _report_ready(module: DistributedDataParallel, reached: frozenset[int], output: Any) -> None:
    """Reports the gradients that became complete before the reducer was armed.

    A parameter without a gradient, which the last micro-batch did not use either, is left for torch to complain of.
    """
    ready = [p for p in _trainable(module) if id(p) not in reached]
    if module.find_unused_parameters or any(p.grad is None for p in ready):
        used = {id(leaf) for leaf in reachable_leaves(_tensors(output))}
        ready = [p for p in ready if id(p) in used or not (module.find_unused_parameters or p.grad is None)]
    _add_nothing(ready)


def _reduce_now(modules: Sequence[DistributedDataParallel]) -> None:
    """Reduces gradients that are complete, one module after the other, each parameter with the first that has it.

    For the modules after that its gradient is out of the way: a sum over the replicas, or a lossy hook of the user's,
    must not be applied to what is reduced already.
    """
    done: set[int] = set()
    for module in dict.fromkeys(modules):
        own = _trainable(module)
        aside = [(p, p.grad) for p in own if id(p) in done]
        if len(aside) == len(own):
            continue
        for parameter, _ in aside:
            parameter.grad = None
        ready = [p for p in own if p.grad is not None or id(p) in done]
        with torch.enable_grad():
            _prepare(module, [p.view_as(p) for p in ready])
        _add_nothing(ready)
        for parameter, gradient in aside:
            parameter.grad = gradient
        done |= {id(p) for p in own}


def _add_nothing(parameters: list[Tensor]) -> None:
    """A backward that adds zero to the gradients of these leaves, which runs the reducer's hooks; costs no memory."""
    zeros = [
        torch.zeros_like(p.grad) if p.grad is not None and p.grad.is_sparse else p.new_zeros(()).expand_as(p)
        for p in parameters
    ]
    if parameters:
        torch.autograd.backward(parameters, zeros)


def _trainable(module: DistributedDataParallel) -> list[Tensor]:
    return [p for p in module.module.parameters() if p.requires_grad]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


class _Search:
    """A global forward pre-hook that reports data-parallel modules.

    It steps aside while a module that it found runs: what is inside of that needs no search, and a compiled module
    inside would be compiled again for the sake of the hook.
    """

    def __init__(self, found: Any) -> None:
        self._found = found
        self._hook: Any = None
        self._returns: list[Any] = []

    def start(self) -> None:
        if self._hook is None:
            self._hook = register_module_forward_pre_hook(self._look)

    def stop(self) -> None:
        for handle in self._returns:
            handle.remove()
        self._returns = []
        self._pause()

    def _pause(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, module: nn.Module, _: Any) -> None:
        known = isinstance(module, DistributedDataParallel) or is_fully_sharded(module)
        if known and torch.is_grad_enabled():
            self._found(module)
            self._pause()
            self._returns.append(module.register_forward_hook(lambda *_: self.start()))
