"""The one program that runs plans.

::

    RECV   post a receive, do not wait
    F      take the input -> stage.forward  -> keep the output for SEND
    B      take the gradient -> stage.backward -> keep the input's gradient for SEND
    I, W   the same in two halves: stage.backward_input, and later stage.backward_weight
    SEND   pack and send, do not wait            (what goes past stages is sent and taken with F and B: skips.py)
    REDUCE_GRAD   the stage's gradients are complete over its data-parallel replicas

The state of a micro-batch lives in three places only: the stage's saved inputs and outputs, `mail.py` (results on their
way to a SEND or to another stage of this rank, and beside it `skips.py`) and the transport's mail. All are emptied by
taking, and a step ends with all of them empty. Neighbours: `program.py` resolves the plan, `stage.py` knows autograd,
`transport.py` carries messages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime import message as wire
from torchdistpackage.runtime.mail import Mail, gradient_list
from torchdistpackage.runtime.message import Kind, Message
from torchdistpackage.runtime.microbatch import Slices, merge_outputs, microbatch_sizes, slice_inputs
from torchdistpackage.runtime.program import Instruction, compile_program
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.runtime.skips import SkipMail
from torchdistpackage.runtime.stage import Gradients, Output, Stage
from torchdistpackage.runtime.step import ChunkWork, StepExtension, StepResult
from torchdistpackage.runtime.transport import TensorShard, Transport
from torchdistpackage.schedule import Op, Plan, verify
from torchdistpackage.schedule.routing import Routed, Skips

__all__ = ["Executor"]

_log = logging.getLogger(__name__)


@final
class Executor:
    """Runs one plan on one rank, as often as wanted.

    Args:
        plan: Verified, with communication.
        transport: This rank's transport.

    Attributes:
        plan: With the skips of the last step, which the stages say: from the next step on the memory of their messages
            is used again as early as that of all others.

    Example:
        >>> from torchdistpackage.runtime.loopback import loopback
        >>> from torchdistpackage.schedule import build
        >>> executor = Executor(build("1f1b", 1, 2), loopback(1)[0])
        >>> w = torch.ones(1, requires_grad=True)
        >>> result = executor.run([ChunkWork(lambda x: (w * x).mean(), inputs=torch.tensor([1.0, 2.0, 3.0]))])
        >>> result.weights, w.grad
        ([0.6666666666666666, 0.3333333333333333], tensor([2.]))
    """

    def __init__(self, plan: Plan, transport: Transport) -> None:
        self._given, self.transport = plan, transport
        count = plan.placement.num_stages
        self._stages = {index: Stage(index, count) for index in plan.placement.local_stages(transport.rank)}
        self._mail = Mail(plan, transport)
        self._skips = SkipMail(self._mail, transport, plan.skips)
        self._proved: dict[Skips, Plan] = {plan.skips: plan}
        self._adopt(plan.skips)
        self._splits = any(at.op is Op.INPUT_GRAD for at in self._program.instructions)
        self._recorder: Recorder | None = None
        self._looks = self._splits  # whether a stage is compiled, in the first step
        self._told = False

    def _adopt(self, skips: Skips) -> None:
        """Goes on with the plan for this table of skips: another table proves other messages delivered."""
        if skips not in self._proved:
            self._proved[skips] = self._given.with_skips(skips)
            verify(self._proved[skips])
        self.plan = self._proved[skips]
        self._program = compile_program(self.plan, self.transport.rank, self.transport.receives_ahead)
        handlers = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.INPUT_GRAD: self._backward,
            Op.WEIGHT_GRAD: self._backward_weight,
            Op.SEND_F: self._send_forward,
            Op.SEND_B: self._send_backward,
            Op.RECV_F: self._post,
            Op.RECV_B: self._post,
            Op.REDUCE_GRAD: self._reduce,
        }
        self._steps = [(handlers[at.op], at) for at in self._program.instructions]

    def run(
        self,
        work: Sequence[ChunkWork],
        *,
        mean: bool = True,
        signature: str = "",
        wire_dtype: torch.dtype | None = None,
        shard: TensorShard | None = None,
        around: StepExtension | None = None,
        recorder: Recorder | None = None,
        may_run_whole: bool = False,
    ) -> StepResult:
        """Runs one step.

        Args:
            work: One entry for each local chunk.
            mean: Micro-batches count by their share of the batch; otherwise each counts 1.
            signature: What else the ranks must agree on, besides the plan.
            wire_dtype: Cast floating tensors to this dtype while they travel.
            shard: Tensor-parallel group that shares the transfer.
            around: What else the ranks exchange before and after the plan.
            recorder: Gets the time of every action.
            may_run_whole: A compiled stage under a split schedule runs whole instead of being refused: it is measured.

        Raises:
            PipelineError: Another rank failed, or the ranks disagree. This rank's own exception is raised as it is,
                with the plan's marked grid as a note; every other rank then raises `PipelineError`.
        """
        at: Instruction | None = None
        watch = self.transport.watch
        watch.begin("the begin of the step")
        try:
            self._begin(work, mean=mean, signature=signature, wire_dtype=wire_dtype, shard=shard)
            if around is not None:
                around.begin_step(self.transport, training=not self.plan.forward_only)
            self._recorder = self._mail.recorder = recorder
            self._looks = self._looks and not may_run_whole
            for handle, at in self._steps:
                watch.at = at
                if recorder is None:
                    handle(at)
                else:
                    begin = recorder.mark()
                    handle(at)
                    recorder.add(at, begin)
            at, watch.at = None, "the end of the step"
            if around is not None:
                around.end_step(self.transport)
            outputs = [self._outputs[i] for i in sorted(self._outputs)]
            sizes = microbatch_sizes(self._rows, self.plan.num_microbatches)[: self._filled]
            weights = [self._weight(size) for size in sizes]
            # Before the end: outputs that do not fit together are everybody's failure.
            merged = merge_outputs(outputs, weights) if self.plan.forward_only and outputs else None
            self._end()
            watch.end()
            self._looks = False
        except BaseException as error:
            if around is not None:
                around.cancel()
            self._fail(error, at)
        unsplit = self._unsplit()
        self._forget()
        if self._skips.table is not None and self._skips.table != self.plan.skips:
            self._adopt(self._skips.table)
            self.transport.shrink()  # in this step, no message of a skip could be proved taken before the end
        return StepResult(outputs, weights, self._rows, merged, unsplit)

    # --- begin and end ------------------------------------------------------------------------------------------------

    def _begin(self, work: Sequence[ChunkWork], *, mean: bool, signature: str, wire_dtype: Any, shard: Any) -> None:
        training = not self.plan.forward_only
        self._mean, self._rows, self._filled = mean, 0, 0
        self._outputs: dict[int, Any] = {}
        self._skips.begin_step()
        for stage, chunk in zip(self._stages.values(), work, strict=True):
            stage.begin_step(chunk.forward_fn, chunk.backward_fn, chunk.reducer, chunk.scale, training=training)
        self.transport.begin_step(
            f"{self._given.signature}{signature}", training=training, wire_dtype=wire_dtype, shard=shard
        )
        if training and not torch.is_grad_enabled():
            raise PipelineError("a training step runs under torch.no_grad(); for evaluation pass forward_only=True")
        self._own: dict[int, Slices] = {}
        for index, chunk in zip(self._stages, work, strict=True):
            self._own[index] = slice_inputs(chunk.inputs, self.plan.num_microbatches)
        if 0 in self._own:
            rows = self._own[0].rows
            if rows is None:
                raise PipelineError(
                    "the first stage got no input to cut into micro-batches: pass inputs=samples (a tensor, or a list "
                    f"or pytree of tensors) on rank {self.transport.rank}, where the batch enters the pipeline"
                )
            self._learn_rows(rows)

    def _learn_rows(self, rows: int) -> None:
        """The first stage knows the batch; the others learn its rows from their first message."""
        for index, own in self._own.items():
            if own.rows is not None and own.rows != rows:
                raise PipelineError(
                    f"the batch has {rows} rows on the first stage, but the inputs of stage {index} (rank "
                    f"{self.transport.rank}) have {own.rows}: samples and targets must be of one batch"
                )
        self._rows = self._mail.rows = rows
        self._filled = min(rows, self.plan.num_microbatches)
        self._sizes = microbatch_sizes(rows, self.plan.num_microbatches)
        self._last_backward = {
            stage: [i for i in order if i < self._filled][-1]
            for stage, order in self._program.backwards.items()
            if order
        }

    def _end(self) -> None:
        self.transport.finish_step(self._program.token_from, self._program.token_to)
        self._mail.end()

    def _forget(self) -> None:
        """Lets go of everything that belongs to the user: between steps the executor holds nothing."""
        self._own, self._outputs, self._recorder = {}, {}, None
        self._mail.forget()
        self._skips.forget()
        for stage in self._stages.values():
            stage.end_step()

    def _unsplit(self) -> dict[int, tuple[int, str]]:
        """`StepResult.unsplit`; the first time that there is any, the log has it, too."""
        found = {s: (len(stage.unsplit), stage.unsplit[0]) for s, stage in self._stages.items() if stage.unsplit}
        if found and not self._told:
            self._told = True  # a schedule that lives on the split is no better than 1F1B then
            for index, (count, reason) in found.items():
                _log.warning(
                    "stage %d: the backward of %d of %d micro-batches could not be split and ran whole, because %s",
                    *(index, count, self._filled, reason),
                )
        return found

    def _weight(self, size: int) -> float:
        return size / self._rows if self._mean else 1.0

    # --- one method an operation --------------------------------------------------------------------------------------

    def _post(self, at: Instruction) -> None:
        self.transport.inlet(at.peer).post()

    def _forward(self, at: Instruction) -> None:
        stage, i, skips = self._stages[at.stage], at.microbatch, self._skips
        message: Message | None = None
        far: Sequence[Message] = ()
        if at.stage > 0:
            message = self._mail.take(at, Kind.FORWARD, at.stage - 1)
            if not self._rows:
                self._learn_rows(message.rows)
            layout = message.layout
            if layout is not None and (layout.skips or skips.table != ()):
                skips.learn(layout.skips, at.stage, "got with its input")
                far = skips.take_values(at, message, training=not self.plan.forward_only)
        if i >= self._filled:
            result: Output | None = None  # no rows: skipped on every stage
        else:
            slices = self._own[at.stage].microbatches
            own, slices[i] = slices[i], []  # what a stage got is its own: its graph alone says how long it is held
            with nullcontext() if self._recorder is None else self._recorder.forward(at.stage, own):
                # Several chunks may share parameters, which are complete only after the last chunk; and the halves of
                # a backward may leave out parameters that a whole one would have reported. That another micro-batch has
                # no rows does not count: it may have some on a replica, and all replicas must reduce in one way.
                only = self.plan.num_microbatches == 1 and len(self._stages) == 1 and not self._splits
                last = i == self._last_backward.get(at.stage)
                output = stage.forward(i, message, own, far=far, only=only, last=last)
            if self._looks:
                stage.refuse_compiled(output, self.plan.name)
            if type(output) is Routed:
                self._pass_routed(at, output)
                return
            if stage.is_last:
                self._outputs[i] = output if self.plan.forward_only else _detached(output)
                return
            if skips.table != ():
                skips.plain(at.stage, output)
            result = stage.flatten(i, output)
        if not stage.is_last:
            self._mail.pass_on(at, Kind.FORWARD, result, at.stage + 1)

    def _pass_routed(self, at: Instruction, output: Routed) -> None:
        """To the neighbour first: everybody waits for that."""
        skips = self._skips
        skips.check(at.stage, output)
        outputs = self._stages[at.stage].flatten_routed(at.microbatch, output, skips.table or ())
        self._mail.pass_on(at, Kind.FORWARD, outputs[at.stage + 1], at.stage + 1)
        skips.send_values(at, outputs, training=not self.plan.forward_only)

    def _backward(self, at: Instruction) -> None:
        stage, i, skips = self._stages[at.stage], at.microbatch, self._skips
        gradients: Gradients = None
        if not stage.is_last:
            message = self._mail.take(at, Kind.BACKWARD, at.stage + 1)
            if message.layout is not None:
                gradients = gradient_list(message)
                if skips.sent:
                    gradients = skips.take_gradients(at, gradients)
        result: Output | None = None
        found: list[Tensor | None] = []
        if i < self._filled:
            weight = self._weight(self._sizes[i])
            run = stage.backward if at.op is Op.BACKWARD else stage.backward_input
            found = run(i, gradients, weight, last=i == self._last_backward[at.stage])
            near = skips.neighbours_part(at, found) if skips.received else found
            result = Output(*wire.flatten(near[0] if len(near) == 1 else near))
        if at.stage > 0:
            self._mail.pass_on(at, Kind.BACKWARD, result, at.stage - 1)
            if skips.received:
                skips.send_gradients(at, found)

    def _backward_weight(self, at: Instruction) -> None:
        if at.microbatch < self._filled:
            last = at.microbatch == self._last_backward[at.stage]
            self._stages[at.stage].backward_weight(at.microbatch, last=last)

    def _send_forward(self, at: Instruction) -> None:
        self._mail.send_kept(at, Kind.FORWARD)

    def _send_backward(self, at: Instruction) -> None:
        self._mail.send_kept(at, Kind.BACKWARD)

    def _reduce(self, at: Instruction) -> None:
        reducer = self._stages[at.stage].reducer
        if reducer is not None:
            reducer.finish()

    # --- failure ------------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException, at: Instruction | None) -> NoReturn:
        """Tells the other ranks, cleans up, and raises what is this rank's to raise."""
        reducers = [stage.reducer for stage in self._stages.values() if stage.reducer is not None]
        whole = all([reducer.cancel() for reducer in reducers])  # a list: each of them is asked
        self._forget()
        grid = ""
        if at is not None:
            mark = (self.transport.rank, at.position)
            grid = f"the step's plan, this rank's position marked:\n{self.plan.to_text(mark=mark, window=4)}"
        action = "the begin or end of the step" if at is None else str(at.action)
        self.transport.fail(error, action, grid, whole=whole)


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else None
