"""Reduces the gradients of a set of parameters over replicas, as soon as a backward has made them.

Buckets go in one order on every replica, whatever order gradients come in; the last one waits for the end, because it
says whether all that went before still holds::

    backward     gradients of the last layers ............ of the first layers | finish
    bucket 0                 [ready, goes ...............]
    bucket 1                                [ready, goes ..............]
    last bucket                                                                  [goes, waits: anything late? takes all]

*Late* is a gradient to which something was added after it had been sent: by a second backward, or by the user. Then
every replica sends once more, as it is at the end, so that the result is always that of the gradients that each
replica had when it called `finish`. Nothing is lost by the wait, as the gradients of the first layers come last anyway.

Neighbours: `naive_ddp.py` and `moe_data_parallel.py` are what users see of it; `data_parallel.py` keeps it quiet within
a pipelined step; `gradient_buckets.py` has the memory.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.gradient_buckets import Bucket, Slot, bucket_layout
from torchdistpackage.parallel.same_start import agree_on_parameters
from torchdistpackage.parallel.sparse_gradients import reduce_sparse_gradient
from torchdistpackage.topology.expert_replicas import LEAVE_ALONE, different_experts

__all__ = ["GradientReduction", "ReductionOfStep", "ReductionOptions", "reduced_by", "reduced_twice"]

_log = logging.getLogger(__name__)

_reduced_by: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weak reference to its reduction


def reduced_by(parameter: Tensor) -> str | None:
    """What reduces the parameter's gradient by buckets: "NaiveDDP", "MoEDP"; None for nothing."""
    reference = _reduced_by.get(parameter)  # type: ignore[no-untyped-call]
    reduction: GradientReduction | None = None if reference is None else reference()
    return None if reduction is None else reduction._what


def reduced_twice(name: str, other: str, what: str) -> str:
    """The error of a parameter that two kinds of owners would reduce."""
    return f"{name} is reduced by a {other} already, and would be by this {what} again: {LEAVE_ALONE}"


@final
class ReductionOptions:
    """How gradients are reduced; one object for the classes that offer these to the user.

    Args:
        reduce_op: `"avg"` or `"sum"`.
        bucket_cap_mb: MiB of a bucket.
        as_view: Gradients live in the buckets.
        sync: Nothing is reduced before the end.
        iterations: Backwards until a gradient is complete.
        verbose: Log how long the end took.

    Raises:
        PipelineError: One of them is out of its range.
    """

    def __init__(
        self, reduce_op: str, bucket_cap_mb: float, as_view: bool, sync: bool, iterations: int, verbose: bool
    ) -> None:
        name = str(getattr(reduce_op, "name", reduce_op)).lower()  # torch's ReduceOp.AVG, too
        if name not in ("avg", "mean", "sum"):
            raise PipelineError(f"reduce_op must be 'avg' or 'sum', got {reduce_op!r}")
        if not bucket_cap_mb > 0:
            raise PipelineError(f"bucket_cap_mb must be positive, got {bucket_cap_mb!r}; 25 is usual")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise PipelineError(f"num_grad_acc_iter must be a whole number of backwards >= 1, got {iterations!r}")
        self.sums, self.cap = name == "sum", bucket_cap_mb * 2**20
        self.as_view, self.sync, self.iterations, self.verbose = as_view, sync, iterations, verbose


