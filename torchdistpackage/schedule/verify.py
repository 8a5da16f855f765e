"""The one judge of plans: what it accepts runs to its end on any transport, what it rejects it shows.

It plays the plan once, without time: every rank goes down its list and stops at an action whose inputs are not there
yet. A receive waits for its send (the strictest reading, true for NCCL), a send never waits. What it proves:

- every stage runs each micro-batch exactly once, forward and (in training) backward, whole or as I + W;
- nothing is used before it exists, and gradients are reduced after the last backward of their stage;
- every hop between two ranks has exactly one send and one receive, in one order on each directed edge;
- all ranks reach the end of their lists: no deadlock.

Facts are numbers here: (kind of fact, stage, micro-batch) is one index into a byte array, so that a plan of 400,000
actions is proved in about half a second::

    0F0 makes the fact  FORWARD(0, 0)         1F0 needs it (or RECV_F(1, 0), if ranks exchange messages)
    1B0 and 1I0 make    INPUT_GRAD(1, 0)      0B0 and 0I0 need it (or RECV_B(0, 0))

Skips (values that go past stages, see `routing.py`) have no actions of their own. With a skip from a to b, F of b needs
what F of a made, and B of a needs the gradient that B of b made. Lemma: a plan that is right without skips is right
with any. F of b needs F of b - 1, which needs F of b - 2, and so on down to a, and B of a in the same way B of b: what
a skip asks for has been made before what the neighbour sends. Sends do not wait, so that no rank comes to wait for what
the chain of neighbours does not wait for. Where a plan has skips it is played all the same.

Cost: once per distinct plan, about 1 us an action.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from torchdistpackage.errors import DeadlockError, ScheduleError
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.lowering import neighbours
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.routing import check_skips, destinations, sources

__all__ = ["peak_activations", "verify"]

_WINDOW = 6
_OPS = tuple(Op)
# Rows of the table of facts. B and I make the same fact, the input gradient, B and W the weight gradient.
_FORWARD, _INPUT_GRAD, _WEIGHT_GRAD, _SEND_F, _RECV_F, _SEND_B, _RECV_B, _REDUCED = range(8)


def verify(plan: Plan, *, max_activations: int | None = None) -> None:
    """Proves a plan, or raises with the marked grid.

    Args:
        plan: With or without communication; without it, results are taken to reach other ranks by themselves.
        max_activations: If given, no rank may hold more than this many forwards that wait for their backward.

    Raises:
        ScheduleError: Something is missing, doubled, out of order or over the memory bound.
        DeadlockError: Ranks wait for each other for ever.

    Example:
        >>> verify(Plan.from_text("0F0 0B0"))
        >>> verify(Plan.from_text("0B0 0F0"))
        Traceback (most recent call last):
        torchdistpackage.errors.ScheduleError: rank 0 reaches 0B0 before 0F0, which stands later in its own list
        rank 0: >>0B0<< 0F0
    """
    check_skips(plan.skips, plan.placement.num_stages)
    _check_complete(plan)
    if plan.has_communication:
        _check_edges(plan)
    _play(plan)
    if max_activations is not None:
        peaks = peak_activations(plan)
        worst = max(range(len(peaks)), key=peaks.__getitem__)
        if peaks[worst] > max_activations:
            raise ScheduleError(
                f"rank {worst} holds {peaks[worst]} forwards that wait for their backward; the bound is "
                f"{max_activations}"
            )


def peak_activations(plan: Plan) -> tuple[int, ...]:
    """For each rank, the most chunk forwards that wait for their (last) backward at one moment.

    Example:
        >>> peak_activations(Plan.from_text("0F0 0F1 0B0 0B1"))
        (2,)
    """
    peaks = []
    for row in plan.actions:
        live = peak = 0
        for action in row:
            if action.op is Op.FORWARD:
                live += 1
                peak = max(peak, live)
            elif action.op in (Op.BACKWARD, Op.WEIGHT_GRAD):
                live -= 1
        peaks.append(1 if plan.forward_only and peak else peak)
    return tuple(peaks)


def _check_complete(plan: Plan) -> None:
    """Every (stage, micro-batch) has its forward and its backward once, on the rank that owns the stage."""
    stages, count, owners = plan.placement.num_stages, plan.num_microbatches, plan.placement.owners
    cells = stages * count
    seen = bytearray(len(_OPS) * cells)
    for rank, row in enumerate(plan.actions):
        for index, (stage, op, i) in enumerate(row):
            if not 0 <= stage < stages or owners[stage] != rank:
                raise _rejected(plan, rank, index, f"{row[index]} is on rank {rank}, which does not own its stage")
            if i is None:
                i = 0
            elif not 0 <= i < count:
                raise _rejected(plan, rank, index, f"{row[index]} is outside of the {count} micro-batches")
            fact = op.number * cells + stage * count + i
            if seen[fact]:
                times = sum(other.count(row[index]) for other in plan.actions)
                raise _rejected(plan, rank, index, f"{row[index]} stands {times} times in the plan")
            seen[fact] = 1
    if plan.forward_only:
        for rank, row in enumerate(plan.actions):
            for index, action in enumerate(row):
                if action.op is Op.REDUCE_GRAD:
                    raise _rejected(plan, rank, index, f"{action} has no backward before it anywhere in the plan")
    forward, whole, half, weight = (
        seen[op.number * cells : (op.number + 1) * cells]
        for op in (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD)
    )
    if 0 in forward:
        raise ScheduleError(f"{Action(*_cell(forward.index(0), count, Op.FORWARD))} is missing from the plan")
    if plan.forward_only:
        return
    for cell in range(cells):
        if half[cell] != weight[cell] or whole[cell] == half[cell]:
            stage, i = divmod(cell, count)
            raise ScheduleError(
                f"micro-batch {i} on stage {stage} needs one B, or one I and one W; the plan has "
                f"{whole[cell]} B, {half[cell]} I and {weight[cell]} W"
            )


def _cell(cell: int, count: int, op: Op) -> Action:
    return Action(cell // count, op, cell % count)


def _check_edges(plan: Plan) -> None:
    """Sends meet receives: one each for every hop that needs one, in one order on each directed edge."""
    placement, count = plan.placement, plan.num_microbatches
    up, down = neighbours(plan)
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)  # a message is 2 * (its receiver's cell) + direction
    received: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, row in enumerate(plan.actions):
        for index, (stage, op, i) in enumerate(row):
            if op.is_compute or i is None:
                continue
            if op is Op.SEND_F or op is Op.SEND_B:
                peer, to, direction = (up[stage], stage + 1, 0) if op is Op.SEND_F else (down[stage], stage - 1, 1)
                if peer < 0 or (direction and plan.forward_only):
                    raise _rejected(plan, rank, index, f"{row[index]} sends what no other rank takes")
                sent[rank, peer].append(2 * (to * count + i) + direction)
            else:
                source, direction = (stage - 1, 0) if op is Op.RECV_F else (stage + 1, 1)
                if not 0 <= source < placement.num_stages:
                    raise _rejected(plan, rank, index, f"{row[index]} has no stage to receive from")
                received[placement.owner(source), rank].append(2 * (stage * count + i) + direction)
    hops = sum(peer >= 0 for peer in up) * (1 if plan.forward_only else 2)
    if sum(map(len, sent.values())) != hops * count:
        present = {action for row in plan.actions for action in row if action.op in (Op.SEND_F, Op.SEND_B)}
        wanted = [Action(s, Op.SEND_F, i) for s in range(len(up)) if up[s] >= 0 for i in range(count)]
        if not plan.forward_only:
            wanted += [Action(s, Op.SEND_B, i) for s in range(len(up)) if down[s] >= 0 for i in range(count)]
        missing = next(action for action in wanted if action not in present)
        raise ScheduleError(f"{missing} is missing: another rank needs the result")
    for edge in sent.keys() | received.keys():
        if sent[edge] != received[edge]:
            pairs = zip([*sent[edge], -1], [*received[edge], -1], strict=False)
            first, second = next(pair for pair in pairs if pair[0] != pair[1])
            raise ScheduleError(
                f"on the edge from rank {edge[0]} to rank {edge[1]} the sends and the receives differ: the sender is "
                f"at {_message(first, count)}, the receiver at {_message(second, count)}"
            )


def _message(number: int, count: int) -> str:
    if number < 0:
        return "its end"
    return f"the message for {_cell(number // 2, count, Op.RECV_B if number % 2 else Op.RECV_F)}"


class _Needs(NamedTuple):
    """One rank's list as facts, entry by entry."""

    makes: list[int]  # the fact that the action makes
    also: list[int]  # a second fact that it makes (B: the weight gradient), or -1
    first: list[int]  # a fact that it needs, or -1
    second: list[int]  # another one, or -1


