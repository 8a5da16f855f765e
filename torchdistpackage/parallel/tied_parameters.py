"""Parameters that live on more than one stage: the embedding that is also the head.

Each holder has a copy. They start from one value (that of the lowest rank), and after each step every copy's gradient
is the sum over all holders, before clipping and stepping, so that equal optimizers keep them equal::

    rank 0: embedding.weight.grad  --->  +  <---  rank 3: head.weight.grad          both get the sum, added in the order
                                                                                   of the ranks: the same bits

A gradient that was there before the step counts once: all holders have the same one, so the first holder's stays where
it is, and the others' are put away. It has to stay somewhere for replicas that reduce it later (`no_sync`).

A parameter whose holders are chunks of one rank is one tensor there already, and nobody else knows of it.

Ranks that once agreed to share a parameter exchange one message each step from then on, which may be empty. Whether
they do must not depend on when a model happens to be collected, or they would wait for each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.tied_ends import TiedEnds
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Placement
from torchdistpackage.split.pipe import stages_in_use
from torchdistpackage.split.ties import TiedParameter, ties_in
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json

__all__ = ["TiedParameters", "tie_parameters", "ties"]

# What an exchange is about, in the place of a micro-batch's number; 0 is the loss (`pipeline_sched.py`).
_GRADIENTS, _VALUES = 1, 2  # and 3, see `tied_ends.py`


@dataclass(eq=False)
class _Tie:
    """One shared parameter, as this rank sees it."""

    name: str
    ranks: tuple[int, ...]
    parameter: weakref.ref[Tensor]
    by_hand: bool
    equal: bool = False  # whether the holders have agreed on one value


class TiedParameters:
    """The shared parameters of one pipeline group, on one rank; one registry a group, see `ties`.

    Args:
        rank: This rank in the pipeline group.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._ties: list[_Tie] = []
        self._peers: set[int] = set()
        self._before: dict[int, Tensor] = {}
        self._training = False
        self._owners: tuple[int, ...] = ()
        self._ends = TiedEnds(rank)
        self._adopted: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._holders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> its ranks

    def add(self, name: str, ranks: Sequence[int], parameter: nn.Parameter, *, by_hand: bool = False) -> None:
        """Registers a parameter; every holder does so, in one order. A second time changes nothing."""
        if not any(tie.parameter() is parameter for tie in self._ties):
            self._append(name, ranks, parameter, by_hand=by_hand)

    def _append(self, name: str, ranks: Sequence[int], parameter: nn.Parameter, *, by_hand: bool = False) -> None:
        self._ties.append(_Tie(name, tuple(sorted(ranks)), weakref.ref(parameter), by_hand))
        self._peers |= set(ranks) - {self._rank}
        self._holders[parameter] = tuple(sorted(ranks))

    def cut_again(self, placed: Mapping[int, tuple[int, ...]]) -> None:
        """Forgets ties that an earlier cut of the same model found, where this one puts the parameters on other ranks.

        Args:
            placed: The id of a parameter -> the ranks that hold it now. Every rank knows all of the model, so that all
                forget the same.
        """
        for tie in list(self._ties):
            parameter = tie.parameter()
            if parameter is not None and not tie.by_hand and placed.get(id(parameter), tie.ranks) != tie.ranks:
                self._ties.remove(tie)
                self._holders.pop(parameter)  # type: ignore[no-untyped-call]

    def adopt(self, placement: Placement) -> None:
        """Registers what stages of traced models share: nobody has called a partition function for those.

        Every rank runs it before a step, with the step's placement; a second time with the same one changes nothing.
        """
        owners = self._owners = placement.owners
        self._ends.forget()
        for stage in stages_in_use():
            here = stage.num_stages == placement.num_stages and owners[stage.index] == self._rank
            if not here or self._adopted.get(stage.module) == owners:
                continue
            self._adopted[stage.module] = owners
            found = {id(tie.parameter): tie for tie in ties_in(stage.module).values()}
            for tie in sorted(found.values(), key=lambda tie: tie.name):
                self._adopt_tie(tie)

    def _adopt_tie(self, tie: TiedParameter) -> None:
        ranks = tuple(sorted({self._owners[at] for at in tie.stages}))
        self.cut_again({id(tie.parameter): ranks})
        if len(ranks) > 1:
            self.add(tie.name, ranks, tie.parameter)

    def counts_elsewhere(self, parameter: Tensor) -> bool:
        """Whether another rank counts this parameter in norms."""
        ranks: tuple[int, ...] | None = self._holders.get(parameter)  # type: ignore[no-untyped-call]
        return ranks is not None and ranks[0] != self._rank

    def begin_step(self, transport: Transport, *, training: bool) -> None:
        """Makes new ties equal, and puts gradients away that were there before the step and count elsewhere."""
        if training:
            self._ends.greet(transport, self._owners)
        fresh = [number for number, tie in enumerate(self._ties) if not tie.equal]
        if fresh:
            # Only with the ranks that have the same new ties: the others, with older ones, do not know of any.
            sharing = {rank for number in fresh for rank in self._ties[number].ranks} - {self._rank}
            self._exchange(transport, fresh, sharing, _VALUES, _value, _take_value)
            for number in fresh:
                self._ties[number].equal = True
        self._training = training
        if not training:
            return
        for number, tie in enumerate(self._ties):
            parameter = tie.parameter()
            if parameter is not None and parameter.grad is not None and tie.ranks[0] != self._rank:
                self._before[number], parameter.grad = parameter.grad, None

    def end_step(self, transport: Transport) -> None:
        """Sums the gradients over the holders; one that was put away takes the sum, it may be a view of the user's."""
        if not self._training:
            return
        known = {id(tie.parameter()) for tie in self._ties}
        for tie, peer in self._ends.agree(transport, self._owners, known):
            self._append(tie.name, (self._rank, peer), tie.parameter)
        self._exchange(transport, list(range(len(self._ties))), self._peers, _GRADIENTS, _gradient, _take_sum)
        for number, before in self._before.items():
            parameter = self._ties[number].parameter()
            if parameter is None:
                continue
            if parameter.grad is not None:
                if parameter.grad.layout is not before.layout:
                    continue
                before.copy_(parameter.grad)
            parameter.grad = before
        self._before = {}

    def cancel(self) -> None:
        """Adds back what was put away."""
        for number, before in self._before.items():
            parameter = self._ties[number].parameter()
            if parameter is None:
                continue
            with torch.no_grad():
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        self._before = {}

    def _exchange(
        self, transport: Transport, numbers: list[int], peers: set[int], what: int, read: Any, take: Any
    ) -> None:
        """One message to and from each of the peers: {number of the tie: tensor or None}."""
        mine = {number: read(self._ties[number]) for number in numbers}
        for peer in sorted(peers):
            shared = [mine[number] for number in numbers if peer in self._ties[number].ranks]
            transport.outlet(peer).send(Kind.VALUE, self._rank, what, 0, *flatten(shared))
        theirs: dict[tuple[int, int], Tensor | None] = {}
        for peer in sorted(peers):
            message = transport.inlet(peer).take(Kind.VALUE, peer, what)
            assert message.layout is not None
            values = iter(message.layout.tree(message.tensors))
            theirs.update({(n, peer): next(values) for n in numbers if peer in self._ties[n].ranks})
        for number in numbers:
            tie = self._ties[number]
            found = [mine[number] if rank == self._rank else theirs[number, rank] for rank in tie.ranks]
            parameter = tie.parameter()
            if parameter is not None:
                take(parameter, [tensor for tensor in found if tensor is not None])


