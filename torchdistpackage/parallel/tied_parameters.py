"""Parameters that live on more than one stage: the embedding that is also the head.

Each holder has a copy. They start from one value (that of the lowest rank), and after each step every copy's gradient
is the sum over all holders, before clipping and stepping, so that equal optimizers keep them equal::

    rank 0: embedding.weight.grad  --->  +  <---  rank 3: head.weight.grad          both get the sum, added in the order
                                                                                   of the ranks: the same bits

A gradient that was there before the step counts once: all holders have the same one, so the first holder's stays where
it is, and the others' are put away. It has to stay somewhere for replicas that reduce it later (`no_sync`).

A tie is of a place in a module, where that is known: what `fully_shard`, tensor parallelism or `to_empty` put there
later is tied in its place. Sharded copies exchange their shards, which must therefore be cut alike.

A parameter whose holders are chunks of one rank is one tensor there already, and nobody else knows of it.

Ranks that once agreed to share a parameter exchange one message each step from then on, which may be empty. Whether
they do must not depend on when a model happens to be collected, or they would wait for each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.dtensors import is_dtensor, local_tensor, settle_gradient
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.tied_ends import TiedEnds
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.runtime.transport import Transport
from torchdistpackage.schedule import Placement
from torchdistpackage.split.pipe import stages_in_use
from torchdistpackage.split.ties import TiedParameter, places_of, ties_in, torn_tie
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["TiedParameters", "tie_parameters", "ties"]

# What an exchange is about, in the place of a micro-batch's number; 0 is the loss (`pipeline_sched.py`).
_GRADIENTS, _VALUES = 1, 2  # and 3, see `tied_ends.py`
_STAGING = 64 << 20  # bytes of a value that travel at once

Place: TypeAlias = "tuple[nn.Module, str]"  # of a parameter: the module that holds it, and its attribute


@dataclass(eq=False)
class _Tie:
    """One shared parameter, as this rank sees it."""

    name: str
    ranks: tuple[int, ...]
    parameter: weakref.ref[Tensor]
    by_hand: bool
    equal: bool = False  # whether the holders have agreed on one value
    places: tuple[tuple[weakref.ref[nn.Module], str], ...] = ()

    def now(self) -> Tensor | None:
        """What is in its places now; None if nobody knows any, or `fully_shard` has the whole one there for a while."""
        modules = [(module, attribute) for reference, attribute in self.places if (module := reference()) is not None]
        found = [module._parameters.get(attribute) for module, attribute in modules]
        known = self.parameter()
        new = next((one for one in found if one is not None), None)
        return known if new is None or (known is not None and is_dtensor(known) and not is_dtensor(new)) else new


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
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def add(
        self,
        name: str,
        ranks: Sequence[int],
        parameter: nn.Parameter,
        places: Iterable[Place] = (),
        *,
        by_hand: bool = False,
        equal: bool = False,
    ) -> None:
        """Registers a parameter; every holder does so, in one order. A second time changes nothing.

        Args:
            name: For messages.
            ranks: The holders.
            parameter: This rank's copy.
            places: Where it sits, if that is known.
            by_hand: The user has said so.
            equal: The holders have one value already.
        """
        if not any(tie.parameter() is parameter for tie in self._ties):
            where = tuple((weakref.ref(module), attribute) for module, attribute in places)
            self._append(_Tie(name, tuple(sorted(ranks)), weakref.ref(parameter), by_hand, equal, where), parameter)

    def _append(self, tie: _Tie, parameter: nn.Parameter) -> None:
        self._ties.append(tie)
        self._peers |= set(tie.ranks) - {self._rank}
        self._holders[parameter] = tie.ranks

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Notes modules of this rank in which a parameter of several stages is one tensor, and has to stay one."""
        self._watched.update(modules)

    def _look_again(self) -> None:
        """Takes what has come into the places of parameters since."""
        if torn := torn_tie(self._watched):
            raise SplitError(
                f"{' and '.join(torn)} are one parameter on two stages of this rank, and have become two: fully_shard "
                "was applied to each stage alone, or one has been replaced. Use NaiveDDP or Bf16ZeroOptimizer instead, "
                "or a schedule that has the two stages on different ranks ('1f1b')"
            )
        for tie in self._ties:
            known, new = tie.parameter(), tie.now()
            if new is not None and new is not known:
                tie.parameter = weakref.ref(new)
                self._holders[new] = tie.ranks

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
                self._adopt_tie(tie, list(places_of(tie.parameter, [stage.module])))

    def _adopt_tie(self, tie: TiedParameter, places: list[Place]) -> None:
        ranks = tuple(sorted({self._owners[at] for at in tie.stages}))
        self.cut_again({id(tie.parameter): ranks})
        if len(ranks) < len(tie.stages):
            self.watch(module for module, _ in places)
        if len(ranks) > 1:
            self.add(tie.name, ranks, tie.parameter, places)

    def counts_elsewhere(self, parameter: Tensor) -> bool:
        """Whether another rank counts this parameter in norms."""
        ranks: tuple[int, ...] | None = self._holders.get(parameter)  # type: ignore[no-untyped-call]
        return ranks is not None and ranks[0] != self._rank

    def begin_step(self, transport: Transport, *, training: bool) -> None:
        """Makes new ties equal, and puts gradients away that were there before the step and count elsewhere."""
        self._look_again()
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
            ranks = tuple(sorted((self._rank, peer)))
            self._append(_Tie(tie.name, ranks, weakref.ref(tie.parameter), by_hand=False), tie.parameter)
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
            shapes = {rank: tuple(t.shape) for rank, t in zip(tie.ranks, found, strict=True) if t is not None}
            if len({*shapes.values()}) > 1:
                said = ", ".join(f"{shape} on rank {rank}" for rank, shape in shapes.items())
                raise SplitError(
                    f"the copies of {tie.name} are cut in different ways: {said}. Shard both along the same dimension, "
                    "as RowwiseParallel() for an embedding and ColwiseParallel() for the head do, or neither"
                )
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
    if parameter is None or parameter.grad is None:
        return None
    settle_gradient(parameter)
    return local_tensor(parameter.grad)


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

    The partition functions find shared parameters by themselves; this is for models that are cut by hand. The copies
    get one value, that of the first rank that has one, and from the next step on the sum of their gradients. Where one
    rank alone has the parameter, because the stages that share it are chunks of that rank, it is one tensor and nothing
    needs to be done: the same call is right under every placement.

    It is this tensor that is tied. Call it after what puts another one into its place (`fully_shard`, tensor
    parallelism, `to_empty`), and before what reads weights (`ShardedEMA`).

    Args:
        name: The same on every rank.
        parameter: This rank's copy, the same tensor for all of its chunks; None on ranks that do not have it.

    Raises:
        SplitError: Nobody has it, or the shapes, dtypes or shardings differ.
        TopologyError: Process groups have not been set up.

    Example:
        On every rank, with what it has of the two::

            tie_parameters("embedding", stage.embedding.weight if first else stage.head.weight if last else None)
    """
    if tpc.get_pp_size() == 1:
        return
    mine = None if parameter is None else _kind(parameter)
    with guarded("tie_parameters"):
        everyone = gather_json([name, mine], tpc.get_control_group("pipe"))
    if len({other for other, _ in everyone}) > 1:
        raise SplitError(f"ranks tie different parameters at the same time: {[other for other, _ in everyone]}")
    holders = [rank for rank, (_, kind) in enumerate(everyone) if kind is not None]
    kinds = {rank: everyone[rank][1][0] for rank in holders}
    if len({*kinds.values()}) != 1:
        raise SplitError(
            f"{name!r} must be on at least one rank, with one shape and dtype, and cut in one way; ranks have {kinds}"
        )
    sizes = {everyone[rank][1][1] for rank in holders}
    equal = len(holders) > 1 and len(sizes) == 1 and None not in sizes
    if equal:
        with guarded("tie_parameters"):
            _make_equal(parameter, holders[0], sizes.pop())
    if parameter is not None and len(holders) > 1:
        ties().add(name, holders, parameter, by_hand=True, equal=equal)


def _kind(parameter: nn.Parameter) -> tuple[str, int | None]:
    """What all holders must have alike, and how many bytes this rank has of it; None while it is on the meta device."""
    placements = getattr(parameter, "placements", None)
    sharded = "" if placements is None else f" {', '.join(map(repr, placements))}"
    size = None if parameter.is_meta else local_tensor(parameter).nbytes
    return f"{tuple(parameter.shape)} {parameter.dtype}{sharded}", size


@torch.no_grad()
def _make_equal(parameter: nn.Parameter | None, holder: int, nbytes: int) -> None:
    """Gives all copies the value of that rank of the pipeline. Collective over it; in pieces, as some have no copy."""
    group = tpc.get_group("pipe")
    source, device = dist.get_global_rank(group, holder), communication_device(group)
    own = None if parameter is None else local_tensor(parameter.detach())
    value = None if own is None else own.contiguous().view(-1).view(torch.uint8)
    for begin in range(0, nbytes, _STAGING):
        end = min(begin + _STAGING, nbytes)
        piece = torch.empty(end - begin, dtype=torch.uint8, device=device)
        if value is not None:
            piece.copy_(value[begin:end])
        dist.broadcast(piece, source, group=group)
        if value is not None:
            value[begin:end].copy_(piece)
    if own is not None and value is not None and not own.is_contiguous():
        own.copy_(value.view(own.dtype).view(own.shape))