def _needs(plan: Plan, row: tuple[Action, ...]) -> _Needs:
    """What each action of a row makes and needs."""
    count, cells = plan.num_microbatches, plan.placement.num_stages * plan.num_microbatches
    last = plan.placement.num_stages - 1
    up, down = neighbours(plan) if plan.has_communication else ([-1] * (last + 1),) * 2
    grad, weight = _INPUT_GRAD * cells, _WEIGHT_GRAD * cells
    send_f, recv_f, send_b, recv_b = _SEND_F * cells, _RECV_F * cells, _SEND_B * cells, _RECV_B * cells
    makes, also, first, second = [], [-1] * len(row), [-1] * len(row), [-1] * len(row)
    for index, (stage, op, i) in enumerate(row):
        cell = stage * count + (i or 0)
        if op is Op.FORWARD:
            makes.append(cell)
            if stage > 0:
                first[index] = recv_f + cell if down[stage] >= 0 else cell - count
        elif op is Op.BACKWARD or op is Op.INPUT_GRAD:
            makes.append(grad + cell)
            if op is Op.BACKWARD:
                also[index] = weight + cell
            first[index] = cell
            if stage < last:
                second[index] = recv_b + cell if up[stage] >= 0 else grad + cell + count
        elif op is Op.WEIGHT_GRAD:
            makes.append(weight + cell)
            first[index] = grad + cell
        elif op is Op.SEND_F:
            makes.append(send_f + cell)
            first[index] = cell
        elif op is Op.RECV_F:
            makes.append(recv_f + cell)
            first[index] = send_f + cell - count
        elif op is Op.SEND_B:
            makes.append(send_b + cell)
            first[index] = grad + cell
        elif op is Op.RECV_B:
            makes.append(recv_b + cell)
            first[index] = send_b + cell + count
        else:
            makes.append(_REDUCED * cells + cell)
    return _Needs(makes, also, first, second)


