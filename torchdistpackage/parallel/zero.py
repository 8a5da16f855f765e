"""ZeRO-1 and ZeRO-2 around any torch optimizer, in the user's own loop: each rank keeps 1/d of its state.

Bytes a parameter on each of d ranks, with Adam, after Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models" (arXiv:1910.02054):

================================  ==========  =========  ======  =====
                                  parameters  gradients  master  state
================================  ==========  =========  ======  =====
float32, plain                    4           4          0       8
float32, stage 2                  4           4 / d      0       8 / d
bfloat16 with a master, plain     2           2          4       8
bfloat16 with a master, stage 2   2           4 / d      4 / d   8 / d
================================  ==========  =========  ======  =====

During the backward the whole gradient is there once, unless `overlap_comm` reduces it meanwhile. Stage 1 keeps all
averaged gradients in the parameters, and this rank's chunks of them in the pieces.

Why not torch's own: `torch.distributed.optim.ZeroRedundancyOptimizer` gives whole parameters to ranks, so that the one
with the embedding has more than 1/d; it shards the state only, leaves gradients to DistributedDataParallel, knows no
master weights, and consolidates through pickled objects. `fully_shard` shards modules: parameters become DTensors that
are gathered in every forward, of every micro-batch. Where that suits, use it; `forward_backward` knows it.

Neighbours: `zero_layout.py` (who owns what), `zero_buckets.py` (tensors), `zero_reduce.py` (when gradients go),
`zero_shards.py` (which parameters), `zero_group.py` (collectives), `zero_state.py` (checkpoints);
`sharded_gradients.py` tells `clip_grad_norm_`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.clip_grad_parallel import clip_grad_norm_
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up
from torchdistpackage.parallel.sharded_gradients import register
from torchdistpackage.parallel.zero_arguments import check_arguments, check_optimizer, check_parameters, start_alike
from torchdistpackage.parallel.zero_buckets import Piece
from torchdistpackage.parallel.zero_group import ShardGroup
from torchdistpackage.parallel.zero_memory import ShardMemory, shard_memory
from torchdistpackage.parallel.zero_norm import clip_in_world, shard_norms
from torchdistpackage.parallel.zero_reduce import GradientShards
from torchdistpackage.parallel.zero_shards import LayoutOptions, ParameterShards
from torchdistpackage.parallel.zero_state import ShardedState
from torchdistpackage.topology import tpc

__all__ = ["Bf16ZeroOptimizer"]


@final
class Bf16ZeroOptimizer(torch.optim.Optimizer):
    """Shards a torch optimizer over the ranks of a group: its state, master weights, and at stage 2 the gradients.

    The wrapped optimizer steps on pieces: the elements of the parameters that this rank owns. One that treats every
    element alike (SGD, Adam, AdamW, RMSprop, ...) trains the same bits as without sharding; only fused kernels, and
    steps in half precision, may round the last elements of a tensor otherwise than the rest. Parameters in half
    precision have float32 master weights; what somebody else writes into parameters (a checkpoint that is loaded, a
    tie) is taken over at the next step.

    Gradients gather in `param.grad` over any number of backwards, and are averaged over the group once: in `step`, in
    `clip_grad_norm_`, in a `PipelineGradScaler`, or in `reduce_gradients`. On two ranks the bits are those of
    DistributedDataParallel. Call `zero_grad` of this optimizer, not only of the model: at stage 2 the model has no
    gradients any more. Clip with this library's `clip_grad_norm_`, and scale with `PipelineGradScaler`: torch's see one
    rank's gradients only. Every rank of the group makes the same calls. It is an `Optimizer`: learning rate schedulers,
    step hooks and `forward_backward` take it.

    Args:
        optim: The optimizer to wrap, new or with state; from now on only this one is used.
        dp_group: Who shares. None: the data group of `tpc`, or the world where `tpc` is not set up.
        bf16_master_weights: Step on half-precision parameters themselves, without float32 copies.
        overlap_comm: Reduce during the backward, last bucket first; choose a `bucket_size` well below the model's size.
            Each backward then reduces, so that accumulating over n of them costs n times the traffic, unless all but
            the last run under `no_sync`. Every rank makes as many backwards. In pipeline steps it is not overlapped.
        stage: 1: every rank keeps all averaged gradients. 2: only those that it owns.
        bucket_size: Elements that one collective moves; it takes as many elements of memory while it runs.
        bucketize: False moves one parameter at a time.
        replica_group: The ranks that own the same shard, where `dp_group` (as of `setup_node_groups`) is a part of the
            data group: gradients are averaged over these as well.
        partition: "elements": every rank owns 1/d. "parameters": whole parameters, the largest first, for optimizers
            that look at whole tensors (Adafactor, Muon, LAMB).
        reduce_dtype: In which gradients are added up; None for their own.

    Raises:
        PipelineError: A wrong argument, or an optimizer or parameters that cannot be sharded.
        TopologyError: This rank is not in the group.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0))
        >>> layer(torch.ones(3, 2)).sum().backward()  # or forward_backward(optimizer, ...)
        >>> clip_grad_norm_(layer.parameters(), 10.0)
        tensor(4.2426)
        >>> optimizer.step()
    """

    def __init__(
        self,
        optim: torch.optim.Optimizer,
        dp_group: dist.ProcessGroup | None = None,
        bf16_master_weights: bool = False,
        overlap_comm: bool = False,
        stage: int = 2,
        bucket_size: float = 5e8,
        bucketize: bool = True,
        *,
        replica_group: dist.ProcessGroup | None = None,
        partition: str = "elements",
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        check_optimizer(optim, partition)
        check_arguments(stage, bucket_size, partition, reduce_dtype)
        shards = ShardGroup.find(dp_group, replica_group)
        groups = [list(group["params"]) for group in optim.param_groups]
        check_parameters(groups, shards.ranks())
        with guarded_if_set_up("Bf16ZeroOptimizer"):
            start_alike(groups, shards, [stage, bucket_size, bucketize, overlap_comm, partition])
        super().__setstate__({"defaults": optim.defaults})  # what Optimizer.__init__ does besides the two properties
        self.optim, self.stage, self.partition, self.shards = optim, stage, partition, shards
        options = LayoutOptions(
            bucket_size=int(bucket_size) if bucketize else 1,
            whole=overlap_comm or not bucketize,
            partition=partition,
            master=not bf16_master_weights,
            reduce_dtype=reduce_dtype,
        )
        self._gradients = GradientShards(shards, keep=stage == 1, overlap=overlap_comm)
        self._layout = ParameterShards(optim, groups, self._gradients, options, partial(_register, weakref.ref(self)))
        before = optim.state_dict() if optim.state else None
        optim.state.clear()
        for group in optim.param_groups:
            group["params"] = []
        self._names = [group.pop("param_names", None) for group in optim.param_groups]
        self._layout.adopt()
        if before is not None:
            self._state().scatter(before)

    # ---- what an optimizer has ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's, whose parameters are this rank's pieces; set options, as `lr`, here."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optim.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's: piece -> its state."""
        return self.optim.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optim.state = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Averages gradients where that was not done, steps on this rank's pieces, and gathers the weights. Collective.

        Args:
            closure: Computes the loss and the gradients first, once.

        Returns:
            What the closure returns, or the wrapped optimizer.

        Raises:
            PipelineError: Another rank has failed, or `zero_grad` was left out.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with guarded_if_set_up("Bf16ZeroOptimizer.step"):
            self.settle()
            self._layout.refresh()
            result = self.optim.step()
            self._layout.gather()
            self._gradients.stepped()
        return result if closure is None else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the parameters and of this rank's pieces.

        Args:
            set_to_none: False makes those that are there zero, as for any torch optimizer.
        """
        self._gradients.forget(set_to_none=set_to_none)
        for parameter in self._layout.everything():
            if parameter.grad is None:
                continue
            if set_to_none:
                parameter.grad = None
            else:
                parameter.grad.detach_()
                parameter.grad.zero_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Another group of parameters, on every rank; they get the values of the first one. Collective.

        Args:
            param_group: As for any torch optimizer.

        Raises:
            PipelineError: They cannot be sharded, are there already, or the ranks have other ones.
        """
        given = [param_group["params"]] if isinstance(param_group["params"], Tensor) else list(param_group["params"])
        parameters = [one[1] if isinstance(one, tuple) else one for one in given]
        names = [one[0] for one in given if isinstance(one, tuple)]
        check_parameters([*self._layout.given, parameters], self.shards.ranks())
        with guarded_if_set_up("Bf16ZeroOptimizer.add_param_group"):
            start_alike([parameters], self.shards, [len(self._layout.given)])
        options = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
        self.optim.add_param_group({**options, "params": []})
        self._layout.given.append(parameters)
        self._names.append(names or None)
        self._layout.adopt()

    # ---- gradients ----

    def reduce_gradients(self) -> None:
        """Averages the gradients now. Collective. At stage 2 what comes later is added to the shards.

        Raises:
            PipelineError: Another rank has failed, or `zero_grad` was left out.

        Example:
            >>> layer = torch.nn.Linear(2, 1, bias=False)
            >>> optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0))
            >>> layer(torch.ones(3, 2)).sum().backward()
            >>> optimizer.reduce_gradients()
            >>> layer.weight.grad, optimizer.param_groups[0]["params"][0].grad  # in this rank's piece now
            (None, tensor([[3., 3.]]))
        """
        with guarded_if_set_up("Bf16ZeroOptimizer.reduce_gradients"):
            self.settle()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add to `param.grad`: for all but the last of those that are accumulated.

        Example:
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), overlap_comm=True)
            >>> with optimizer.no_sync():
            ...     layer(torch.ones(3, 2)).sum().backward()
            >>> layer(torch.ones(3, 2)).sum().backward()  # both are reduced while this one runs
        """
        before, self._gradients.quiet = self._gradients.quiet, True
        try:
            yield
        finally:
            self._gradients.quiet = before

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        replicated: Iterable[Tensor] = (),
    ) -> Tensor:
        """Clips by the norm of the whole model: `torchdistpackage.clip_grad_norm_` of all parameters of this optimizer.

        Collective. Arguments, result and errors are those of that function; before `tpc` is set up the group of this
        optimizer counts as the world.
        """
        if tpc._is_inited("global"):
            return clip_grad_norm_(
                self._layout.everything(), max_norm, norm_type, error_if_nonfinite, replicated=list(replicated)
            )
        return clip_in_world(self, self._layout.everything(), max_norm, norm_type, error_if_nonfinite)

    # ---- checkpoints and counts ----

    def state_dict(self, *, to: str = "first") -> dict[str, Any]:
        """The whole state, as the wrapped optimizer would have it without sharding, and master weights. Collective.

        It loads into the plain optimizer, and into this class on any number of ranks. Of a DTensor parameter it is the
        state of this rank's local part.

        Args:
            to: "first": the first rank of the group gets it, on the CPU, and the others {}. "all": every rank.

        Raises:
            PipelineError: Another rank has failed.
        """
        if to not in ("first", "all"):
            raise PipelineError(f"to must be 'first' or 'all', got {to!r}")
        with guarded_if_set_up("Bf16ZeroOptimizer.state_dict"):
            named = [
                {key: value for key, value in group.items() if key != "params"}
                | ({"param_names": list(names)} if names else {})
                for group, names in zip(self.optim.param_groups, self._names, strict=True)
            ]
            return self._state().gather(named, everywhere=to == "all")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes this rank's part of a whole state, from `state_dict` or from the plain optimizer. Not collective.

        Args:
            state_dict: The whole state, on every rank.

        Raises:
            CheckpointError: It is of another model or optimizer.
        """
        self._state().scatter(state_dict)

    def state_dict_shard(self) -> dict[str, Any]:
        """This rank's state and master weights as they are, without communication."""
        return self._state().shard()

    def load_state_dict_shard(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict_shard` gave on this rank, without communication.

        Raises:
            CheckpointError: It was saved with another number of ranks, or another layout.
        """
        self._state().load_shard(state_dict)

    def state_pieces(self) -> list[Piece]:
        """What this rank steps on, for `torchdistpackage.checkpoint`, which saves it by name for any other layout."""
        return self._state().pieces()

    def state_parameters(self) -> list[list[Tensor]]:
        """The model's parameters, group by group."""
        return [list(group) for group in self._layout.given]

    def state_loaded(self) -> None:
        """Parameters, state and master weights were loaded: none is made from another at the next step."""
        self._state(refresh=False).loaded()

    def memory_report(self) -> ShardMemory:
        """The bytes on this rank; its `str` is a table."""
        return shard_memory(self._layout.everything(), self._gradients.buckets, self.optim.state)

    # ---- what clip_grad_parallel.py and grad_scaler.py ask for ----

    def settle(self) -> None:
        """`reduce_gradients`, for callers that are guarded already."""
        self._layout.adopt()
        self._gradients.settle()

    def norms(self, parameters: Iterable[Tensor], norm_type: float) -> dict[int, Tensor]:
        """The norms of the averaged gradients of some of the parameters, by their ids. Collective over the group."""
        wanted = {id(parameter) for parameter in parameters}
        members = [member for member in self._gradients.members if id(member.parameter) in wanted]
        norms = shard_norms(members, self._gradients.buckets, self.shards, norm_type)
        return {id(member.parameter): norm for member, norm in zip(members, norms, strict=True)}

    def with_gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The tensors whose gradients are to be scaled when those of some of the parameters are."""
        wanted = {id(parameter): parameter for parameter in parameters}
        pieces = [piece for bucket in self._gradients.buckets for piece in bucket.pieces]
        found = [piece.tensor for piece in pieces if id(piece.member.parameter) in wanted]
        if self.stage == 1:
            found += [m.parameter for m in self._gradients.members if id(m.parameter) in wanted]
        return [tensor for tensor in found if tensor.grad is not None]

    def remember(self) -> None:
        """The gradients that are in the parameters now were changed on purpose."""
        self._gradients.remember()

    def like(self) -> Tensor:
        """An empty tensor as the pieces are, on ranks without pieces, too."""
        members = self._gradients.members
        return torch.empty(0, dtype=members[0].dtype, device=members[0].local().device) if members else torch.empty(0)

    def __reduce_ex__(self, _: Any) -> Any:
        raise PipelineError("a Bf16ZeroOptimizer cannot be copied or pickled; use its state_dict()")

    def _state(self, *, refresh: bool = True) -> ShardedState:
        if refresh:
            self._layout.refresh()
        counts = [len(group) for group in self._layout.given]
        return ShardedState(
            self.optim, self._gradients.members, self._gradients.buckets, self.shards, counts, self.partition
        )


def _register(optimizer: weakref.ref[Bf16ZeroOptimizer], parameter: Tensor) -> None:
    alive = optimizer()
    if alive is not None:
        register(parameter, alive)
