"""What the stages of the user's real model cost, measured in a few micro-batches that leave no trace.

::

    costs = profile_stage_costs(fwd_fn, inputs, num_microbatches=8)
    best = planner.plan(costs, num_ranks=4, num_microbatches=64)

`forward_backward(schedule="auto")` measures steps that count instead; this is for planning ahead, for a table of what a
cut costs, or for comparing cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.data_parallel import DistributedDataParallelReducer
from torchdistpackage.parallel.measure import measure_step, stage_costs
from torchdistpackage.parallel.pipeline_state import current_state, running_step
from torchdistpackage.parallel.step_plan import leanest_plan
from torchdistpackage.runtime.backward import reachable_leaves
from torchdistpackage.runtime.executor import Executor
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.stage import ForwardFn
from torchdistpackage.runtime.step import ChunkWork
from torchdistpackage.schedule import CostModel, complete, split_backwards, without_communication

__all__ = ["profile_stage_costs"]


def profile_stage_costs(
    fwd_fn: ForwardFn | Sequence[ForwardFn],
    inputs: Any = None,
    num_microbatches: int = 4,
    *,
    placement: str = "loop",
    repeats: int = 1,
) -> CostModel:
    """Measures forward, backward, both halves of it, activations and messages of every stage.

    Collective over the pipeline; arguments as for `forward_backward`. Runs four or more whole steps and puts everything
    back that they touched: gradients, the buffers of modules that ran, the state of random numbers. Data-parallel
    replicas measure without reducing anything. Hooks of yours do run.

    Args:
        fwd_fn: This stage's forward, or one for each of this rank's chunks.
        inputs: This stage's inputs; as large a batch as the micro-batches that are to be planned for.
        num_microbatches: m of the measured steps; the times are medians over its micro-batches.
        placement: `"loop"` or `"v"`, where there are several chunks a rank.
        repeats: Measured steps of each kind.

    Returns:
        On every rank the same: seconds and bytes, one entry a stage.

    Raises:
        PipelineError: Bad arguments, or a failure on another rank.
        ScheduleError: No schedule fits the placement and the number of chunks.

    Example:
        >>> from torchdistpackage.schedule import planner
        >>> stage = nn.Linear(4, 1)
        >>> costs = profile_stage_costs(lambda x: stage(x).mean(), torch.ones(8, 4), num_microbatches=4)
        >>> len(costs.forward), costs.forward[0] > 0, costs.unit
        (1, True, 's')
        >>> planner.plan(costs, num_ranks=1, num_microbatches=64).plan.num_microbatches
        64
    """
    state = current_state()
    transport = state.transport
    with transport.guard("the arguments of profile_stage_costs"):
        functions: list[Any] = list(fwd_fn) if isinstance(fwd_fn, (list, tuple)) else [fwd_fn]
        own = list(inputs) if isinstance(fwd_fn, (list, tuple)) and inputs is not None else [inputs] * len(functions)
        if len(own) != len(functions) or not all(map(callable, functions)) or repeats < 1:
            raise PipelineError(
                f"profile_stage_costs needs one function and one entry of inputs for each chunk, and repeats >= 1; got "
                f"{len(functions)} function(s), {len(own)} entries and repeats={repeats}"
            )
        whole = leanest_plan(placement, transport.num_ranks, num_microbatches, len(functions))
        split = complete(split_backwards(without_communication(whole)))
    steps = []
    with running_step(), _untouched(functions) as guarded, torch.enable_grad():
        for plan in (whole, split):
            executor = Executor(plan, transport)
            for number in range(repeats + 1):  # the first one warms up
                recorder = Recorder(transport.device, memory=plan is whole) if number else None
                work = [ChunkWork(f, inputs=x, reducer=_Silent()) for f, x in zip(guarded, own, strict=True)]
                executor.run(work, signature=", profiling", recorder=recorder)
                if recorder is not None:
                    with transport.guard("gathering what was measured"):
                        steps.append(measure_step(transport, state.control, plan, recorder))
    return stage_costs(steps, whole.placement.num_stages)


@final
class _Silent:
    """Keeps data-parallel wrappers quiet and never reduces."""

    def __init__(self) -> None:
        self._inner = DistributedDataParallelReducer()
        self.watch = self._inner.watch
        self.cancel = self._inner.cancel

    def finish(self) -> None:
        """Leaves the modules as they were."""
        self.cancel()

    def arm(self, output: Any, parameters: frozenset[int] | None) -> None:
        """What was computed is not kept, so that it needs no reducing."""


@contextmanager
def _untouched(functions: Sequence[ForwardFn]) -> Iterator[list[ForwardFn]]:
    """Gives functions to run instead, and puts back what running them changed."""
    gradients: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weak: what one stage sends another is a leaf, too
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def save_buffers(module: nn.Module, _: Any) -> None:
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in buffers:
                buffers[id(buffer)] = (buffer, buffer.clone())

    def guarded(function: Callable[[Any], Any]) -> ForwardFn:
        def forward(argument: Any) -> Any:
            hook = register_module_forward_pre_hook(save_buffers)
            try:
                output = function(argument)
            finally:
                hook.remove()
            for parameter in reachable_leaves([x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]):
                if parameter not in gradients:
                    gradients[parameter], parameter.grad = parameter.grad, None
            return output

        return forward

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield [guarded(function) for function in functions]
        finally:
            for parameter, gradient in gradients.items():  # type: ignore[no-untyped-call]
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers.values():
                    buffer.copy_(before)
