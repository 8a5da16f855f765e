"""One cell of a plan: what a rank does next, for which stage and which micro-batch.

The grammar is the one that `torch.distributed.pipelining` prints, so that plans can be exchanged::

    2F0          forward of micro-batch 0 on stage 2
    2B0          whole backward              B = I + W
    2I0          gradient of the stage's input only
    2W0          gradient of the stage's weights only
    2SEND_F0     hand the output of 2F0 to the rank of stage 3
    2RECV_F0     get the input of 2F0 from the rank of stage 1
    2SEND_B0     hand the input gradient of 2B0 (or 2I0) to the rank of stage 1
    2RECV_B0     get the output gradient of 2B0 from the rank of stage 3
    2REDUCE_GRAD the gradients of stage 2 are complete: reduce them over the data-parallel ranks

The stage of an action is always the stage of the rank that runs it. Neighbours: `plan.py` holds lists of actions.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from torchdistpackage.errors import ScheduleError

__all__ = ["Action", "Op"]


class Op(str, enum.Enum):
    """What an action does; the value is its spelling in text and CSV.

    Example:
        >>> Op("SEND_F").is_compute, Op.FORWARD.is_compute
        (False, True)
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"

    is_compute: bool
    """Whether the action runs the user's model (forward or any kind of backward)."""

    number: int
    """Position in this list: a small integer for tables and checksums."""

    # Plans of 100,000 actions are built and compared: identity is enough and far cheaper than str's hash of a value.
    __hash__ = object.__hash__


for _number, _op in enumerate(Op):
    _op.is_compute, _op.number = len(_op.value) == 1, _number
_WORDS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.INPUT_GRAD: "input half of the backward",
    Op.WEIGHT_GRAD: "weight half of the backward",
    Op.SEND_F: "sending the output",
    Op.RECV_F: "receiving the input",
    Op.SEND_B: "sending the input gradient",
    Op.RECV_B: "receiving the output gradient",
    Op.REDUCE_GRAD: "reducing the gradients",
}
_PATTERN = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE_GRAD|F|B|I|W)(\d*)")


class Action(NamedTuple):
    """One thing that one rank does.

    Attributes:
        stage: Global stage index; 0 is where the input enters.
        op: What is done.
        microbatch: Index in `0 .. num_microbatches - 1`; None for `REDUCE_GRAD`, which belongs to the whole step.

    Example:
        >>> str(Action(2, Op.FORWARD, 0)), Action.parse("2SEND_F0")
        ('2F0', Action(stage=2, op=<Op.SEND_F: 'SEND_F'>, microbatch=0))
    """

    stage: int
    op: Op
    microbatch: int | None

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{'' if self.microbatch is None else self.microbatch}"

    @property
    def words(self) -> str:
        """The same for people.

        Example:
            >>> Action.parse("2F0").words
            'forward of micro-batch 0 on stage 2'
        """
        of = "" if self.microbatch is None else f" of micro-batch {self.microbatch}"
        return f"{_WORDS[self.op]}{of} on stage {self.stage}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads `"2F0"` back.

        Raises:
            ScheduleError: The text is not an action.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None or (match[2] == Op.REDUCE_GRAD.value) != (match[3] == ""):
            raise ScheduleError(
                f"{text!r} is not an action; write stage, operation and micro-batch, as in '2F0', '2B0', '2SEND_F0' "
                "or '2REDUCE_GRAD'"
            )
        return cls(int(match[1]), Op(match[2]), int(match[3]) if match[3] else None)