def _needs_of_skips(plan: Plan, row: tuple[Action, ...], table: _Needs) -> _Needs:
    """The same with an entry for each skip in front of the action that uses it: needs its value, makes nothing (-1)."""
    count, grad = plan.num_microbatches, _INPUT_GRAD * plan.placement.num_stages * plan.num_microbatches
    found = _Needs([], [], [], [])
    for (stage, op, i), *entry in zip(row, *table, strict=True):
        extra: list[int] = []
        if op is Op.FORWARD:
            extra = [source * count + (i or 0) for source in sources(plan.skips, stage)]
        elif op in (Op.BACKWARD, Op.INPUT_GRAD):
            extra = [grad + user * count + (i or 0) for user in destinations(plan.skips, stage)]
        for fact in extra:
            for column, value in zip(found, (-1, -1, fact, -1), strict=True):
                column.append(value)
        for column, value in zip(found, entry, strict=True):
            column.append(value)
    return found


def _play(plan: Plan) -> None:
    """Runs all ranks as far as they go; whoever is left is stuck."""
    cells = plan.placement.num_stages * plan.num_microbatches
    done = bytearray(8 * cells + 1)
    done[-1] = 1  # index -1, "needs nothing", is a fact
    tables = [_needs(plan, row) for row in plan.actions]
    if plan.skips:
        tables = [_needs_of_skips(plan, row, table) for row, table in zip(plan.actions, tables, strict=True)]
    position = [0] * len(plan.actions)
    waiting: dict[int, list[int]] = {}  # missing fact -> ranks that stopped there
    runnable = list(range(len(plan.actions)))
    while runnable:
        rank = runnable.pop()
        makes, also, first, second = tables[rank]
        at, end = position[rank], len(makes)
        while at < end:
            missing = first[at] if not done[first[at]] else second[at]
            if not done[missing] or (makes[at] >= _REDUCED * cells and (missing := _unreduced(plan, done, makes[at]))):
                waiting.setdefault(missing, []).append(rank)
                break
            fact = makes[at]
            done[fact] = 1
            if fact in waiting:
                runnable.extend(waiting.pop(fact))
            if also[at] >= 0:
                done[also[at]] = 1  # only a REDUCE_GRAD of this very rank could wait for it
            at += 1
        position[rank] = at
    if waiting:
        stuck = {rank: _name(plan, fact) for fact, ranks in waiting.items() for rank in ranks}
        if plan.skips:  # entries that only need something are no actions
            position = [sum(fact >= 0 for fact in table.makes[:at]) for table, at in zip(tables, position, strict=True)]
        _raise_stuck(plan, position, stuck)