def _value(tie: _Tie) -> Tensor | None:
    parameter = tie.parameter()
    return None if parameter is None else local_tensor(parameter.detach())


def _take_value(parameter: Tensor, found: list[Tensor]) -> None:
    local_tensor(parameter.detach()).copy_(found[0])


def _gradient(tie: _Tie) -> Tensor | None:
    parameter = tie.parameter()
    return None if parameter is None or parameter.grad is None else local_tensor(parameter.grad)


def _take_sum(parameter: Tensor, found: list[Tensor]) -> None:
    if not found:
        return
    total = found[0].clone()
    for gradient in found[1:]:
        total += gradient
    if parameter.grad is None and local_tensor(parameter) is parameter:
        parameter.grad = total
        return
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter.detach())
    local_tensor(parameter.grad).copy_(total)  # in place: it may be a view into a bucket


_current: list[tuple[Any, TiedParameters]] = []


def ties() -> TiedParameters:
    """The registry of the pipeline group that is set up now."""
    group = tpc.get_group("pipe") if tpc.get_pp_size() > 1 else None
    if not _current or _current[0][0] is not group:
        _current[:] = [(group, TiedParameters(tpc.get_pp_rank()))]
    return _current[0][1]


def tie_parameters(name: str, parameter: nn.Parameter | None) -> None:
    """Says that one parameter lives on several stages. Collective over the pipeline group.

    The partition functions find shared parameters by themselves; this is for models that are cut by hand. From the
    next step on the copies have one value and get the sum of their gradients. Where one rank alone has the parameter,
    because the stages that share it are chunks of that rank, it is one tensor and nothing needs to be done: the same
    call is right under every placement.

    Args:
        name: The same on every rank.
        parameter: This rank's copy, the same tensor for all of its chunks; None on ranks that do not have it.

    Raises:
        SplitError: Nobody has it, or the shapes or dtypes differ.
        TopologyError: Process groups have not been set up.

    Example:
        On every rank, with what it has of the two::

            tie_parameters("embedding", stage.embedding.weight if first else stage.head.weight if last else None)
    """
    if tpc.get_pp_size() == 1:
        return
    mine = None if parameter is None else f"{tuple(parameter.shape)} {parameter.dtype}"
    with guarded("tie_parameters"):
        everyone = gather_json([name, mine], tpc.get_control_group("pipe"))
    if len({other for other, _ in everyone}) > 1:
        raise SplitError(f"ranks tie different parameters at the same time: {[other for other, _ in everyone]}")
    holders = [rank for rank, (_, kind) in enumerate(everyone) if kind is not None]
    kinds = {kind for _, kind in everyone if kind is not None}
    if len(kinds) != 1:
        raise SplitError(f"{name!r} must be on at least one rank, with one shape and dtype; ranks have {everyone}")
    if parameter is not None and len(holders) > 1:
        ties().add(name, holders, parameter, by_hand=True)
