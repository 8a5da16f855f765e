"""One training step of a cut model under this library, torch.distributed.pipelining and DeepSpeed.

Every runtime gets its own copies of the same stages and an optimizer that changes nothing, so that a step is zeroing,
m forwards and backwards, and one call of `optimizer.step()`, which is also where the gradients can be looked at.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from torchdistpackage import forward_backward, tpc
from torchdistpackage.schedule import Placement, build

Loss = Callable[[Tensor, Tensor], Tensor]


class Still(torch.optim.Optimizer):
    """Leaves every weight as it is; keeps the gradients of a step if it is told to `watch`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {})
        self.watch, self.seen = False, []

    def step(self, closure: Any = None) -> None:
        if self.watch:
            self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Cut:
    """This rank's stages under a placement, as they came out of the splitter; runtimes get copies."""

    placement: Placement
    stages: dict[int, nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.stages.values() for p in module.parameters()]

    def copied(self) -> tuple[dict[int, nn.Module], Still]:
        stages = copy.deepcopy(self.stages)
        return stages, Still(p for module in stages.values() for p in module.parameters())


@dataclass(frozen=True)
class Job:
    """One schedule of one runtime.

    Attributes:
        runtime: Its name.
        schedule: Its own name for the schedule.
        like: This library's name for it.
        cut: Where its stages come from.
        optimizer: Has the gradients of a watched step.
        step: Runs one training step.
    """

    runtime: str
    schedule: str
    like: str
    cut: Cut
    optimizer: Still
    step: Callable[[], Any]


def ours(schedule: str, cut: Cut, x: Tensor, y: Tensor, m: int, loss: Loss) -> Job:
    """A step with this library."""
    stages, optimizer = cut.copied()
    last = cut.placement.num_stages - 1
    plan = build(schedule, tpc.get_pp_size(), m)

    def forward(stage: int) -> Callable[[Any], Any]:
        if stage < last:
            return stages[stage]
        return lambda received: loss(stages[stage](received[0]), received[1])

    functions = [forward(stage) for stage in stages]
    inputs = [x if stage == 0 else y if stage == last else None for stage in stages]

    def step() -> None:
        forward_backward(optimizer, functions, None, inputs, m, schedule=plan)
        optimizer.step()

    return Job("this library", schedule, schedule, cut, optimizer, step)


def torchs(name: str, like: str, cut: Cut, x: Tensor, y: Tensor, m: int, loss: Loss) -> Job:
    """A step with torch's runtime."""
    stages, optimizer = cut.copied()
    rank, placement, group = tpc.get_pp_rank(), cut.placement, tpc.get_group("pipe")
    pieces = [
        PipelineStage(stage, s, placement.num_stages, torch.device("cpu"), group=group) for s, stage in stages.items()
    ]
    schedule = get_schedule_class(name)(pieces[0] if len(pieces) == 1 else pieces, m, loss_fn=loss)
    arguments = (x,) if rank == placement.owner(0) else ()
    target = {"target": y} if rank == placement.loss_rank else {}

    def step() -> None:
        optimizer.zero_grad()
        schedule.step(*arguments, **target)
        optimizer.step()

    return Job("torch", name, like, cut, optimizer, step)


def deepspeeds(cut: Cut, x: Tensor, y: Tensor, m: int, loss: Loss) -> Job:
    """A step with DeepSpeed's PipelineEngine over the processes' own group; raises whatever DeepSpeed raises."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.pipe import PipelineModule

        # For reductions only, which a pipeline has none of; it would be compiled here and now.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
        stages, optimizer = cut.copied()
        size = tpc.get_pp_size()
        layers = [stages.get(stage, nn.Identity()) for stage in range(size)]  # one "layer" a stage: the cut is ours
        pipeline = PipelineModule(layers, num_stages=size, partition_method="uniform", loss_fn=loss)
        config = {
            "train_micro_batch_size_per_gpu": len(x) // m,
            "gradient_accumulation_steps": m,
            "gradient_clipping": 0.0,  # without this it clips to 1.0
            "steps_per_print": 10**9,
        }
        engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=config, dist_init_required=False)
    batches = list(zip(x.chunk(m), y.chunk(m), strict=True))
    return Job("DeepSpeed", "1F1B", "1f1b", cut, optimizer, lambda: engine.train_batch(iter(batches)))


def deepspeed_or_reason(*arguments: Any) -> tuple[Job | None, str]:
    """The job, or one line on why DeepSpeed does not start here; the same on every rank."""
    job, reason = None, ""
    try:
        job = deepspeeds(*arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    reason = next(filter(None, reasons), "")
    return None if reason else job, reason
