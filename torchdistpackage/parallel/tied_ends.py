"""What Bottom and Top share: two parts that were made one by one, in two processes, and know nothing of each other.

The partition functions see a whole model and note what its stages share. A Bottom only knows what the model ties to its
other end; whether that is a Top of the same model, a classifier, or in another pipeline shows when a step has run::

    rank 0   Bottom ran: wte, new ----->   <----- rank 2   Top ran: wte, new        both: it is one parameter
    rank 0   Bottom ran: wte, new ----->   <----- rank 2                            one alone: it is not

So the two ranks tell each other at the end of each training step. Pipelines without parts never do: in their first step
the ranks ask, from neighbour to neighbour and back, whether there may be any, so that no link is made between the ends
that nobody needs. `tied_parameters.py` then adds up the gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, final

import torch

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.split.pipe import are_ends_expected, take_ends_run
from torchdistpackage.split.ties import TiedParameter, ties_in

__all__ = ["TiedEnds"]

_WHAT = 3  # what an exchange is about; `tied_parameters.py` has the others


@final
class TiedEnds:
    """Of one pipeline group, on one rank.

    Args:
        rank: This rank in the pipeline group.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._agreed_for: tuple[Any, ...] | None = None
        self._may_have_parts = False

    def forget(self) -> None:
        """Comes before each step: what has run until now is not of it."""
        take_ends_run()

    def greet(self, transport: Transport, owners: Sequence[int]) -> None:
        """Agrees, once, whether Bottoms and Tops may run; where not, nothing is sent for them. Before a training step.

        Args:
            transport: Of the pipeline.
            owners: The rank of each stage.
        """
        agreed_for = (transport.epoch, *owners)  # after a failure some ranks may have heard the answer, others not
        if not owners or owners[0] == owners[-1] or agreed_for == self._agreed_for:
            return
        chain = list(dict.fromkeys(owners))  # neighbours in a pipeline, which have links anyway
        place, may = chain.index(self._rank), are_ends_expected()
        if place > 0:
            may = bool(self._take(transport, chain[place - 1])) or may
        if place < len(chain) - 1:
            self._send(transport, chain[place + 1], ["parts"] if may else [])
            may = bool(self._take(transport, chain[place + 1]))
        if place > 0:
            self._send(transport, chain[place - 1], ["parts"] if may else [])
        self._agreed_for, self._may_have_parts = agreed_for, may

    def agree(
        self, transport: Transport, owners: Sequence[int], known: Collection[int]
    ) -> list[tuple[TiedParameter, int]]:
        """The parameters that are to be tied from now on, and with which rank. Comes at the end of a training step.

        Args:
            transport: Of the pipeline.
            owners: The rank of each stage.
            known: The ids of the parameters that are tied already.

        Raises:
            SplitError: Both ends are on one rank, with a copy each; the copies differ; one of them is frozen; or there
                are parts where none were expected.
        """
        mine, peer = self._that_ran(owners), self._other_end(owners)
        if peer is None:
            return []
        if not self._may_have_parts:
            if mine:
                raise SplitError(
                    "Bottom or Top run in a pipeline whose first step came before torchdistpackage.split.parts was "
                    "imported: import it at the top of the program"
                )
            return []
        states = {name: _state(tie, known) for name, tie in mine.items()}
        told = self._exchange(transport, peer, [f"{name}|{state}" for name, state in states.items()])
        theirs = dict(text.split("|") for text in told)
        common = sorted({*states} & {*theirs})
        for name in common:
            if states[name].replace("new", "known") != theirs[name].replace("new", "known"):
                raise SplitError(
                    f"{mine[name].name} is one parameter in the whole model, but the copies at the two ends of the "
                    f"pipeline are {states[name]} here and {theirs[name]} there: load both in one type, and freeze "
                    "both ends or none (torchdistpackage.split.ties_in(part) finds it)"
                )
        fresh = {name: mine[name] for name in common if "new" in f"{states[name]} {theirs[name]}"}
        if fresh:
            self._need_equal(transport, peer, fresh)
        return [(tie, peer) for tie in fresh.values()]  # also where one end has known its copy for long

    def _other_end(self, owners: Sequence[int]) -> int | None:
        """For the two ranks that have the ends of the pipeline, the other one."""
        ends = {owners[0], owners[-1]} if owners else set()
        return (ends - {self._rank}).pop() if len(ends) == 2 and self._rank in ends else None

    def _exchange(self, transport: Transport, peer: int, mine: list[str]) -> list[str]:
        self._send(transport, peer, mine)
        return self._take(transport, peer)

    def _send(self, transport: Transport, peer: int, value: list[str]) -> None:
        transport.outlet(peer).send(Kind.VALUE, self._rank, _WHAT, 0, *flatten(value))

    def _take(self, transport: Transport, peer: int) -> list[str]:
        message = transport.inlet(peer).take(Kind.VALUE, peer, _WHAT)
        assert message.layout is not None
        value: list[str] = message.layout.tree(message.tensors)
        return value

    def _that_ran(self, owners: Sequence[int]) -> dict[str, TiedParameter]:
        """What the parts that ran on this rank in this step may share with the other end, by all of its names."""
        found: dict[str, TiedParameter] = {}
        for stage, index in take_ends_run():
            for tie in ties_in(stage).values() if owners[index] == self._rank else ():
                if found.setdefault(" ".join(tie.names), tie).parameter is not tie.parameter:
                    raise SplitError(
                        f"Bottom and Top are on one rank and have a copy each of {tie.name}, which the model ties: "
                        "call torchdistpackage.split.parts.share_tied_weights(bottom, top), then make the optimizer"
                    )
        return found

    def _need_equal(self, transport: Transport, peer: int, ties: Mapping[str, TiedParameter]) -> None:
        """Compares the sums of the copies, but for what the order of adding up makes on different devices."""
        sums = [_sums(tie) for tie in ties.values()]
        told = self._exchange(transport, peer, [f"{total.hex()} {size.hex()}" for total, size in sums])
        for tie, (total, size), text in zip(ties.values(), sums, told, strict=True):
            theirs = float.fromhex(text.split()[0])
            if not abs(total - theirs) <= 1e-9 * size:
                raise SplitError(
                    f"{tie.name} is one parameter in the whole model, but the copies at the two ends of the pipeline "
                    f"differ (their sums are {total} and {theirs}): load all parts from one model"
                )


def _state(tie: TiedParameter, known: Collection[int]) -> str:
    """What one end tells the other about its copy."""
    parameter = tie.parameter
    word = "frozen" if not parameter.requires_grad else "known" if id(parameter) in known else "new"
    return f"{word} {str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}"


def _sums(tie: TiedParameter) -> tuple[float, float]:
    """The sum of a parameter, and that of its sizes; of one that is sharded over replicas, of this rank's rows."""
    tensor = local_tensor(tie.parameter.detach())
    total = tensor.sum(dtype=torch.float64).item()  # without a copy of the whole in float64
    return total, torch.linalg.vector_norm(tensor, 1, dtype=torch.float64).item()
