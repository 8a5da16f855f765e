"""Data parallelism for the experts of a mixture: their replicas are other ranks than those of the layers around them.

With 4 replicas of a model, 2 of which share its experts out among them, every expert is there twice::

    rank                 0        1        2        3
    layers               all      all      all      all         reduced over "data":    0 1 2 3
    experts (moe_ep)     A B      C D      A B      C D         reduced over "moe_dp":  0 2 and 1 3

The model's own wrapper is told to leave the experts alone (`module._ddp_params_and_buffers_to_ignore`), and they are
reduced here, while the backward runs. An expert that got no token on a rank takes part without a gradient.

Neighbours: `gradient_reduction.py` has the machine; `data_parallel.py` lets a pipelined step reduce them once;
`expert_replicas.py` tells norms, optimizers and averages who holds the same experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import sharding_groups
from torchdistpackage.parallel.gradient_reduction import (
    GradientReduction,
    ReductionOfStep,
    ReductionOptions,
    reduced_by,
    reduced_twice,
)
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up
from torchdistpackage.parallel.same_start import broadcast_tensors, source_rank
from torchdistpackage.parallel.sharded_gradients import holders
from torchdistpackage.topology import tpc
from torchdistpackage.topology.expert_replicas import SAME_EXPERTS, different_experts, forget, register

__all__ = ["ExpertsOfStep", "MoEDP", "create_moe_dp_hooks", "moe_dp_iter_step"]

_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> its MoEDP, which lives as long as one does
_live: weakref.WeakValueDictionary[int, MoEDP] = weakref.WeakValueDictionary()
_numbers = iter(range(1 << 62))


@final
class MoEDP:
    """The parameters of experts, with a replica on each rank of a group.

    They are made equal at once, and their gradients are reduced by `reduce_gradients()` or, for all such objects
    together, by `moe_dp_iter_step()`. It lives as long as its parameters do, whether or not anybody keeps it; another
    one for the same parameters takes its place. From now on `clip_grad_norm_` counts these experts and those that other
    ranks of the data group hold, each once; so make it also where every rank has experts of its own.

    Args:
        expert_params: Name -> parameter, pairs of them, or parameters; the same on every rank of the group.
        sync: Reduce nothing before the end of an iteration; False overlaps with the backward.
        bucket_cap_mb: MiB that travel at once.
        gradient_as_bucket_view: Gradients live in the buckets; see `NaiveDDP`.
        process_group: The ranks that hold these experts; None for the "moe_dp" group of `tpc`.
        dp_rank0: Global rank of the replica whose parameters count at the begin; 0 for the group's first, too.
        reduce_op: `"avg"` or `"sum"`.
        num_grad_acc_iter: Backwards that make one iteration.
        verbose: Log, on level INFO, how long a reduction took.

    Raises:
        PipelineError: An argument is out of its range, the replicas have different parameters, or a
            wrapper or an optimizer takes ranks that hold other experts for the same.
        TopologyError: There is no such group; `dp_rank0` is not in it.

    Example:
        >>> import torch
        >>> expert = nn.Linear(2, 1, bias=False)
        >>> experts = MoEDP({"experts.0.weight": expert.weight}, process_group=dist.group.WORLD)
        >>> expert(torch.ones(1, 2)).sum().backward()
        >>> experts.reduce_gradients()
        >>> experts.expert_params["experts.0.weight"].grad
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        expert_params: Mapping[str, Tensor] | Iterable[Any],
        sync: bool = False,
        bucket_cap_mb: float = 25,
        gradient_as_bucket_view: bool = False,
        process_group: Any = None,
        dp_rank0: int = 0,
        reduce_op: str = "avg",
        num_grad_acc_iter: int = 1,
        verbose: bool = False,
    ) -> None:
        options = ReductionOptions(reduce_op, bucket_cap_mb, gradient_as_bucket_view, sync, num_grad_acc_iter, verbose)
        named = _named(expert_params)
        self.group = tpc.get_group("moe_dp") if process_group is None else process_group
        self._source = source_rank(self.group, dp_rank0)
        self._expert_params = [(name, TensorWeakRef(parameter)) for name, parameter in named.items()]
        self._reduction: GradientReduction | None = None
        self._no_sync, self._reduced_by_step, self._number = 0, False, next(_numbers)
        for parameter in named.values():
            before = _owners.get(parameter)  # type: ignore[no-untyped-call]
            if before is not None:
                before.close()
        if dist.get_world_size(self.group) > 1:
            with guarded_if_set_up("MoEDP"):
                self._reduction = GradientReduction(named.items(), self.group, options, "MoEDP")
            self.broadcast_params()
        for parameter in named.values():
            _owners[parameter] = self
            register(parameter, self.group)
        self._refuse_other_sharers(named)
        _live[self._number] = self

    def _refuse_other_sharers(self, named: Mapping[str, Tensor]) -> None:
        """Raises where an earlier call has taken different experts for replicas of each other."""
        own = list(named.values())
        sharers = [("Bf16ZeroOptimizer", own, one.shards.groups) for one in holders(own)]
        sharers += [("fully_shard", [p], sharding_groups(p)) for p in own]
        for what, parameters, groups in sharers:
            if wrong := different_experts(parameters, *groups):
                self.close()
                raise PipelineError(f"{what} holds experts: {wrong}; {SAME_EXPERTS}")
        for name, parameter in named.items():
            if self._reduction is None and (other := reduced_by(parameter)) is not None:
                self.close()
                raise PipelineError(reduced_twice(name, other, "MoEDP"))

    @property
    def expert_params(self) -> dict[str, Tensor]:
        """Name -> parameter."""
        return {name: p for name, of in self._expert_params if (p := of()) is not None}

    def reduce_gradients(self) -> None:
        """Returns when gradients are those of all replicas. Collective over the group, after every iteration.

        Every call takes part, since this rank cannot know whether its experts got tokens on the others; a second one
        changes nothing. After a pipelined step, which has reduced them, and inside of `no_sync()` it does nothing.

        Raises:
            PipelineError: Another rank has failed.
        """
        if self._reduction is None or self._no_sync:
            return
        by_step, self._reduced_by_step = self._reduced_by_step, False
        if by_step and not self._reduction.is_open:
            return
        with guarded_if_set_up("MoEDP.reduce_gradients"):
            self._reduction.begin()
            self._reduction.finish()

    def sync_comm(self) -> None:
        """Returns when what was sent so far has arrived."""
        if self._reduction is not None:
            self._reduction.wait()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside of it gradients only add up; the next reduction after it is of them all."""
        self._no_sync += 1
        try:
            with nullcontext() if self._reduction is None else self._reduction.silence():
                yield
        finally:
            self._no_sync -= 1

    def broadcast_params(self) -> None:
        """Makes the parameters those of rank `dp_rank0`. Collective over the group."""
        with guarded_if_set_up("MoEDP.broadcast_params"):
            broadcast_tensors(list(self.expert_params.values()), self.group, self._source)

    def close(self) -> None:
        """Takes no further notice of the parameters."""
        _live.pop(self._number, None)
        if self._reduction is not None:
            self._reduction.close()
        self._reduction = None
        for parameter in self.expert_params.values():
            if _owners.get(parameter) is self:  # type: ignore[no-untyped-call]
                del _owners[parameter]
                forget(parameter)

    def of_step(self) -> ReductionOfStep | None:
        """What a pipelined step has to reduce; None inside of `no_sync()`, or without replicas."""
        self._reduced_by_step = False
        if self._reduction is None or self._no_sync:
            return None
        return ReductionOfStep(self, self._reduction)

    def note_step(self) -> None:
        """Comes when a pipelined step has reduced them."""
        self._reduced_by_step = True


@final
class ExpertsOfStep:
    """All experts of this rank in one pipelined step; the chunks of a rank share it.

    Which chunk runs which experts is not known before they have run, and an expert without a token does not run: with
    one chunk they are armed with its last backward, with several they are reduced when the last of them is complete.

    Args:
        chunks: How many chunks this rank has.
    """

    def __init__(self, chunks: int) -> None:
        self._left = self._chunks = chunks
        self._members: list[ReductionOfStep] | None = None
        self.under_way = False  # replicas may have begun to reduce

    def __bool__(self) -> bool:
        return bool(self._members)

    def take(self) -> None:
        """Makes them quiet; comes with the first forward of the step, and changes nothing later."""
        if self._members is None:
            found = [experts.of_step() for experts in _in_order()]
            self._members = [member for member in found if member is not None]

    def arm(self) -> None:
        """Comes right before the last backward of a chunk."""
        if self._chunks == 1:
            self.under_way = bool(self)
            for member in self._members or []:
                member.arm([])

    def finish(self) -> None:
        """Comes after the last backward of a chunk."""
        self._left -= 1
        if self._left > 0:
            return
        self.under_way = bool(self)
        for member in self._members or []:
            member.finish(None, None)
            member.module.note_step()
        self._members, self.under_way = [], False

    def cancel(self, *, whole: bool) -> None:
        """Comes after a failure."""
        for member in self._members or []:
            member.release(whole=whole)
        self._members, self.under_way = [], False


def create_moe_dp_hooks(
    params: Mapping[str, Tensor] | Iterable[Any],
    moe_dp_group: Any = None,
    moe_dp_rank0: int = 0,
    overlap_comm: bool = True,
    reduce_op: str = "avg",
    sync: bool = False,
    num_grad_acc_iter: int = 1,
) -> MoEDP:
    """Makes experts data-parallel. Collective over the group; then call `moe_dp_iter_step()` once an iteration.

    An expert gets the tokens of all `e` ranks of its "moe_ep" group, and gradients from the losses of all of them. The
    mean over its replicas is therefore `e` times what the mean of all losses gives: multiply by
    `1 / tpc.get_group_size("moe_ep")`, or give all of the model `reduce_op="sum"` and divide the loss by the data size.

    Args:
        params: Name -> parameter of this rank's experts, pairs of them, or parameters.
        moe_dp_group: The ranks that hold the same experts; None for the "moe_dp" group of `tpc`.
        moe_dp_rank0: Global rank whose parameters count at the begin; 0 for the group's first, too.
        overlap_comm: Reduce while the backward runs.
        reduce_op: `"avg"` or `"sum"`.
        sync: The opposite of `overlap_comm`; if either says so, nothing is reduced before the end of an iteration.
        num_grad_acc_iter: Backwards that make one iteration.

    Returns:
        What reduces them; it need not be kept.

    Raises:
        PipelineError: An argument is out of its range, or the replicas have different parameters.
        TopologyError: There is no such group; `moe_dp_rank0` is not in it.

    Example:
        >>> from torchdistpackage import NaiveDDP
        >>> _ = tpc.build_moe_groups(moe_ep_size=1)  # 2: each expert on every second replica
        >>> model = nn.ModuleDict({"router": nn.Linear(2, 2), "experts": nn.ModuleList([nn.Linear(2, 2)])})
        >>> experts = {name: p for name, p in model.named_parameters() if name.startswith("experts.")}
        >>> model._ddp_params_and_buffers_to_ignore = list(experts)
        >>> wrapped = NaiveDDP(model)
        >>> hooks = create_moe_dp_hooks(experts, tpc.get_group("moe_dp"), tpc.get_ranks_in_group("moe_dp")[0])
        >>> list(hooks.expert_params)
        ['experts.0.weight', 'experts.0.bias']
    """
    return MoEDP(
        params,
        sync=sync or not overlap_comm,
        process_group=moe_dp_group,
        dp_rank0=moe_dp_rank0,
        reduce_op=reduce_op,
        num_grad_acc_iter=num_grad_acc_iter,
    )


def moe_dp_iter_step() -> None:
    """Reduces the gradients of all experts: once an iteration, after the backward, before the optimizer.

    Collective over their groups, on every rank. After a pipelined step, which has reduced them, it does nothing.

    Raises:
        PipelineError: Another rank has failed.

    Example:
        >>> import torch
        >>> expert = nn.Linear(2, 1, bias=False)
        >>> hooks = create_moe_dp_hooks(expert.parameters(), dist.group.WORLD)
        >>> expert(torch.ones(1, 2)).sum().backward()
        >>> moe_dp_iter_step()  # beside wrapped.reduce_gradients(), and before optimizer.step()
        >>> expert.weight.grad
        tensor([[1., 1.]])
    """
    for experts in _in_order():
        experts.reduce_gradients()


def _in_order() -> list[MoEDP]:
    """Those that live, in the order in which they were made, which is the same on every rank."""
    return [_live[number] for number in sorted(_live)]


def _named(params: Any) -> dict[str, Tensor]:
    """What the user gave, by name; each parameter once."""
    if isinstance(params, Tensor):
        raise PipelineError("the parameters of experts are a dict or a list of parameters, got a single tensor")
    entries = list(params.items()) if isinstance(params, Mapping) else list(params)
    pairs = [entry if isinstance(entry, tuple) else (str(number), entry) for number, entry in enumerate(entries)]
    wrong = next((value for _, value in pairs if not isinstance(value, nn.Parameter)), None)
    if wrong is not None:
        raise PipelineError(
            f"the parameters of experts must be nn.Parameters, got a {type(wrong).__name__}; pass "
            "dict(module.named_parameters())"
        )
    if not pairs:
        raise PipelineError("there are no parameters: a rank without experts of a group must not be in that group")
    return dict({id(p): (name, p) for name, p in pairs}.values())
