"""`NaiveDDP`: data parallelism that the user asks for gradients, once an iteration.

::

    loss = model(x).mean()
    loss.backward()              # buckets are reduced while it runs
    model.reduce_gradients()     # waits, and reduces what is left
    optimizer.step()

Unlike torch's DistributedDataParallel it does not mind parameters without a gradient, any number of backwards between
two reductions, parameters that are frozen or unfrozen on the way, or tensor-parallel ones. Within a pipelined step it
is reduced by the step. Neighbours: `gradient_reduction.py` has the machine, `moe_data_parallel.py` uses it for experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.gradient_reduction import GradientReduction, ReductionOfStep, ReductionOptions
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up
from torchdistpackage.parallel.same_start import broadcast_tensors, source_rank
from torchdistpackage.parallel.sparse_gradients import sparse_parameters
from torchdistpackage.topology import tpc
from torchdistpackage.topology.process_groups import initialised_world

__all__ = ["NaiveDDP"]


@final
class NaiveDDP(nn.Module):
    """A module with a replica on each rank of a group; gradients are reduced by `reduce_gradients`.

    Each replica runs its own forwards and backwards, then all call `reduce_gradients()`, then the optimizer. The
    gradients are then the mean (or sum) over the replicas of what each has accumulated since the last time: however
    many backwards that were, whichever parameters they reached. A gradient that no replica has stays None. What was
    reduced before and is still in `.grad` stays as it is: a mean takes the mean of equals, a sum adds to it.

    In `forward_backward` the step reduces once, with its last backward, whatever `num_grad_acc_iter` says; a
    `reduce_gradients()` after it does nothing. Buffers are made equal once, at the begin; `broadcast_params()` does so
    again. Names in `module._ddp_params_and_buffers_to_ignore` are left alone, as torch's DistributedDataParallel does.
    `copy.deepcopy` and pickling are for the module inside.

    Args:
        module: The module; `model.module` is it, and attributes that this class does not have are read from it.
        sync: Reduce nothing before `reduce_gradients()`; False overlaps with the backward.
        bucket_cap_mb: MiB that travel at once; a larger parameter travels alone.
        gradient_as_bucket_view: Gradients live in the buckets, which saves a copy of them. Between the backward and
            `reduce_gradients()` nobody may read or change them then.
        process_group: The replicas; None for the data group of `tpc`, or all ranks where `tpc` is not set up.
        dp_rank0: Global rank of the replica whose parameters count at the begin; 0 for the first of the group, too.
        reduce_op: `"avg"` or `"sum"`.
        num_grad_acc_iter: Backwards that make one iteration: overlap begins with the last of them.
        verbose: Log, on level INFO, how long `reduce_gradients` took.

    Raises:
        PipelineError: An argument is out of its range, or the replicas have different parameters. From a forward: the
            last gradients were cleared after a part of them had been sent, without `reduce_gradients()`; where a model
            fits into one bucket nothing is sent before, and a forgotten call is not noticed. Or a failure has cut off
            a reduction.
        TopologyError: torch.distributed is not initialised, or `dp_rank0` is not in the group.

    Example:
        >>> model = NaiveDDP(nn.Linear(2, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for samples in torch.ones(3, 4, 2):
        ...     optimizer.zero_grad()
        ...     model(samples).sum().backward()
        ...     model.reduce_gradients()
        ...     optimizer.step()
        >>> model.weight.grad  # the mean over the replicas
        tensor([[4., 4.]])
    """

    def __init__(
        self,
        module: nn.Module,
        sync: bool = False,
        bucket_cap_mb: float = 25,
        gradient_as_bucket_view: bool = False,
        process_group: Any = None,
        dp_rank0: int = 0,
        reduce_op: str = "avg",
        num_grad_acc_iter: int = 1,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise PipelineError(f"NaiveDDP wraps an nn.Module, got a {type(module).__name__}")
        options = ReductionOptions(reduce_op, bucket_cap_mb, gradient_as_bucket_view, sync, num_grad_acc_iter, verbose)
        self.module = module
        self.parameters_to_ignore = frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        self.group = _data_group() if process_group is None else process_group
        self._source = 0 if self.group is None else source_rank(self.group, dp_rank0)
        self._no_sync = 0
        self._reduction: GradientReduction | None = None
        if self.group is None or dist.get_world_size(self.group) == 1:
            return
        named = [(name, p) for name, p in module.named_parameters() if name not in self.parameters_to_ignore]
        with guarded_if_set_up("NaiveDDP"):
            sparse = sparse_parameters(module)
            self._reduction = GradientReduction(named, self.group, options, "NaiveDDP", sparse)
        self.broadcast_params()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        if self._reduction is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._reduction.begin()
        return self.module(*args, **kwargs)

    def reduce_gradients(self) -> None:
        """Returns when gradients are those of all replicas. Collective: call it on each, after every iteration.

        A second call does nothing, and so does one inside of `no_sync()`. A replica without a batch calls it, too.

        Raises:
            PipelineError: Another rank has failed, or gradients that live in buckets were changed on the way.
        """
        if self._reduction is None or self._no_sync:
            return
        with guarded_if_set_up("NaiveDDP.reduce_gradients"):
            self._reduction.finish()

    def sync_comm(self) -> None:
        """Returns when what was sent so far has arrived; gradients are in place after `reduce_gradients()` only."""
        if self._reduction is not None:
            self._reduction.wait()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside of it gradients only add up; the next reduction after it is of them all.

        Example:
            >>> model = NaiveDDP(nn.Linear(2, 1, bias=False))
            >>> with model.no_sync():
            ...     model(torch.ones(1, 2)).sum().backward()
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> model.reduce_gradients()
            >>> model.weight.grad
            tensor([[4., 4.]])
        """
        self._no_sync += 1
        try:
            with nullcontext() if self._reduction is None else self._reduction.silence():
                yield
        finally:
            self._no_sync -= 1

    def broadcast_params(self) -> None:
        """Makes parameters and buffers those of rank `dp_rank0`. Collective over the replicas."""
        if self._reduction is None:
            return
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        kept = [tensor for name, tensor in named if name not in self.parameters_to_ignore]
        with guarded_if_set_up("NaiveDDP.broadcast_params"):
            broadcast_tensors(kept, self.group, self._source)

    def of_step(self) -> ReductionOfStep | None:
        """What a pipelined step has to reduce; None inside of `no_sync()`, or without replicas."""
        if self._reduction is None or self._no_sync:
            return None
        return ReductionOfStep(self, self._reduction)

    def __getattr__(self, name: str) -> Any:
        """What only the module inside has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    def __reduce_ex__(self, _: Any) -> Any:
        raise PipelineError("a NaiveDDP cannot be copied or pickled, its module can: copy.deepcopy(model.module)")


def _data_group() -> Any:
    """The data group of `tpc`; None if it has just one replica; all ranks where `tpc` is not set up."""
    if tpc._is_inited("data"):
        return tpc.get_group("data")
    return None if tpc._is_inited("global") else initialised_world()
