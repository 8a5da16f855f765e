"""A stage at run time: the user's function, and for each micro-batch what its backward will need.

Knows autograd, knows no rank: what comes in and goes out are messages, who carries them is the executor's business.

::

    message -> leaves -> fwd_fn(argument) -> output, which leaves     saved[i] = leaves, where the backward begins
    several messages -> ... -> Routed: values for several stages        the same, roots by destination, last one first
    gradients of the roots -> backward -> gradients of the leaves     saved[i] is taken
    or in two halves: -> backward_input -> gradients of the leaves    saved[i] is taken, waiting[i] = nodes
                         backward_weight                              waiting[i] is taken
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, final

from torch import Tensor
from torch.autograd.graph import GradientEdge, increment_version
from torch.utils._pytree import TreeSpec

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.backward import (
    BackwardFn,
    Roots,
    beginning,
    differentiable_alias,
    is_compiled,
    loss_root,
    pairs,
    run_backward,
    weighted_loss,
)
from torchdistpackage.runtime.layout import describe_spec
from torchdistpackage.runtime.message import Message, flatten
from torchdistpackage.runtime.weight_grad import PutOff, find_cut
from torchdistpackage.runtime.words import note_call
from torchdistpackage.schedule.routing import Routed, Skips

__all__ = ["ForwardFn", "GradientReducer", "Output", "Stage"]

ForwardFn = Callable[[Any], Any]
Gradients = list[Tensor | None] | dict[int, list[Tensor | None]] | None  # by destination where a Routed was returned


class GradientReducer(Protocol):
    """Reduces a stage's gradients over its data-parallel replicas, once a step; handed in by `parallel/`."""

    def watch(self, only: bool) -> AbstractContextManager[object]:
        """Surrounds the first forward of the step: finds what has to be reduced and keeps it quiet until `arm`.

        Args:
            only: Whether it is the only forward of the step: what reduces in every backward then works as it is.
        """

    def arm(self, output: Any, parameters: frozenset[int] | None) -> None:
        """Comes right before the last backward of the step, so that reduction overlaps with it.

        Args:
            output: What the user's function returned for the micro-batch.
            parameters: The ids of the parameters that this backward will still reach, if it is the second half of one.
        """

    def finish(self) -> None:
        """Comes after the last backward: returns when the gradients are reduced."""

    def cancel(self) -> bool:
        """Comes after a failure: leaves the user's modules as they were.

        Returns:
            Whether it could: not in the middle of a reduction.
        """


class Output(NamedTuple):
    """What a forward returned, flattened once."""

    leaves: list[Any]
    spec: TreeSpec | None
    skips: Skips = ()


class _Saved(NamedTuple):
    """What the backward of one micro-batch needs."""

    leaves: list[Tensor]
    roots: list[GradientEdge]
    output: Any  # on the last stage the loss; elsewhere only where somebody will ask for it
    routed: bool = False


class _Waiting(NamedTuple):
    """What the weights' half of a backward needs."""

    put_off: list[PutOff]
    roots: Roots | None
    output: Any


