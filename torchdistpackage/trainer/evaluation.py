"""An evaluation over a whole dataset, in any layout: every row counts once, and every rank gets the numbers.

Each replica runs its share of the rows. What a user's `compute_metrics` needs goes to the replicas' last stages and is
put back into the order of the dataset there::

    replica 0   rows 0 2 4 | 6 8        outputs 0 2 4 6 8
    replica 1   rows 1 3 5 | 7          outputs 1 3 5 7          ->   0 1 2 3 4 5 6 7 8
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from torchdistpackage.errors import TrainerError
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json
from torchdistpackage.trainer.batches import Batch
from torchdistpackage.trainer.losses import IGNORED
from torchdistpackage.trainer.process_layout import from_every_rank
from torchdistpackage.trainer.steps import Evaluated, PipelineSteps

__all__ = ["EvalPrediction", "in_eval_mode", "run_evaluation"]


class EvalPrediction(NamedTuple):
    """What `compute_metrics` gets.

    Attributes:
        predictions: The model's outputs for all rows, as a numpy array.
        label_ids: Their labels.

    Example:
        >>> def accuracy(found):
        ...     return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
        >>> outputs, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])
        >>> accuracy(EvalPrediction(outputs.numpy(), labels.numpy()))
        {'accuracy': 0.5}
    """

    predictions: Any
    label_ids: Any


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts all of a module into evaluation mode; afterwards every part has the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def run_evaluation(
    steps: PipelineSteps,
    batches: Iterable[Batch],
    prefix: str,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss and speed, and what `compute_metrics` finds; the same on every rank. Collective over all replicas.

    Args:
        steps: Runs a batch.
        batches: This replica's, as many as every other one's.
        prefix: Before the names.
        compute_metrics: Takes all outputs and labels; runs on the rank of the last stage of the first replica.
        after_batch: Is called after each.

    Raises:
        TrainerError: There are no rows, or outputs that are no tensors are to be gathered.
        PipelineError: Another rank has failed.
    """
    began, count, rows = time.perf_counter(), 0, 0
    found: list[Evaluated] = []
    labels: list[Any] = []
    for batch in batches:
        result = steps.evaluate(batch, with_outputs=compute_metrics is not None)
        count += 1
        rows += batch.rows if batch.real else 0
        found.append(result)
        if compute_metrics is not None and steps.has_last_stage and batch.real:
            labels.append(batch.labels)
        after_batch()
    losses = [sum(result.loss for result in found), sum(result.count for result in found)]
    everyone = from_every_rank([*losses, rows if tpc.is_first_in_pipeline_group() else 0])
    loss, counted, samples = (sum(column) for column in zip(*everyone, strict=True))
    if not counted:
        raise TrainerError(f"the evaluation saw {samples} rows in {count} batches, and no label in them counts")
    seconds = time.perf_counter() - began
    metrics = {
        f"{prefix}_loss": loss / counted,
        f"{prefix}_samples": samples,
        f"{prefix}_runtime": seconds,
        f"{prefix}_samples_per_second": samples / seconds,
        f"{prefix}_steps_per_second": count / seconds,
    }
    if compute_metrics is not None:
        outputs = [part for result in found for part in result.outputs]
        metrics |= _computed(compute_metrics, outputs, labels, prefix, steps.has_last_stage)
    told: dict[str, float] = from_every_rank(metrics)[0]  # clocks differ
    return told


def _computed(
    compute_metrics: Callable[[EvalPrediction], Mapping[str, float]],
    outputs: list[Any],
    labels: list[Any],
    prefix: str,
    has_last_stage: bool,
) -> dict[str, float]:
    """What the user's function finds, on every rank."""
    mine: dict[str, float] | None = None
    if has_last_stage:
        if not all(isinstance(each, Tensor) for each in (*outputs, *labels)):
            raise TrainerError("compute_metrics needs a model and labels that are single tensors")
        predictions, wanted = _in_order(outputs), _in_order(labels)
        if tpc.is_first_in_data_group():
            with guarded("compute_metrics"):
                given = compute_metrics(EvalPrediction(predictions.numpy(), wanted.numpy()))
            mine = {
                name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": float(value)
                for name, value in given.items()
            }
    return next((each for each in from_every_rank(mine) if each is not None), {})


def _in_order(parts: list[Tensor]) -> Tensor:
    """The rows of all replicas as they were in the dataset: row i of replica r is row i * d + r.

    Where batches are padded to different lengths, all are to the longest, with -100, as Hugging Face's Trainer does.
    """
    own = _stacked([part.cpu() for part in parts]) if parts else torch.empty(0)
    replicas = tpc.get_dp_size()
    if replicas == 1:
        return own
    group = tpc.get_control_group("data")
    with guarded("gathering the outputs of the replicas"):
        shapes = gather_json([list(own.shape), str(own.dtype).removeprefix("torch.")], group)
        gathered: list[Tensor] = []
        for rank, (shape, dtype) in enumerate(shapes):
            buffer = own.contiguous() if rank == group.rank() else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(buffer, src=dist.get_global_rank(group, rank), group=group)
            gathered.append(buffer)
    counts = [len(part) for part in gathered]
    joined = _stacked([part for part in gathered if len(part)])
    whole, start = torch.empty_like(joined), 0
    for rank, count in enumerate(counts):
        whole[rank::replicas][:count] = joined[start : start + count]
        start += count
    return whole


def _stacked(parts: list[Tensor]) -> Tensor:
    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([_padded(part, longest) for part in parts])


def _padded(part: Tensor, sizes: list[int]) -> Tensor:
    """With every dim but the first as long as that."""
    missing = [wanted - size for wanted, size in zip(sizes, part.shape[1:], strict=True)]
    if not any(missing):
        return part
    return functional.pad(part, [amount for size in reversed(missing) for amount in (0, size)], value=IGNORED)