@final
class GradientReduction:
    """The gradients of some parameters and their reduction over one group.

    Args:
        named: The parameters, in the order of the model, with their names; also those that are frozen.
        group: The replicas; more than one.
        options: How.
        what: What it belongs to, for messages.
        sparse: The ids of parameters whose gradients are sparse.

    Raises:
        PipelineError: The replicas have different parameters.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        group: Any,
        options: ReductionOptions,
        what: str,
        sparse: Collection[int] = (),
    ) -> None:
        self._group, self._options, self._what = group, options, what
        self._slots = [Slot(name, p, sums=options.sums, sparse=id(p) in sparse) for name, p in named]
        self._buckets: list[Bucket] = []
        self._sparse: list[Slot] = []
        self._kinds: list[Any] = []
        self._lock = threading.Lock()  # a backward over several devices has a thread for each
        self._open = self._late = self._broken = False
        self._next = self._count = 0
        self._quiet = 0
        self._wanted = options.iterations
        self._claim()
        kinds = [
            f"{slot.name} {tuple(p.shape)} {p.dtype} {p.requires_grad}"
            for slot in self._slots
            if (p := slot.parameter) is not None
        ]
        agree_on_parameters(what, kinds, group)
        self._lay_out()

    def _claim(self) -> None:
        """Notes whose the parameters are: two kinds of owners would both reduce them."""
        for slot in self._slots:
            parameter = slot.parameter
            if parameter is None:
                continue
            other = reduced_by(parameter)
            if other is not None and other != self._what:
                raise PipelineError(reduced_twice(slot.name, other, self._what))
            if wrong := different_experts([parameter], self._group):
                raise PipelineError(f"{self._what} with {slot.name}: {wrong}; {LEAVE_ALONE}")
        for slot in self._slots:
            if slot.parameter is not None:
                _reduced_by[slot.parameter] = weakref.ref(self)

    # --- what the owner calls -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Comes before a forward: there will be something to reduce, also on a replica that then has no gradient.

        Raises:
            PipelineError: Gradients were cleared while they were on their way; or a failure has broken the group.
        """
        if self._broken:
            raise PipelineError(
                f"a failure has cut off the reduction of this {self._what}: set the process groups up again and wrap "
                "its module anew"
            )
        if self._was_changed():
            raise PipelineError(
                f"gradients of this {self._what} were cleared or changed while their reduction was under way: after "
                "every backward call reduce_gradients(), and only then the optimizer and zero_grad()"
            )
        if not self._open:
            self._open = True
            self._lay_out()

    def finish(self, done: Collection[int] = ()) -> None:
        """Reduces what is not yet reduced; nothing, if nothing has happened since the last time.

        A replica that had nothing to run takes part all the same, if it has cleared or used its gradients meanwhile.

        Args:
            done: The ids of parameters that others have reduced.
        """
        idle = not self._open
        if idle and self._count > 0 and not any(slot.is_other() for slot in self._slots):
            return
        if idle or self._broken:
            self.begin()
        for slot in self._slots:
            slot.idle = idle
        start = time.perf_counter()
        changed = self._options.as_view and self._was_changed()
        self._broken = True  # if it does not come to its end, nobody knows what the others have sent
        with torch.no_grad():
            self._reduce(frozenset(done))
        for slot in self._slots:
            slot.settle()
        self._reset()
        self._broken = self._open = False
        self._count += 1
        if self._options.verbose:
            _log.info("%s: reduce_gradients took %.3f ms", self._what, 1e3 * (time.perf_counter() - start))
        if changed:
            raise PipelineError(
                f"gradients of this {self._what} live in its buckets (gradient_as_bucket_view=True) and were changed "
                "while they were on their way: call reduce_gradients() right after the backward, and only then what "
                "reads or changes gradients"
            )

    def wait(self) -> None:
        """Returns when all that is under way has come; gradients are taken by `finish`."""
        for bucket in self._buckets[: self._next]:
            bucket.wait()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Gradients only add up; the next `finish` after it reduces them all."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    def close(self) -> None:
        """Takes no further notice of the parameters."""
        for slot in self._slots:
            slot.unhook()

    @property
    def is_open(self) -> bool:
        """Whether a forward or a backward has come since the last reduction."""
        return self._open

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient."""
        return [p for slot in self._slots if (p := slot.parameter) is not None and p.requires_grad]

    # --- what a pipelined step calls ----------------------------------------------------------------------------------

    def hush(self, quiet: bool) -> None:
        """From here to there gradients only add up."""
        self._quiet += 1 if quiet else -1

    def arm(self) -> None:
        """The next gradient of each parameter is its last one in this step."""
        self.begin()
        self._wanted = 1
        for slot in self._slots:
            slot.hits = 0
        for bucket in self._buckets:
            bucket.pending = len(bucket.slots)

    def cancel(self, *, whole: bool) -> None:
        """Forgets a step that has failed.

        Args:
            whole: Whether no replica can have begun to reduce.
        """
        self._broken = self._broken or not whole or self._next > 0
        for slot in self._slots:
            slot.rewind()
        self._reset()

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _after_adding(self, slot: Slot) -> None:
        slot.after_adding()
        if self._broken:
            return
        with self._lock:
            if not self._open:
                self.begin()
            if slot.bucket is None:
                return
            bucket = self._buckets[slot.bucket]
            if slot.on_its_way:
                self._late = True
            elif not self._quiet and not self._options.sync:
                slot.hits += 1
                if slot.hits == self._wanted:
                    bucket.pending -= 1
                    self._launch_ready()

    def _launch_ready(self) -> None:
        while self._next < len(self._buckets) - 1 and not self._buckets[self._next].pending:
            self._launch(late=False)

    def _launch(self, *, late: bool) -> None:
        with torch.no_grad():
            self._buckets[self._next].launch(late=late)
        self._next += 1

    # --- the reduction ------------------------------------------------------------------------------------------------

    def _reduce(self, done: Collection[int]) -> None:
        for slot in self._slots:
            slot.skipped = id(slot.parameter) in done
        several = len(self._buckets) > 1 and not self._options.sync
        late = self._late or (not self._options.as_view and self._was_changed())
        while self._next < len(self._buckets):
            self._launch(late=late)
        self.wait()
        if several and self._buckets[-1].is_late():
            for bucket in self._buckets[:-1]:
                bucket.launch_again()
            self.wait()
        for bucket in self._buckets:
            bucket.take()
        for slot in self._sparse:
            reduce_sparse_gradient(slot, self._group)

    def _was_changed(self) -> bool:
        sent = (slot for bucket in self._buckets[: self._next] for slot in bucket.slots)
        return any(slot.was_changed() for slot in sent)

    def _reset(self) -> None:
        self._next, self._late, self._wanted = 0, False, self._options.iterations
        for bucket in self._buckets:
            bucket.rewind()

    def _lay_out(self) -> None:
        """Cuts the trainable parameters into buckets, again if they are others than before or have moved."""
        found = [slot.kind for slot in self._slots]
        if found == self._kinds:
            return
        self._kinds = found
        trainable = [slot for slot, kind in zip(self._slots, found, strict=True) if kind is not None and kind[0]]
        for slot in self._slots:
            slot.bucket, slot.view = None, None
        before = self._options.as_view or self._options.sums
        for slot in trainable:
            hooks = _Hooks(self, slot)
            slot.hook(hooks.before if before else None, hooks.after)
        self._sparse = [slot for slot in trainable if slot.sparse]
        layout = bucket_layout([slot for slot in reversed(trainable) if not slot.sparse], self._options.cap)
        options = self._options
        self._buckets = [Bucket(part, self._group, sums=options.sums, as_view=options.as_view) for part in layout]
        for number, part in enumerate(layout):
            for slot in part:
                slot.bucket = number


class _Hooks:
    """What parameters call: the reduction is held weakly, so that it ends with its owner."""

    def __init__(self, reduction: GradientReduction, slot: Slot) -> None:
        self._reduction, self._slot = weakref.ref(reduction), slot

    def before(self, _: Tensor) -> None:
        if self._reduction() is not None:
            self._slot.before_adding()

    def after(self, _: Tensor) -> None:
        reduction = self._reduction()
        if reduction is not None:
            reduction._after_adding(self._slot)


@final
class ReductionOfStep:
    """A reduction within one pipelined step: quiet until its last backward.

    Args:
        module: What the user knows it by.
        reduction: The reduction.
    """

    def __init__(self, module: Any, reduction: GradientReduction) -> None:
        self.module, self._reduction = module, reduction
        self._silent = False
        reduction.begin()
        self._hush(True)

    def parameters(self) -> list[Tensor]:
        """Those that want a gradient."""
        return self._reduction.parameters()

    def arm(self, roots: list[Tensor]) -> None:
        """Comes right before the last backward."""
        self._hush(False)
        self._reduction.arm()

    def finish(self, reached: frozenset[int] | None, output: Any) -> None:
        """Comes after the last backward."""
        self._hush(False)
        self._reduction.finish()

    def reduce(self, done: Collection[int]) -> None:
        """Reduces gradients that are complete, but for those that are done."""
        self._hush(False)
        self._reduction.finish(done)

    def release(self, *, whole: bool) -> None:
        """Leaves everything as it was before the step."""
        if self._silent or not whole:
            self._hush(False)
            self._reduction.cancel(whole=whole)

    def _hush(self, quiet: bool) -> None:
        if quiet is not self._silent:
            self._silent = quiet
            self._reduction.hush(quiet)
