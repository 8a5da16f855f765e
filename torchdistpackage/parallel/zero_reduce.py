"""When the gradients of a sharded optimizer are averaged: once, however many backwards there were.

::

    backward  backward  backward   step                        gradients gather in param.grad, and are reduced once
                                   | reduce | update | gather

    backward with overlap_comm     step                        bucket 2 is reduced while the backward computes bucket 1
         | reduce 2 | 1 | 0        | update | gather

Before a reduction the ranks say which parameters have a gradient at all: one that nobody uses has none afterwards, so
that the optimizer leaves it alone as it would in a plain loop. A rank that has all gradients need not read the answer,
and its GPU need not be waited for.

Buckets go last first, the order in which a backward completes them, in the same order on all ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.variable import Variable

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.pipeline_state import step_under_way
from torchdistpackage.parallel.zero_buckets import Bucket, Member
from torchdistpackage.parallel.zero_group import ShardGroup

__all__ = ["GradientShards"]

_UNDER_WAY = 2  # buckets: one is on its way while the next is filled; more would only take memory


@final
class GradientShards:
    """The buckets of one optimizer.

    Args:
        shards: Who shares.
        keep: Every rank keeps all averaged gradients in the parameters (stage 1); else only its chunks (stage 2).
        overlap: Reduce during the backward.
    """

    def __init__(self, shards: ShardGroup, *, keep: bool, overlap: bool) -> None:
        self.shards, self._keep, self._overlap = shards, keep, overlap
        self.members: list[Member] = []
        self.buckets: list[Bucket] = []
        self.quiet = False
        self._bucket_of: dict[int, Bucket] = {}  # number of a member -> its bucket, if all of it is in one
        self._settled = self._stepped = False
        self._flying: list[Bucket] = []
        # of the backward that is under way, if it is overlapped:
        self._queued = False
        self._next = 0  # bucket to be launched, counted from the last
        self._waiting: dict[int, int] = {}  # id of a bucket -> parameters that have not got their gradient
        self._fired: set[int] = set()
        self._had: list[bool] = []
        self._votes: list[tuple[list[bool], Tensor]] = []

    def extend(self, buckets: Iterable[Bucket], first: int) -> None:
        """More buckets, of the members from number `first` on; every rank does so at the same time."""
        for bucket in buckets:
            self.buckets.append(bucket)
            self._bucket_of.update({slot.parameter: bucket for slot, _ in bucket.slots})
        for number, member in enumerate(self.members[first:], start=first) if self._overlap else ():
            hook = _hook(weakref.ref(self), number)
            member.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def settle(self) -> None:
        """Reduces what was not reduced yet. Collective.

        Raises:
            PipelineError: Gradients would be added to those of a step that was made.
        """
        self._end_backward()
        self._finish()
        if not self._settled or any(member.changed() for member in self.members):
            self._refuse_stale()
            self._reduce()
            self._finish()
            self.remember()
        for bucket in self.buckets:
            bucket.publish()

    def _reduce(self) -> None:
        self._settled = True
        if not self.members:
            return
        had = [member.parameter.grad is not None for member in self.members]
        present = _read(had, self._vote(had))
        self._note(present)
        for bucket in reversed(self.buckets):
            if any(present[slot.parameter] for slot in bucket.layout.slots):
                self._launch(bucket)
                self._land(_UNDER_WAY - 1)

    def _note(self, present: list[bool]) -> None:
        for member, one in zip(self.members, present, strict=False):
            member.present = one or (member.present and not self._keep)

    def _finish(self) -> None:
        """Waits for what was launched."""
        for had, votes in self._votes:
            self._note(_read(had, votes))
        self._votes = []
        self._land(0)

    def remember(self) -> None:
        """The gradients that the parameters keep are averages."""
        for member in self.members if self._keep else ():
            member.remember()

    def _refuse_stale(self) -> None:
        if self._stepped and not self._keep:
            raise PipelineError(
                "gradients were computed after step() without optimizer.zero_grad() between: this rank's shards still "
                "hold the gradients of that step. Call optimizer.zero_grad() in every step (model.zero_grad() does not "
                "reach the shards), or use stage=1 to add up gradients over several steps"
            )

    def stepped(self) -> None:
        """Comes after the optimizer has used the gradients."""
        self._stepped = True

    def _vote(self, had: list[bool]) -> Tensor:
        return self.shards.all_reduce(torch.tensor(had, dtype=torch.uint8), dist.ReduceOp.MAX)

    def _launch(self, bucket: Bucket) -> None:
        if bucket in self._flying:  # of the backward before
            self._land(0)
        bucket.begin_reduce(keep=self._keep)
        self._flying.append(bucket)

    def _land(self, most: int) -> None:
        while len(self._flying) > most:
            self._flying.pop(0).finish_reduce(keep=self._keep)

    @torch.no_grad()
    def forget(self, *, set_to_none: bool) -> None:
        """`zero_grad`."""
        self._end_backward()
        self._land(0)
        self._votes, self._settled, self._stepped = [], False, False
        for member in self.members:
            member.seen = None
            member.present &= not set_to_none
        for bucket in self.buckets:
            if set_to_none:
                bucket.gradient = None
            elif bucket.gradient is not None:
                bucket.gradient.zero_()
            bucket.publish()

    # ---- during the backward ----

    def _ready(self, number: int) -> None:
        """A parameter has got its gradient."""
        if self.quiet or step_under_way():
            return
        if not self._queued:
            self._refuse_stale()
            self._queued, self._fired = True, set()
            self._had = [member.parameter.grad is not None for member in self.members]
            self._waiting = {id(bucket): len(bucket.slots) for bucket in self.buckets}
            Variable._execution_engine.queue_callback(self._end_backward)
        self._had[number] = True
        if number in self._fired:
            if self._keep:
                raise PipelineError(
                    f"parameter {self.members[number].index} of the optimizer got two gradients in one backward (as "
                    "with reentrant checkpointing); use stage=2, or overlap_comm=False"
                )
            return
        self._fired.add(number)
        self._waiting[id(self._bucket_of[number])] -= 1
        while self._next < len(self.buckets):
            bucket = self.buckets[-1 - self._next]
            if self._waiting[id(bucket)]:
                return
            self._next += 1
            self._launch(bucket)
            if not self._keep:  # else who has a gradient must be known first
                self._land(_UNDER_WAY - 1)

    @torch.no_grad()
    def _end_backward(self) -> None:
        """Launches what the backward has not completed, so that every rank has launched all when it ends."""
        if not self._queued:
            return
        while self._next < len(self.buckets):
            bucket = self.buckets[-1 - self._next]
            self._next += 1
            self._launch(bucket)
            if not self._keep:
                self._land(_UNDER_WAY - 1)
        self._votes.append((self._had, self._vote(self._had)))
        self._queued, self._next, self._settled = False, 0, True
        if self._keep:  # the next backward adds to the averaged gradients
            self._finish()
            self.remember()


def _hook(shards: weakref.ref[GradientShards], number: int) -> Callable[[Tensor], None]:
    def fired(_: Any) -> None:
        alive = shards()
        if alive is not None:
            with torch.no_grad():
                alive._ready(number)

    return fired


def _read(had: list[bool], votes: Tensor) -> list[bool]:
    """Which parameters any rank has a gradient of."""
    return had if all(had) else [bool(one) for one in votes.tolist()]
