"""The parameters of a sharded optimizer: which are laid out where, and how their new weights come to all ranks.

Neighbours: `zero.py` calls it; `zero_layout.py` has the arithmetic, `zero_buckets.py` the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.zero_buckets import HALF, Bucket, Member
from torchdistpackage.parallel.zero_layout import BucketLayout, by_elements, by_parameters
from torchdistpackage.parallel.zero_reduce import GradientShards

__all__ = ["LayoutOptions", "ParameterShards"]

_UNDER_WAY = 2  # buckets of weights


@final
@dataclass(frozen=True)
class LayoutOptions:
    """How parameters are laid out.

    Attributes:
        bucket_size: In elements.
        whole: A parameter lies in one bucket.
        partition: "elements" or "parameters".
        master: Whether pieces of half-precision parameters are copies in float32.
        reduce_dtype: In which gradients are added up; None for their own.
    """

    bucket_size: int
    whole: bool
    partition: str
    master: bool
    reduce_dtype: torch.dtype | None


@final
class ParameterShards:
    """The parameters of one optimizer, in their groups.

    Args:
        optimizer: The wrapped one; its groups get pieces.
        given: Its parameters, group by group.
        gradients: Gets the buckets.
        options: How.
        laid_out: Is told of each parameter that gets its place.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        given: list[list[Tensor]],
        gradients: GradientShards,
        options: LayoutOptions,
        laid_out: Callable[[Tensor], None],
    ) -> None:
        self.optimizer, self.given, self.gradients, self._options = optimizer, given, gradients, options
        self._laid_out = laid_out
        self._loads = [0] * gradients.shards.size

    def everything(self) -> list[Tensor]:
        """All parameters, with a place or without."""
        return [parameter for group in self.given for parameter in group]

    @torch.no_grad()
    def adopt(self) -> None:
        """Lays out trainable parameters that have no place yet: all at first, later those that were frozen."""
        known = {id(member.parameter) for member in self.gradients.members}
        index = 0
        for number, group in enumerate(self.given):
            kinds: dict[Any, list[Member]] = {}
            for parameter in group:
                if parameter.requires_grad and id(parameter) not in known:
                    values = local_tensor(parameter.detach())
                    master = self._options.master and parameter.dtype in HALF
                    if values.numel():
                        member = Member(parameter, index, number, master)
                        kinds.setdefault((parameter.dtype, values.device), []).append(member)
                index += 1
            for members in kinds.values():
                self._lay_out(members)

    def _lay_out(self, members: list[Member]) -> None:
        everyone = self.gradients.members
        first = len(everyone)
        everyone += members
        layouts = self._layouts({first + at: member.local().numel() for at, member in enumerate(members)})
        shards, dtype = self.gradients.shards, self._options.reduce_dtype
        buckets = [Bucket(layout, everyone, shards, dtype) for layout in layouts]
        self.gradients.extend(buckets, first)
        group = self.optimizer.param_groups[members[0].group]
        group["params"] += [piece.tensor for bucket in buckets for piece in bucket.pieces]
        for member in members:
            member.version = member.parameter._version
            self._laid_out(member.parameter)

    def _layouts(self, numels: dict[int, int]) -> list[BucketLayout]:
        size = self._options.bucket_size
        if self._options.partition == "parameters":
            return by_parameters(numels, bucket_size=size, loads=self._loads)
        ranks = self.gradients.shards.size
        return by_elements(numels, num_ranks=ranks, bucket_size=size, whole=self._options.whole)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what somebody else has written into parameters."""
        for bucket in self.gradients.buckets:
            for piece in bucket.pieces:
                piece.refresh()

    @torch.no_grad()
    def gather(self) -> None:
        """Brings every rank's weights to all; buckets without gradients were not changed. Collective."""
        flying: list[tuple[Bucket, Tensor, list[Any]]] = []
        for bucket in self.gradients.buckets:
            if any(member.present for _, member in bucket.slots):
                flying.append((bucket, *bucket.begin_gather()))
            if len(flying) == _UNDER_WAY:
                first, flat, works = flying.pop(0)
                first.finish_gather(flat, works)
        for bucket, flat, works in flying:
            bucket.finish_gather(flat, works)
        for member in self.gradients.members:
            member.version = member.parameter._version