@final
class Stage:
    """One chunk of the model on this rank.

    Args:
        index: Global index of the stage.
        num_stages: How many stages the model has.
    """

    def __init__(self, index: int, num_stages: int) -> None:
        self.index = index
        self.is_last = index == num_stages - 1
        self._saved: dict[int, _Saved] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._described: TreeSpec | None = None
        self.end_step()

    def begin_step(
        self,
        forward_fn: ForwardFn,
        backward_fn: BackwardFn | None,
        reducer: GradientReducer | None,
        scale: Callable[[Tensor], Any] | None = None,
        *,
        training: bool,
    ) -> None:
        """Takes the user's functions for this step."""
        self._forward_fn, self._backward_fn, self._training = forward_fn, backward_fn, training
        self._scale = scale
        self.reducer = reducer if training else None
        self._watched = False
        self.unsplit: list[str] = []  # why an input gradient ran the whole backward, for each time

    def end_step(self) -> None:
        """Lets go of the user's functions, and of what a failed step left behind."""
        self._forward_fn, self._backward_fn, self.reducer, self._scale = _no_step, None, None, None
        self._saved.clear()
        self._waiting.clear()

    def forward(
        self,
        microbatch: int,
        message: Message | None,
        own: list[Any],
        *,
        far: Sequence[Message] = (),
        only: bool = False,
        last: bool = False,
    ) -> Any:
        """Runs the user's function on one micro-batch.

        Args:
            microbatch: Which one.
            message: From the stage before; None on the first stage.
            own: This stage's slices of its own inputs.
            far: From stages further before, first one first; the function gets their values in front of the others.
            only: Whether this is the one micro-batch of the step: torch's data-parallel wrappers then
                work as they are.
            last: Whether its backward will be the stage's last one of the step.

        Returns:
            What the function returned.

        Raises:
            Exception: The user's own, with what the function got as a note.
        """
        leaves: list[Tensor] = []
        aliases: list[Tensor] = []
        came = [value for each in far for value in _received(each, leaves, aliases)] if far else []
        arguments = own if message is None else [*came, *_received(message, leaves, aliases), *own]
        count = len(arguments)
        argument = arguments[0] if count == 1 else arguments
        try:
            if self.reducer is not None and not self._watched:
                self._watched = True
                with self.reducer.watch(only):
                    output = self._forward_fn(argument)
            else:
                output = self._forward_fn(argument)
        except Exception as error:
            note_call(error, self.index, message, far, own, count)
            raise
        for leaf, alias in zip(leaves, aliases, strict=True):
            if alias._version:
                # Changed in place. If it was handed over by another stage of this rank, that stage's output is the same
                # memory: autograd must know, so that it refuses what it would refuse in the plain loop.
                increment_version(leaf)
        if self._training:
            asked_for = self.is_last or self._backward_fn is not None or (last and self._watched)
            begin = output
            if self.is_last and self._scale is not None and isinstance(output, Tensor):
                begin = self._scale(output)
            self._saved[microbatch] = _Saved(leaves, [], begin if asked_for else None)
        return output

    def refuse_compiled(self, output: Any, schedule: str) -> None:
        """Comes after the first forward, before any backward, under a schedule that splits backwards.

        Raises:
            PipelineError: The stage is compiled.
        """
        if is_compiled([leaf for leaf in flatten(_values(output))[0] if isinstance(leaf, Tensor)]):
            raise PipelineError(
                f"stage {self.index} is compiled by torch.compile, whose backward runs as a whole, and schedule "
                f"{schedule!r} runs every backward in two halves. Choose a schedule with whole backwards (1f1b, "
                "eager-1f1b, interleaved-1f1b, ...), or leave this stage uncompiled"
            )

    def flatten(self, microbatch: int, output: Any) -> Output:
        """Flattens an output that goes on to the next stage, and notes which of its tensors want a gradient.

        Raises:
            TransportError: It has a container that another rank could not rebuild.
            PipelineError: It cannot pass a gradient on to the input.
        """
        leaves, spec = flatten(output)
        if microbatch == 0 and spec is not None and spec != self._described:
            describe_spec(spec, f"stage {self.index}")  # a stage of this rank refuses what one elsewhere would
            self._described = spec
        if self._training:
            saved = self._saved[microbatch]
            saved.roots.extend(beginning(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
            if saved.leaves and not saved.roots:
                raise PipelineError(
                    f"stage {self.index} received tensors that require gradients but returned none that does: the "
                    "stages before it would never be trained. Does it detach its input or run under torch.no_grad()? "
                    "If that is meant, detach the output of the stage before, or freeze its parameters"
                )
        return Output(leaves, spec)

    def flatten_routed(self, microbatch: int, output: Routed, skips: Skips) -> dict[int, Output]:
        """The same for values that go to several stages, by stage, the last one first; `skips` is the table to say on.

        The roots stand in this order, too: where one tensor goes to several stages, the plain loop adds the gradient of
        its last user first. A tensor has one beginning, however often it is sent: two would be added in another order.
        """
        found: dict[int, Output] = {}
        begins: dict[int, GradientEdge] = {}
        roots: list[GradientEdge] = []
        for to in sorted({*output.values, self.index + 1}, reverse=True):
            leaves, spec = flatten(tuple(output.values.get(to, ())))
            found[to] = Output(leaves, spec, skips if to == self.index + 1 else ())
            for leaf in leaves if self._training else ():
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    if id(leaf) not in begins:
                        begins[id(leaf)] = beginning(leaf)
                    roots.append(begins[id(leaf)])
        if self._training:
            self._saved[microbatch] = self._saved[microbatch]._replace(roots=roots, routed=True)
        return found

    def backward(self, microbatch: int, gradients: Gradients, weight: float, *, last: bool) -> list[Tensor | None]:
        """Runs the backward of one micro-batch.

        Args:
            microbatch: Which one; its forward has run.
            gradients: Gradients of the tensors that were sent on; None on the last stage. By destination, the last one
                first, if the stage returned a `Routed`.
            weight: What the micro-batch counts in the loss.
            last: Whether no further backward of this stage follows in the step.

        Returns:
            Gradients of the tensors that were received, in their order.

        Raises:
            PipelineError: No gradient reached the input.
        """
        saved = self._saved.pop(microbatch)
        if last:
            self._arm(saved.output, None)
        self._run_whole(saved, gradients, weight)
        return self._input_gradients(saved)

    def backward_input(
        self, microbatch: int, gradients: Gradients, weight: float, *, last: bool
    ) -> list[Tensor | None]:
        """Runs the half of the backward that other stages wait for; arguments, result and errors as of `backward`.

        Where the halves cannot be told apart the whole backward runs, and `unsplit` says why. `last` says whether the
        other half of this micro-batch is the stage's last backward of the step.
        """
        saved = self._saved.pop(microbatch)
        # Only a reducer still looks at it, and only at the last one: it holds what the end of the stage has saved.
        output = saved.output if self._watched and last else None
        if self._backward_fn is not None:
            reason: str | None = "a bwd_fn was given, which does what it does at once"
            self._run_whole(saved, gradients, weight)
        elif not saved.leaves:
            self._waiting[microbatch] = _Waiting([], self._roots(saved, gradients, weight), output)
            return []  # nobody waits for an input gradient: all of it is the weights'
        else:
            reason = self._run_input_half(microbatch, saved, self._roots(saved, gradients, weight), output)
        if reason is not None:
            self._waiting[microbatch] = _Waiting([], None, output)
            self.unsplit.append(reason)
        return self._input_gradients(saved)

    def backward_weight(self, microbatch: int, *, last: bool) -> None:
        """Runs the other half: accumulates the gradients of the weights.

        Args:
            microbatch: Which one; its `backward_input` has run.
            last: Whether no further backward of this stage follows in the step.
        """
        waiting = self._waiting.pop(microbatch)
        if last:
            reached = frozenset(id(p) for node in waiting.put_off if node.is_reached for p in node.parameters)
            self._arm(waiting.output, None if waiting.roots is not None else reached)
        if waiting.roots is not None:
            run_backward(waiting.roots)
        for node in waiting.put_off:
            node.run()

    def _run_input_half(self, microbatch: int, saved: _Saved, roots: Roots, output: Any) -> str | None:
        """Returns the reason if it had to run the whole backward."""
        if not roots.tensors:  # no later stage made use of what this one sent: there is nothing to run
            self._waiting[microbatch] = _Waiting([], None, output)
            return None
        cut = find_cut(roots.tensors, saved.leaves)
        if isinstance(cut, str):
            run_backward(roots)
            return cut
        for node in cut.put_off:
            node.node.register_prehook(node)
        run_backward(roots, keep_graph=True, inputs=(*saved.leaves, *cut.at_once))
        cut.free()
        self._waiting[microbatch] = _Waiting(cut.put_off, None, output)
        return None

    def _run_whole(self, saved: _Saved, gradients: Gradients, weight: float) -> None:
        custom, output = self._backward_fn, saved.output
        if custom is None:
            run_backward(self._roots(saved, gradients, weight))
        elif self.is_last:
            custom(weighted_loss(output, weight), None)
        elif isinstance(gradients, dict):
            if any(gradients.values()):
                custom(output, gradients)
        elif gradients:
            custom(output, gradients[0] if isinstance(output, Tensor) else list(gradients))

    def _roots(self, saved: _Saved, gradients: Gradients, weight: float) -> Roots:
        if self.is_last:
            return loss_root(saved.output, weight)
        if isinstance(gradients, dict):
            gradients = [gradient for each in gradients.values() for gradient in each]
        return pairs(saved.roots, gradients or [])

    def _arm(self, output: Any, parameters: frozenset[int] | None) -> None:
        if self._watched and self.reducer is not None:
            self.reducer.arm(_values(output), parameters)

    def _input_gradients(self, saved: _Saved) -> list[Tensor | None]:
        if not saved.leaves:
            return []
        result = [leaf.grad for leaf in saved.leaves]
        # Where values have several ways to the loss, a stage on one of them may well have no gradient to give.
        if not saved.routed and all(gradient is None for gradient in result):
            raise PipelineError(
                f"the backward of stage {self.index} gave its input no gradient: the stages before it would never be "
                "trained. Does the stage detach its input? If that is meant, detach the output of the stage before, "
                "or freeze its parameters"
            )
        return result


def _no_step(_: Any) -> Any:
    raise AssertionError("a stage runs outside of a step")


def _values(output: Any) -> Any:
    """An output as a pytree, which a `Routed` is not."""
    return dict(output.values) if type(output) is Routed else output


def _received(message: Message, leaves: list[Tensor], aliases: list[Tensor]) -> list[Any]:
    """The arguments that a message stands for; tensors that want a gradient are added to `leaves`, with their aliases.

    A list or tuple is spread into several arguments; anything else, a dict or a named tuple too, is one.
    """
    layout, tensors, _ = message
    assert layout is not None
    arguments = []
    for about, tensor in zip(layout.tensors, tensors, strict=True):
        if about.requires_grad:
            leaves.append(tensor.requires_grad_())
            tensor = differentiable_alias(tensor)
            aliases.append(tensor)
        arguments.append(tensor)
    if layout.spec is None:
        return arguments
    tree = layout.tree(arguments)
    return list(tree) if type(tree) in (list, tuple) else [tree]
