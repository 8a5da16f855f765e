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
`replicated_modules.py`, `gradient_reduction.py`, `moe_data_parallel.py` and `fully_sharded.py` have what the members of
the family want to be told: torch's wrappers, `NaiveDDP`, experts, and modules that `fully_shard` was applied to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import is_dtensor
from torchdistpackage.parallel.fully_sharded import FullySharded, is_fully_sharded, refuse_device
from torchdistpackage.parallel.moe_data_parallel import ExpertsOfStep
from torchdistpackage.parallel.naive_ddp import NaiveDDP
from torchdistpackage.parallel.replicated_modules import (
    Replicated,
    TorchReplica,
    is_torch_replica,
    reduce_now,
    refuse_different_experts,
    tensors,
)
from torchdistpackage.topology import tpc

__all__ = ["DDP", "DistributedDataParallelReducer"]


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
        PipelineError: A parameter is a DTensor, which torch's wrapper cannot hold, or of experts that the ranks of the
            group do not share.

    Example:
        >>> stage = DDP(nn.Linear(4, 1), find_unused_parameters=True)
        >>> stage(torch.ones(8, 4)).shape, [name for name, _ in stage.named_parameters()]
        (torch.Size([8, 1]), ['module.weight', 'module.bias'])
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
        group = process_group or tpc.get_group("data")
        refuse_different_experts(module, getattr(module, "_ddp_params_and_buffers_to_ignore", ()), group)
        super().__init__(module, process_group=group, **options)
        self._passes_through = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        if self._passes_through:
            return self.module(*args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]


@final
class DistributedDataParallelReducer:
    """Finds the data-parallel modules of a stage and reduces them once, with the last backward.

    Those are DistributedDataParallel wrappers, modules that `replicate` or `fully_shard` was applied to, `NaiveDDP`
    wrappers, and experts of `create_moe_dp_hooks`; the last two are also looked for in a step of one micro-batch.

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
        self._experts = ExpertsOfStep(1)
        self._quiet: list[Replicated] = []
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
        experts = ExpertsOfStep(len(reducers))
        for reducer in reducers:
            reducer._family, reducer._experts = reducers, experts
        return reducers

    @contextmanager
    def watch(self, only: bool = False) -> Iterator[None]:
        """Surrounds the first forward of the step.

        Args:
            only: Whether it is the only one: torch's wrappers then work as they are.
        """
        self._experts.take()
        silence = partial(self._silence, only=only)
        if self._modules is not None:
            for module in self._modules:
                silence(module)
            yield
            return
        search = _Search(silence)
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
        if (self._quiet or self._sharded or self._experts) and self._agree is not None:
            self._agree()
            for reducer in self._family:
                reducer._agree = None
        for sharded in self._sharded:
            self._under_way = True
            sharded.arm(split=parameters is not None)
        self._reached, self._output = parameters, output
        self._together = self._connected()
        self._experts.arm()
        if len(self._together) == 1:
            self._under_way = bool(self._quiet or self._sharded)
            for module in self._quiet:
                module.arm(tensors(output))

    def finish(self) -> None:
        """Comes after the last backward; torch's reducer has waited for its buckets at the end of that."""
        self._complete = True
        while self._sharded:
            self._sharded[-1].finish()
            self._sharded.pop()
        self._experts.finish()
        together = self._together or [self]
        if not all(reducer._complete for reducer in together):
            return  # the last of the chunks that share a parameter reduces for all of them
        self._under_way = True
        if len(together) > 1:
            reduce_now([module for reducer in together for module in reducer._quiet])
        else:
            for module in self._quiet:
                module.finish(self._reached, self._output)
        self._under_way = False
        for reducer in together:
            reducer._release()

    def cancel(self) -> bool:
        """Leaves the user's modules as they were.

        Returns:
            Whether it could: a reduction that has begun cannot be forgotten.
        """
        whole, self._under_way = not (self._under_way or self._experts.under_way), False
        self._experts.cancel(whole=whole)
        self._release(whole)
        return whole

    def _release(self, whole: bool = True) -> None:
        for module in self._quiet:
            module.release(whole=whole)
        for sharded in self._sharded:
            sharded.cancel()
        self._quiet, self._sharded = [], []
        self._reached = self._output = None
        self._together, self._complete = [], False

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
        return {id(p) for module in self._quiet for p in module.parameters()}

    def _silence(self, module: nn.Module, *, only: bool = False) -> None:
        if only and not isinstance(module, NaiveDDP):
            if is_fully_sharded(module):
                refuse_device(module)
            return
        if not (isinstance(module, NaiveDDP) or is_torch_replica(module)):
            if any(module is sharded.module for reducer in self._family for sharded in reducer._sharded):
                raise PipelineError(
                    f"one fully sharded {type(module).__name__} runs several stages of this rank; apply fully_shard to "
                    "each stage's own module"
                )
            self._sharded.append(FullySharded(module))
            return
        known = [quiet for reducer in self._family for quiet in reducer._quiet if quiet.module is module]
        if known:
            if known[0] not in self._quiet:
                self._quiet.append(known[0])  # one module runs several chunks
            return
        if isinstance(module, NaiveDDP):
            ours = module.of_step()
            self._quiet += [] if ours is None else [ours]
            return
        replica = TorchReplica(module)
        if not replica.is_idle:
            self._quiet.append(replica)


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
        known = isinstance(module, NaiveDDP) or is_torch_replica(module) or is_fully_sharded(module)
        if known and torch.is_grad_enabled():
            self._found(module)
            self._pause()
            self._returns.append(module.register_forward_hook(lambda *_: self.start()))
