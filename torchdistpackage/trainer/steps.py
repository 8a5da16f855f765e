"""Batches through this rank's stages: a step of training, and one of evaluation, for any splitter's stages.

Every rank of a pipeline reads the same batch and uses what its stages need of it::

    stage 0           args, kwargs                      what the model is called with
    in between        kwargs                            those that the stage's forward takes
    the last one      kwargs, labels, rows              rows: which ones they are, to put outputs into order

Batches that are accumulated and have one shape are run as one longer step: the pipeline is filled once and not k times.
Under a schedule that holds all micro-batches it would cost k times the memory, so there, and where shapes differ, they
follow each other, and reduce once.

Neighbours: `batches.py` makes batches, `losses.py` weighs them, `parallel/pipeline_sched.py` runs the step.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchdistpackage.parallel import forward_backward
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.split.decoder.part import unwrapped
from torchdistpackage.split.pipe import put_aside, put_in_use
from torchdistpackage.split.traced_stage import TracedStage
from torchdistpackage.topology import tpc
from torchdistpackage.trainer.batch_arguments import cut_along_rows, restored
from torchdistpackage.trainer.batches import Batch
from torchdistpackage.trainer.losses import WeightedLoss

__all__ = ["Evaluated", "PipelineSteps"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """What one batch of an evaluation gave; nothing on ranks without the last stage.

    Attributes:
        loss: The sum of the losses of what counts, in float64 on the CPU.
        count: How much counts.
        outputs: The model's outputs, in the order of the rows, on the CPU; empty if they were not asked for.
    """

    loss: float = 0.0
    count: float = 0.0
    outputs: list[Any] = field(default_factory=list)


@final
class PipelineSteps:
    """Runs batches on this rank's stages.

    Args:
        stages: Global index -> module, this rank's, also wrapped for data parallelism.
        num_stages: Of the whole pipeline.
        schedule: As for `forward_backward`.
        microbatches: m, for a batch.
        loss: The loss function with its weights.
        device: Where this rank computes.
        autocast: The dtype of mixed precision; None for none.
        scaler: For float16.
        mask_creator: Makes the attention mask of a batch, on every rank.
        merges: Whether accumulated batches may be run as one step: not where the schedule is a plan of m micro-batches,
            or its memory grows with m.
        is_fixed: Whether the schedule is a plan, so that m cannot be another number.
        quiet: Makes contexts in which gradients are not reduced.

    Example:
        >>> stages, device = {0: nn.Linear(4, 2)}, torch.device("cpu")
        >>> steps = PipelineSteps(stages, 1, schedule="1f1b", microbatches=2, loss=WeightedLoss(), device=device)
        >>> batch = Batch((torch.ones(6, 4),), labels=torch.tensor([0, 1, 0, 1, 0, 1]), rows=6)
        >>> loss = steps.train([batch])  # on the rank of the last stage this replica's share of the loss
        >>> evaluated = steps.evaluate(batch)
        >>> evaluated.count, abs(evaluated.loss / evaluated.count - loss.item()) < 1e-6
        (6.0, True)
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        num_stages: int,
        *,
        schedule: Any,
        microbatches: int,
        loss: WeightedLoss,
        device: torch.device,
        autocast: torch.dtype | None = None,
        scaler: Any = None,
        mask_creator: Callable[..., Any] | None = None,
        merges: bool = False,
        is_fixed: bool = False,
        quiet: Sequence[Callable[[], AbstractContextManager[Any]]] = (),
    ) -> None:
        self._stages, self._last = dict(stages), num_stages - 1
        self._schedule, self._microbatches, self._is_fixed = schedule, microbatches, is_fixed
        self._merges = merges
        self._loss, self._device, self._autocast, self._scaler = loss, device, autocast, scaler
        self._mask_creator, self._quiet = mask_creator, quiet
        self._taken = {index: _taken(module, first=index == 0) for index, module in self._stages.items()}
        self._left_out: set[str] = set()

    @property
    def has_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self._last in self._stages

    def train(self, batches: Sequence[Batch], *, record: bool = False) -> Tensor | None:
        """Forward and backward of the batches of one step; gradients are added to what is there.

        Args:
            batches: This replica's; several are accumulated.
            record: Measure the last call of the pipeline for `last_timeline`.

        Returns:
            On the rank of the last stage this replica's share of the loss of the whole batch: the sum over replicas is
            the loss of the plain loop. None elsewhere.

        Raises:
            PipelineError: Another rank failed. This rank's own exceptions come as they are.
        """
        replicas = tpc.get_dp_size()
        total = max(self._total(batches), 1e-30)
        calls = self._merged(batches) if self._merges else [(batch, self._number(batch)) for batch in batches]
        shares: list[Tensor] = []
        for number, (batch, microbatches) in enumerate(calls):
            final_call = number == len(calls) - 1

            def loss(output: Any, labels: Any, counted: float, real: bool = batch.real) -> Tensor:
                return self._loss.share(output, labels, total, replicas, counted=counted if real else 0.0)

            with ExitStack() as stack:
                stack.enter_context(self._in_use())
                for quiet in () if final_call else self._quiet:
                    stack.enter_context(quiet())
                value = forward_backward(
                    fwd_fn=[self._runner(index, loss) for index in self._stages],
                    inputs=self._bundles(batch),
                    num_microbatches=microbatches,
                    schedule=self._schedule,
                    loss_reduction="sum",
                    record_timeline=record and final_call,
                    scaler=self._scaler,
                )
            if value is not None:
                shares.append(value.detach().float())
        return torch.stack(shares).sum() / replicas if shares else None

    def evaluate(self, batch: Batch, *, with_outputs: bool = False) -> Evaluated:
        """The loss of one batch, without gradients; modules are in the mode in which the caller has put them.

        Args:
            batch: This replica's.
            with_outputs: Keep the model's outputs.

        Raises:
            PipelineError: Another rank failed.
        """
        found: dict[int, Any] = {}

        def loss(output: Any, labels: Any, counted: float, start: int = 0) -> Tensor:
            if with_outputs:
                found[start] = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().float().cpu(), output)
            return self._loss.summed(output, labels, counted=counted if batch.real else 0.0)

        value = forward_backward(
            fwd_fn=[self._runner(index, loss, numbered=True) for index in self._stages],
            inputs=self._bundles(batch),
            num_microbatches=self._number(batch),
            forward_only=True,
            schedule=self._schedule,
            loss_reduction="sum",
        )
        if value is None or not batch.real:
            return Evaluated()
        return Evaluated(float(value), self._loss.count(batch.labels), [found[start] for start in sorted(found)])

    def _total(self, batches: Sequence[Batch]) -> float:
        """What the whole batch counts, on all replicas; the ranks without labels need not know."""
        if not self.has_last_stage:
            return 1.0
        own = sum(self._loss.count(batch.labels) for batch in batches if batch.real)
        if tpc.get_dp_size() == 1:
            return own
        with guarded("adding up what the batch counts"):
            counted = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(counted, group=tpc.get_control_group("data"))
        return float(counted)

    def _number(self, batch: Batch) -> int:
        """Of micro-batches."""
        most = batch.most_microbatches
        return self._microbatches if most is None or self._is_fixed else min(self._microbatches, most)

    def _merged(self, batches: Sequence[Batch]) -> list[tuple[Batch, int]]:
        """Batches of one shape as one, with as many micro-batches as they have together."""
        shapes = [_shape(batch) for batch in batches]
        if len(batches) == 1 or None in shapes or len(set(shapes)) > 1:
            return [(batch, self._number(batch)) for batch in batches]
        leaves = [pytree.tree_flatten((batch.args, batch.kwargs, batch.labels)) for batch in batches]
        joined = [torch.cat(parts) for parts in zip(*(flat for flat, _ in leaves), strict=True)]
        args, kwargs, labels = pytree.tree_unflatten(joined, leaves[0][1])
        rows = sum(batch.rows for batch in batches)
        merged = replace(batches[0], args=args, kwargs=kwargs, labels=labels, rows=rows)
        return [(merged, self._number(batches[0]) * len(batches))]

    def _bundles(self, batch: Batch) -> list[Any]:
        """What each stage of this rank gets of the batch."""
        kwargs = self._with_mask(batch)
        bundles: list[Any] = []
        for index, module in self._stages.items():
            taken = self._taken[index]
            mine = {name: value for name, value in kwargs.items() if taken is None or name in taken}
            if index == 0 and len(mine) < len(kwargs):
                self._tell(kwargs.keys() - mine.keys())
            bundle: dict[str, Any] = {"kwargs": cut_along_rows(unwrapped(module), self._moved(mine))}
            if index == 0:
                bundle["args"] = self._moved(batch.args)
            if index == self._last:
                bundle["labels"] = self._moved(batch.labels)
                bundle["counted"] = batch.labels  # where they came from: counting them does not wait for a GPU
                bundle["number"] = torch.arange(batch.rows)
            bundles.append([bundle])
        return bundles

    def _with_mask(self, batch: Batch) -> dict[str, Any]:
        if self._mask_creator is None:
            return dict(batch.kwargs)
        named = {"input_ids": batch.args[0] if batch.args else None, **batch.kwargs}
        taken = _names_taken(self._mask_creator)
        mask = self._mask_creator(**{key: value for key, value in named.items() if taken is None or key in taken})
        rest = {name: value for name, value in batch.kwargs.items() if name != "attention_mask"}
        return rest if mask is None else {**rest, "attention_mask": mask}

    def _tell(self, names: Any) -> None:
        fresh = sorted(set(names) - self._left_out)
        self._left_out.update(fresh)
        if fresh:
            _log.info("the first stage's forward does not take %s of the batch: left out", ", ".join(fresh))

    def _moved(self, value: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self._device, non_blocking=True), value)

    def _runner(self, index: int, loss: Callable[..., Tensor], numbered: bool = False) -> Callable[[Any], Any]:
        """What the runtime calls for one micro-batch of a stage."""
        module, first, last = self._stages[index], index == 0, index == self._last

        def run(arguments: Any) -> Any:
            *came, bundle = [arguments] if first else arguments
            kwargs = {name: restored(value) for name, value in bundle["kwargs"].items()}
            with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
                output = module(*(bundle["args"] if first else came), **kwargs)
                if not last:
                    return output
                start = {"start": int(bundle["number"][0])} if numbered and len(bundle["number"]) else {}
                return loss(output, bundle["labels"], self._loss.count(bundle["counted"]), **start)

        return run

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """What stages share is looked for in those that are in use: these, while they run, and no other trainer's."""
        modules = [(index, unwrapped(module)) for index, module in self._stages.items()]
        try:
            for index, module in modules:
                put_in_use(module, index, self._last + 1)
            yield
        finally:
            for _, module in modules:
                put_aside(module)


def _shape(batch: Batch) -> Any:
    """What two batches must have alike to be put together along dim 0; None if this one cannot be."""
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.labels))
    if not batch.real or any(not isinstance(x, Tensor) or x.dim() == 0 or len(x) != batch.rows for x in leaves):
        return None
    return str(spec), tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)


def _taken(module: nn.Module, *, first: bool) -> frozenset[str] | None:
    """The keyword arguments that a stage takes; None for any."""
    stage = unwrapped(module)
    if isinstance(stage, TracedStage):
        return None if first else frozenset()  # later ones get theirs from the stages before
    return _names_taken(stage.forward)


def _names_taken(function: Callable[..., Any]) -> frozenset[str] | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