def _unreduced(plan: Plan, done: bytearray, reduced: int) -> int:
    """The first weight gradient of a stage that REDUCE_GRAD still misses; 0, which is never one, if there is none."""
    count = plan.num_microbatches
    cells = plan.placement.num_stages * count
    stage = (reduced - _REDUCED * cells) // count
    begin = _WEIGHT_GRAD * cells + stage * count
    found = done.find(0, begin, begin + count)
    return max(found, 0)


def _name(plan: Plan, fact: int) -> Action:
    """The action that makes a fact."""
    count = plan.num_microbatches
    cells = plan.placement.num_stages * count
    kind, cell = divmod(fact, cells)
    stage, i = divmod(cell, count)
    if kind in (_INPUT_GRAD, _WEIGHT_GRAD):
        half = Action(stage, Op.INPUT_GRAD if kind == _INPUT_GRAD else Op.WEIGHT_GRAD, i)
        return half if any(half in row for row in plan.actions) else Action(stage, Op.BACKWARD, i)
    ops = {_FORWARD: Op.FORWARD, _SEND_F: Op.SEND_F, _RECV_F: Op.RECV_F, _SEND_B: Op.SEND_B, _RECV_B: Op.RECV_B}
    return Action(stage, ops[kind], i)


def _raise_stuck(plan: Plan, position: list[int], stuck: dict[int, Action]) -> None:
    for rank, needed in sorted(stuck.items()):
        if needed in plan.actions[rank][position[rank] :]:
            raise _rejected(
                plan,
                rank,
                position[rank],
                f"rank {rank} reaches {plan.actions[rank][position[rank]]} before {needed}, which stands later in its "
                "own list",
            )
    # Each action that is waited for is there, as every send and receive is: on another rank, which waits, too.
    rank = min(stuck)
    waits = "; ".join(
        f"rank {r} at {plan.actions[r][position[r]]} waits for {needs}" for r, needs in sorted(stuck.items())
    )
    raise _rejected(plan, rank, position[rank], f"ranks wait for each other: {waits}", DeadlockError)


def _rejected(
    plan: Plan, rank: int, index: int, reason: str, kind: type[ScheduleError] = ScheduleError
) -> ScheduleError:
    return kind(f"{reason}\n{plan.to_text(mark=(rank, index), window=_WINDOW)}")
