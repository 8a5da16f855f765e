"""A schedule bound to this rank's stages: takes a batch as a model takes it, and runs it through the pipeline.

What a stage gets for one micro-batch is one bundle, cut out of what the user gave on this rank::

    rank of stage 0         {input, kwargs}              kwargs, the model's own arguments, are given on every rank:
    in between              {kwargs}                     each stage makes masks and positions for itself
    rank of the last one    {kwargs, target, number}     number: which rows they are, to put losses into order

Neighbours: `functional.py` makes these, `auto_pipeline.py` calls them, `parallel/pipeline_sched.py` runs the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError, ScheduleError
from torchdistpackage.parallel import forward_backward
from torchdistpackage.parallel.batch_rows import rows_on_every_rank
from torchdistpackage.parallel.step_plan import placement_of, resolve_plan
from torchdistpackage.schedule import Plan, describe
from torchdistpackage.split.pipeline_stage import PipelineStage
from torchdistpackage.split.ties import ties_in
from torchdistpackage.trainer.batch_arguments import count_rows, cut_along_rows, restored

__all__ = ["PipelineSchedule", "check_shared"]

LossFn = Callable[[Any, Any], Tensor]


@final
class PipelineSchedule:
    """Runs batches on this rank's stages.

    Args:
        schedule: A name of the catalogue, or a plan.
        stages: This rank's, in the order of the model.
        loss_fn: `loss_fn(logits, target)`, on one micro-batch, a scalar.
        n_microbatches: Micro-batches of a batch of the usual size.
        microbatch_size: Rows of a micro-batch.
        mean: Whether loss and gradients are means over the batch, or sums over micro-batches.

    Attributes:
        n_microbatches: As given.
        stages: As given.
        loss_fn: As given.

    Raises:
        ScheduleError: The schedule does not run that many stages a rank, or the plan is for other sizes.

    Example:
        >>> stage = PipelineStage(torch.nn.Linear(4, 3), stage_index=0, num_stages=1)
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> schedule = PipelineSchedule("1f1b", [stage], loss_fn, n_microbatches=4, microbatch_size=2)
        >>> losses = []
        >>> loss = schedule.step(torch.ones(8, 4), target=torch.zeros(8, dtype=torch.int64), losses=losses)
        >>> len(losses), torch.allclose(loss, sum(losses))
        (4, True)
        >>> schedule.eval(torch.ones(8, 4)).shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        schedule: str | Plan,
        stages: Sequence[PipelineStage],
        loss_fn: LossFn | None,
        *,
        n_microbatches: int,
        microbatch_size: int,
        mean: bool = False,
    ) -> None:
        self.schedule, self.stages, self.loss_fn = schedule, list(stages), loss_fn
        self.n_microbatches, self.microbatch_size = n_microbatches, microbatch_size
        self._reduction = "mean" if mean else "sum"
        self._checked = False
        _check_fit(schedule, self.stages, n_microbatches)

    @property
    def name(self) -> str:
        """The schedule's name."""
        return self.schedule.name if isinstance(self.schedule, Plan) else describe(self.schedule).name

    @property
    def plan(self) -> Plan:
        """What a batch of the usual size runs, for all ranks."""
        chunks = len(self.stages)
        return resolve_plan(self.schedule, self._num_ranks, self.n_microbatches, forward_only=False, chunks=chunks)

    def step(
        self, model_input: Any = None, *, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Trains on one batch: forward and backward; gradients are added to what is there.

        Args:
            model_input: The batch, on the rank of the first stage; ignored elsewhere.
            target: What the loss takes, on the rank of the last stage; ignored elsewhere.
            losses: A list to which that rank's micro-batches' losses are appended, in their order.
            **kwargs: The model's own arguments, on every rank. Tensors are cut along dim 0, or along what the model's
                hook `get_pipeline_kwargs_chunk_dims(kwargs)` says; those of one row or none go to each as they are.

        Returns:
            The loss on the rank of the last stage, None elsewhere.

        Raises:
            PipelineError: Something is missing, or another rank failed.
        """
        return self._run(model_input, target, losses, kwargs, forward_only=False)  # type: ignore[no-any-return]

    def eval(
        self, model_input: Any = None, *, target: Any = None, losses: list[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Evaluates one batch, without gradients; arguments as of `step`.

        Returns:
            On the rank of the last stage the loss, or without a target the logits of all rows; None elsewhere.

        Raises:
            PipelineError: As of `step`.
        """
        return self._run(model_input, target, losses, kwargs, forward_only=True)

    def __repr__(self) -> str:
        places = [stage.stage_index for stage in self.stages]
        return f"PipelineSchedule({self.name!r}, stages {places} here, {self.n_microbatches} micro-batches)"

    def _run(
        self, model_input: Any, target: Any, losses: list[Tensor] | None, kwargs: dict[str, Any], *, forward_only: bool
    ) -> Any:
        bundles: list[dict[str, Any]] = []

        def prepared() -> int | None:
            self._check_stages()
            made, rows = self._bundles(model_input, target, kwargs, forward_only)
            bundles.extend(made)
            return rows

        given = {name for name, value in kwargs.items() if value is not None} - {"input_ids", "labels"}
        placement = placement_of(self.schedule, self._num_ranks, len(self.stages))
        rows = rows_on_every_rank(prepared, placement.owner(0), given)
        found: list[tuple[int, Tensor]] = []
        result = forward_backward(
            fwd_fn=[_runner(stage, self.loss_fn, found) for stage in self.stages],
            inputs=[[bundle] for bundle in bundles],
            num_microbatches=self._microbatches(rows),
            forward_only=forward_only,
            schedule=self.schedule,
            loss_reduction=self._reduction,
        )
        if losses is not None:
            losses.extend(loss for _, loss in sorted(found, key=lambda item: item[0]))
        return result

    @property
    def _num_ranks(self) -> int:
        if isinstance(self.schedule, Plan):
            return self.schedule.placement.num_ranks
        return self.stages[0].num_stages // len(self.stages)

    def _microbatches(self, rows: int) -> int:
        """A plan of one's own has its number of micro-batches; else their size is what counts."""
        return self.n_microbatches if isinstance(self.schedule, Plan) else -(-rows // self.microbatch_size)

    def _bundles(
        self, model_input: Any, target: Any, kwargs: dict[str, Any], forward_only: bool
    ) -> tuple[list[dict[str, Any]], int | None]:
        """One bundle a stage, and the rows of the batch where the first stage is."""
        given = dict(kwargs)
        ids = given.pop("input_ids", None)
        model_input = ids if model_input is None else model_input
        arguments = cut_along_rows(self.stages[0].submod, given)
        bundles: list[dict[str, Any]] = []
        rows = None
        for stage in self.stages:
            bundle: dict[str, Any] = {"kwargs": arguments}
            if stage.is_first:
                rows = count_rows(model_input)
                if rows is None:
                    raise PipelineError(
                        "the first stage got no input: pass step(input_ids, ...) on this rank, a tensor (rows, ...)"
                    )
                bundle["input"] = model_input
            if stage.is_last:
                self._check_target(target, given, forward_only)
                bundle["target"] = target
                count = count_rows(target if target is not None else given.get("labels"))
                if count is not None:
                    bundle["number"] = torch.arange(count)
            bundles.append(bundle)
        return bundles, rows

    def _check_target(self, target: Any, given: Mapping[str, Any], forward_only: bool) -> None:
        labels = given.get("labels") is not None
        if target is not None and labels:
            raise PipelineError(
                "target and labels are both given: with target the loss is loss_fn(logits, target), with labels it is "
                "the model's own; pass one of them"
            )
        if target is not None and self.loss_fn is None:
            raise PipelineError("a target is given, but no loss_fn; pass build(model, loss_fn=...)")
        if target is None and not labels and not forward_only:
            raise PipelineError(
                "the last stage got no target: pass step(..., target=labels) on this rank; for logits call eval()"
            )

    def _check_stages(self) -> None:
        """What can go wrong between build and the first step."""
        if self._checked:
            return
        check_shared(self.stages)
        for stage in self.stages:
            lost = [name for name, tensor in stage.submod.named_parameters() if tensor.is_meta]
            if lost:
                raise PipelineError(
                    f"{lost[0]} of stage {stage.stage_index} is on the meta device: call "
                    "materialize_stages(dict(enumerate(ap.parts)), device), of torchdistpackage.split, load weights "
                    "into each part (load_whole_model_state_dict), make the optimizer, then step"
                )
        self._checked = True


def check_shared(stages: Sequence[PipelineStage]) -> None:
    """Whether parameters that stages of this rank share are still one.

    Raises:
        PipelineError: They are not.
    """
    same: dict[str, int] = {}
    for stage in stages:
        for tie in ties_in(stage.submod).values():
            if same.setdefault(tie.name, id(tie.parameter)) != id(tie.parameter):
                raise PipelineError(
                    f"{' and '.join(tie.names)} were one parameter, on two stages of this rank, and are two now. If "
                    "to_empty has made two, assign one to the other before making the optimizer. If fully_shard has, "
                    "choose a schedule whose first and last stage are on two ranks (1f1b, interleaved-1f1b, ...), or "
                    "wrap the stages in DistributedDataParallel"
                )


def _check_fit(schedule: str | Plan, stages: Sequence[PipelineStage], n_microbatches: int) -> None:
    if not stages:
        raise ScheduleError("a schedule needs at least one stage on this rank")
    count, each = stages[0].num_stages, len(stages)
    if isinstance(schedule, Plan):
        if (schedule.placement.num_stages, schedule.num_microbatches) != (count, n_microbatches):
            raise ScheduleError(
                f"plan {schedule.name!r} has {schedule.placement.num_stages} stages and {schedule.num_microbatches} "
                f"micro-batches, but the model is cut into {count} stages and a batch into {n_microbatches}"
            )
        return
    facts = describe(schedule)
    if count % each:
        raise ScheduleError(f"{count} stages, {each} of them on this rank, are not the same number on every rank")
    if not facts.runs(each):
        more = f" or another multiple of {facts.chunks_step}" if facts.chunks_step else ""
        raise ScheduleError(
            f"schedule {facts.name!r} runs {facts.chunks}{more} stage(s) a rank, but this rank has {each} of {count}: "
            "choose a schedule for that many ('interleaved-1f1b' runs any number), or cut into another number of stages"
        )


def _runner(stage: PipelineStage, loss_fn: LossFn | None, found: list[tuple[int, Tensor]]) -> Callable[[Any], Any]:
    """What the runtime calls for one micro-batch of a stage."""

    def run(arguments: Any) -> Any:
        *came, bundle = [arguments] if stage.is_first else arguments
        received = bundle["input"] if stage.is_first else came[0] if len(came) == 1 else tuple(came)
        kwargs = {name: restored(value) for name, value in bundle["kwargs"].items()}
        output = stage.submod(received, **kwargs)
        if not stage.is_last or (bundle["target"] is None and kwargs.get("labels") is None):
            return output
        loss = output if bundle["target"] is None or loss_fn is None else loss_fn(output, bundle["target"])
        if isinstance(loss, Tensor) and loss.numel() == 1 and "number" in bundle:
            found.append((int(bundle["number"][0]), loss.detach()))
        return loss

    return run
