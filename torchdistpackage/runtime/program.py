"""A plan, resolved for one rank: everything that does not change between steps is looked up once, here.

::

    plan.actions[rank]  ->  instructions (who is at the other end, what may be forgotten)  +  edges

Pure: no tensor, no transport. The executor walks the instructions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torchdistpackage.runtime.message import Kind
from torchdistpackage.schedule import Action, Op, Plan
from torchdistpackage.schedule.routing import destinations, sources

__all__ = ["Instruction", "Program", "compile_program"]

Key = tuple[int, int, int]  # kind, the sender's stage (of a SKIP its number), micro-batch

_BACKWARD_OPS = (Op.BACKWARD, Op.INPUT_GRAD)
_TO_WEIGHT = (Op.BACKWARD, Op.WEIGHT_GRAD)
_SENDS = (Op.SEND_F, Op.SEND_B)
_RECEIVES = (Op.RECV_F, Op.RECV_B)


class Instruction(NamedTuple):
    """One action with all that is known of it.

    Attributes:
        op: What to do.
        stage: Global stage index.
        microbatch: Which micro-batch; -1 for `REDUCE_GRAD`.
        peer: The rank at the other end: of a send or receive, and for compute the rank that the input comes from
            (this rank itself for a hand-over, -1 where nothing comes in).
        send_to: For compute, the rank that the result goes to at once; -1 where it stays, or a SEND of its own follows
            later.
        proves: Messages (receiver, key) of this rank that have been taken by the time this input has arrived.
        position: Place in the rank's action list, for the marked grid.
    """

    op: Op
    stage: int
    microbatch: int
    peer: int
    send_to: int
    proves: tuple[tuple[int, Key], ...]
    position: int

    @property
    def action(self) -> Action:
        """As the plan has it."""
        return Action(self.stage, self.op, None if self.microbatch < 0 else self.microbatch)


@dataclass(frozen=True)
class Program:
    """What one rank does in a step.

    Attributes:
        instructions: In order.
        token_from: The rank that passes the token of the step's end to this one; None where it starts.
        token_to: The rank that this one passes it to; None where it ends.
        backwards: For each local stage its micro-batches in the order in which their weight gradients are complete.
    """

    instructions: tuple[Instruction, ...]
    token_from: int | None
    token_to: int | None
    backwards: dict[int, tuple[int, ...]]


@lru_cache(maxsize=64)
def compile_program(plan: Plan, rank: int, receives_ahead: int) -> Program:
    """Resolves a plan with communication for one rank.

    Args:
        plan: Verified, with communication.
        rank: Whose part.
        receives_ahead: How many compute actions before its place in the plan a receive is posted. Posting does not
            wait, so that moving it forward cannot make a proved plan hang.
    """
    row = plan.actions[rank]
    order = _hoist_receives(row, receives_ahead)
    proofs = _proofs(plan, rank)
    instructions: list[Instruction] = []
    for (index, action), (_, following) in zip(order, [*order[1:], (0, None)], strict=True):
        before = instructions[-1] if instructions else None
        if before is not None and before.send_to >= 0 and action.op in _SENDS and before.position == index - 1:
            continue  # goes out together with its compute action
        if action.op in _RECEIVES and following is not None and _is_use(action, following):
            continue  # an input that is needed at once is posted by whoever takes it
        sends_at_once = following is not None and following.op in _SENDS and following[::2] == action[::2]
        instructions.append(
            Instruction(
                action.op,
                action.stage,
                -1 if action.microbatch is None else action.microbatch,
                _peer(plan, action),
                _peer(plan, following) if sends_at_once and following is not None and action.op.is_compute else -1,
                proofs.get(action, ()),
                index,
            )
        )
    way = _token_way(plan)
    place = way.index(rank)
    return Program(
        tuple(instructions),
        way[place - 1] if place > 0 else None,
        way[place + 1] if place + 1 < len(way) else None,
        {
            stage: tuple(i for at, op, i in row if at == stage and op in _TO_WEIGHT and i is not None)
            for stage in plan.placement.local_stages(rank)
        },
    )


def _hoist_receives(row: tuple[Action, ...], ahead: int) -> list[tuple[int, Action]]:
    """Moves each receive in front of the compute action `ahead` places before the one that it stands at."""
    slots: list[list[tuple[int, Action]]] = [[]]  # slot c: the sends of compute action c - 1, then action c
    receives: list[list[tuple[int, Action]]] = [[]]
    for index, action in enumerate(row):
        if action.op in _RECEIVES:
            receives[max(0, len(slots) - 1 - ahead)].append((index, action))
            continue
        slots[-1].append((index, action))
        if action.op.is_compute:
            slots.append([])
            receives.append([])
    # Within a slot: first the sends of the compute action before, then receives, then the compute action.
    return [cell for early, slot in zip(receives, slots, strict=True) for cell in (*slot[:-1], *early, *slot[-1:])]


def _is_use(receive: Action, action: Action) -> bool:
    """Whether a compute action takes exactly this message."""
    ops = (Op.FORWARD,) if receive.op is Op.RECV_F else _BACKWARD_OPS
    return action.op in ops and action.stage == receive.stage and action.microbatch == receive.microbatch


def _peer(plan: Plan, action: Action) -> int:
    owners, stage = plan.placement.owners, action.stage
    if action.op in (Op.FORWARD, Op.RECV_F, Op.SEND_B):
        return owners[stage - 1] if stage > 0 else -1
    if action.op in (*_BACKWARD_OPS, Op.RECV_B, Op.SEND_F):
        return owners[stage + 1] if stage + 1 < len(owners) else -1
    return -1


def _token_way(plan: Plan) -> tuple[int, ...]:
    """All ranks, from the one that finishes last: the first stage's in training, the last stage's in evaluation.

    Neighbours on the way hold neighbouring stages, so that the token uses connections that are there anyway.
    """
    owners = plan.placement.owners
    return tuple(dict.fromkeys(reversed(owners) if plan.forward_only else owners))


def _proofs(plan: Plan, rank: int) -> dict[Action, tuple[tuple[int, Key], ...]]:
    r"""For each compute action of the rank: which of its own messages the arrival of the input proves taken.

    ::

        rank 0   0SEND_F0 ------\\                    /--> 0B0: its input was sent after 1F0 had taken 0SEND_F0
        rank 1                   1F0   1B0  1SEND_B0

    A skip counts like a message: an action that has to come before a use has taken all that stands before it, whichever
    way that is known. So it holds whether or not the values of a skip want gradients, and for a table that has changed.
    """
    proofs: dict[Action, list[tuple[int, Key]]] = defaultdict(list)
    split = {action for action in plan.actions[rank] if action.op is Op.INPUT_GRAD}
    skips = _OwnSkips.of(plan, rank) if plan.skips else None
    for peer in set(range(plan.placement.num_ranks)) - {rank}:
        unproven: list[tuple[int, Key]] = []
        for action in plan.actions[peer]:
            came_from = _peer(plan, action)
            if action.op is Op.FORWARD and came_from == rank:
                unproven.append((peer, (int(Kind.FORWARD), action.stage - 1, action.microbatch or 0)))
            elif action.op in _BACKWARD_OPS and came_from == rank:
                unproven.append((peer, (int(Kind.BACKWARD), action.stage + 1, action.microbatch or 0)))
            elif action.op in (Op.SEND_F, Op.SEND_B) and came_from == rank and unproven:
                proofs[_use(action, split)].extend(unproven)
                unproven = []
            if skips is not None and action.op in (Op.FORWARD, *_BACKWARD_OPS):
                unproven.extend((peer, key) for key in skips.taken(action))
                use = skips.use(action, split)
                if use is not None and unproven:
                    proofs[use].extend(unproven)
                    unproven = []
    return {action: tuple(keys) for action, keys in proofs.items()}


@dataclass(frozen=True)
class _OwnSkips:
    """The skips that join one rank's stages to others.

    Attributes:
        count: Of all stages.
        makers: For each stage, the rank's stages that it gets values from, first one first.
        users: For each stage, the rank's stages that it sends values to, first one first.
    """

    count: int
    makers: tuple[tuple[int, ...], ...]
    users: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, plan: Plan, rank: int) -> _OwnSkips:
        """Looks them up once."""
        owners, count = plan.placement.owners, plan.placement.num_stages
        makers, users = (
            tuple(tuple(other for other in far(plan.skips, stage) if owners[other] == rank) for stage in range(count))
            for far in (sources, destinations)
        )
        return cls(count, makers, users)

    def taken(self, action: Action) -> list[Key]:
        """The rank's messages that an action of another rank takes."""
        stage, op, i = action
        far = self.makers[stage] if op is Op.FORWARD else self.users[stage]
        return [(int(Kind.SKIP), other * self.count + stage, i or 0) for other in far]

    def use(self, action: Action, split: set[Action]) -> Action | None:
        """The rank's first action that an action of another rank sends something to past the neighbours."""
        stage, op, i = action
        if op is Op.FORWARD:
            return Action(self.users[stage][0], Op.FORWARD, i) if self.users[stage] else None
        return _backward(self.makers[stage][-1], i, split) if self.makers[stage] else None


def _use(send: Action, split: set[Action]) -> Action:
    """The compute action that takes what was sent."""
    if send.op is Op.SEND_F:
        return Action(send.stage + 1, Op.FORWARD, send.microbatch)
    return _backward(send.stage - 1, send.microbatch, split)


def _backward(stage: int, microbatch: int | None, split: set[Action]) -> Action:
    half = Action(stage, Op.INPUT_GRAD, microbatch)
    return half if half in split else half._replace(op=Op.BACKWARD)
