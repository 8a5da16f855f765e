r"""Values that go past stages, from the stage that makes them straight to each one that uses them, on one rank.

::

    stage 0 | F: h to 1, mask to 3 ---------------------------\
    stage 1 |      takes h: the message brings the table       |        the table: every (from, to), here ((0, 3),)
    stage 2 |           and passes it on                       v
    stage 3 |                F: the message of 2 says that 0 sends something, too: takes it, then runs
            |                B: gradients to 2, and those of the skip to 0
    stage 0 | B: gradients of 1 and of 3; where a tensor went to both, autograd adds them, that of the last user first

Nobody tells the executor which skips there are: stages say it with what they return (`Routed`), and every message to a
neighbour carries the table in its layout, which is described once. All waits go along with the chain of neighbours (see
`verify.py`), so that a skip cannot make a proved plan hang. Neighbours: `mail.py` moves, `stage.py` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from torchdistpackage.errors import PipelineError, ScheduleError
from torchdistpackage.runtime.mail import Mail, gradient_list
from torchdistpackage.runtime.message import Message, flatten
from torchdistpackage.runtime.program import Instruction
from torchdistpackage.runtime.stage import Output
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule.routing import Routed, Skips, check_skips, destinations, skips_of, sources

__all__ = ["SkipMail"]

_Cell = tuple[int, int]  # stage, micro-batch
_SAME_CUT = "the stages are not of one cut of the model: cut it in the same way on every rank"


@final
class SkipMail:
    """The skips of one plan on one rank.

    Args:
        mail: Moves them.
        transport: Is told which ranks may wait for this one.
        given: The table that the plan carries; empty if the stages are to say it.

    Attributes:
        table: The one of this step; None as long as no stage of this rank has said or heard one.
        sent: For each micro-batch whose stage returned a `Routed`, the later stages that will send gradients back.
        received: For each micro-batch that skips came to: who sent how many values that want a gradient, in the order
            in which the stage got them.
    """

    def __init__(self, mail: Mail, transport: Transport, given: Skips) -> None:
        self._mail, self._transport, self._given = mail, transport, given
        self.table: Skips | None = None
        self.sent: dict[_Cell, tuple[int, ...]] = {}
        self.received: dict[_Cell, list[tuple[int, int]]] = {}

    def begin_step(self) -> None:
        """Forgets the step before: this one may be another model's."""
        self.table, self._by = (self._given, "the plan carries") if self._given else (None, "")
        if self._given:
            self._note_partners(self._given)

    def forget(self) -> None:
        """Comes after each step."""
        self.sent, self.received = {}, {}

    def learn(self, table: Skips, stage: int, how: str) -> None:
        """Takes a table for that of the step, or compares it with the one that is known.

        Args:
            table: What was said.
            stage: The stage of this rank that said or heard it.
            how: Which of the two, in words.

        Raises:
            PipelineError: They differ, or it cannot be a table of this many stages.
        """
        known, count = self.table, len(self._mail.owners)
        if known is None:
            try:
                check_skips(table, count)
            except ScheduleError as error:
                raise PipelineError(f"stage {stage} {how} a wrong table of skips: {error}") from None
            self.table, self._by = table, f"stage {stage} {how}"
            self._note_partners(table)
        elif known != table:
            if self._given:
                raise PipelineError(
                    f"the plan carries the skips {known}, but stage {stage} {how} {table}. Build the plan with "
                    f"skips={table}, or cut the model as the plan says"
                )
            raise PipelineError(f"{self._by} the skips {known}, but stage {stage} {how} {table}: {_SAME_CUT}")

    def plain(self, stage: int, output: object) -> None:
        """Comes where a stage before the last one returned no `Routed`.

        Raises:
            PipelineError: The pipeline has skips.
        """
        if self.table:
            raise PipelineError(
                f"{self._by} the skips {self.table}, but stage {stage} returned a {type(output).__name__} in place of "
                "a Routed: fwd_fn must return what the stage's module returned, as it is"
            )
        self.table, self._by = (), f"stage {stage} returned"

    def check(self, stage: int, output: Routed) -> None:
        """Whether what a stage returned fits the table.

        Raises:
            PipelineError: It does not.
        """
        count = len(self._mail.owners)
        if stage == count - 1:
            raise PipelineError(
                f"stage {stage} is the last one, but it returned a Routed with values for the stages "
                f"{sorted(output.values)}: return the loss (training) or the output (evaluation)"
            )
        if output.skips != self.table:
            try:
                table = skips_of(output.skips)
            except ScheduleError as error:
                raise PipelineError(f"stage {stage} returned a wrong table of skips: {error}") from None
            self.learn(table, stage, "returned")
        wanted = destinations(self.table or (), stage)
        for to, values in output.values.items():
            if type(to) is not int or not stage < to < count:
                raise PipelineError(
                    f"stage {stage} returned values for stage {to!r}; it can send to later stages only, {stage + 1} to "
                    f"{count - 1}"
                )
            if to > stage + 1 and to not in wanted:
                raise PipelineError(
                    f"stage {stage} returned values for stage {to}, but its table of skips has only {self.table}: add "
                    f"({stage}, {to}) to the table on every stage"
                )
            if type(values) not in (tuple, list):
                raise PipelineError(
                    f"stage {stage} returned a {type(values).__name__} for stage {to}; a Routed has a tuple of values "
                    "for each stage, of one value if there is only one: (value,)"
                )
        missing = [to for to in wanted if to not in output.values]
        if missing:
            raise PipelineError(
                f"stage {stage} returned no values for stage(s) {', '.join(map(str, missing))}, which wait for them: "
                f"its table of skips is {self.table}. Return an empty tuple for a stage that gets nothing"
            )

    def take_values(self, at: Instruction, message: Message, *, training: bool) -> list[Message]:
        """What came to a stage past its neighbour, first source first; `message` is the neighbour's."""
        table = self.table or ()
        makers = sources(table, at.stage)
        found = [self._mail.take_skip(maker, at.stage, at.microbatch) for maker in makers]
        if training and makers:
            counts = [(maker, _wanting(far)) for maker, far in zip(makers, found, strict=True)]
            self.received[at.stage, at.microbatch] = [*counts, (at.stage - 1, _wanting(message))]
        return found

    def send_values(self, at: Instruction, outputs: dict[int, Output], *, training: bool) -> None:
        """Sends a stage's values to the stages behind its neighbour."""
        far = [to for to in outputs if to > at.stage + 1]
        for to in reversed(far):  # who is nearest needs it first
            self._mail.put_skip(at.stage, to, at.microbatch, outputs[to])
        if training:
            answers = (to for to in far if any(getattr(leaf, "requires_grad", False) for leaf in outputs[to].leaves))
            self.sent[at.stage, at.microbatch] = tuple(answers)

    def take_gradients(
        self, at: Instruction, own: list[Tensor | None] | None
    ) -> dict[int, list[Tensor | None]] | list[Tensor | None] | None:
        """Gradients by the stage that sends them, the last one first; as they are if the stage returned no `Routed`.

        Args:
            at: The backward that needs them.
            own: The neighbour's.
        """
        users = self.sent.pop((at.stage, at.microbatch), None)
        if users is None:
            return own
        found = {to: gradient_list(self._mail.take_skip(to, at.stage, at.microbatch)) for to in users}
        found[at.stage + 1] = own or []
        return found

    def neighbours_part(self, at: Instruction, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Those of a stage's input gradients that go to the stage before it."""
        counts = self.received.get((at.stage, at.microbatch))
        return gradients if counts is None else gradients[sum(count for _, count in counts[:-1]) :]

    def send_gradients(self, at: Instruction, gradients: list[Tensor | None]) -> None:
        """Sends the others to the stages that made the values."""
        begin = 0
        for maker, count in self.received.pop((at.stage, at.microbatch), [(-1, 0)])[:-1]:
            part, begin = gradients[begin : begin + count], begin + count
            if part:
                result = Output(*flatten(part[0] if count == 1 else part))
                self._mail.put_skip(at.stage, maker, at.microbatch, result)

    def _note_partners(self, table: Sequence[tuple[int, int]]) -> None:
        """Before anything is sent: whoever comes to wait for this rank will be told if it fails."""
        owners, rank = self._mail.owners, self._transport.rank
        for pair in table:
            ends = {owners[stage] for stage in pair}
            if rank in ends:
                self._transport.partners |= ends - {rank}


def _wanting(message: Message) -> int:
    """How many tensors of a message want a gradient."""
    assert message.layout is not None
    return sum(about.requires_grad for about in message.layout.tensors)
