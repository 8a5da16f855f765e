"""Passes: plan in, plan out. A recipe yields compute actions only; the passes add everything that follows from them.

::

    recipe            0F0 0F1 0B0 0F2 0B1 0B2
    add_communication 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2
    add_reduce_grad   ... 0B2 0REDUCE_GRAD
    forward_only      0F0 0F1 0F2
    merge_backwards   ... 0I0 0W0 ...  ->  ... 0B0 ...          split_backwards: the other way round

Neighbours: `building.py` strings the passes together, `verify.py` judges what comes out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.plan import Plan

__all__ = [
    "add_communication",
    "add_reduce_grad",
    "forward_only",
    "merge_backwards",
    "split_backwards",
    "without_communication",
]

_GRAD_TO_WEIGHT = (Op.BACKWARD, Op.WEIGHT_GRAD)
_new = tuple.__new__  # half the price of Action(...), which counts at 400,000 actions


def forward_only(plan: Plan) -> Plan:
    """Keeps the forwards: the same order without any backward, for evaluation.

    Example:
        >>> forward_only(Plan.from_text("0F0 0B0 0F1 0B1")).to_text()
        'rank 0: 0F0 0F1'
    """
    return plan.with_actions([action for action in row if action.op is Op.FORWARD] for row in plan.actions)


def without_communication(plan: Plan) -> Plan:
    r"""Leaves out what `add_communication` and `add_reduce_grad` add.

    Example:
        >>> print(without_communication(add_communication(Plan.from_text("0F0 0B0 \n 1F0 1B0"))).to_text())
        rank 0: 0F0 0B0
        rank 1: 1F0 1B0
    """
    return plan.with_actions([action for action in row if action.op.is_compute] for row in plan.actions)


def split_backwards(plan: Plan) -> Plan:
    """Writes every whole backward as the gradient of the input followed by that of the weights.

    Example:
        >>> split_backwards(Plan.from_text("0F0 0B0")).to_text()
        'rank 0: 0F0 0I0 0W0'
    """

    def split(row: tuple[Action, ...]) -> Iterator[Action]:
        for action in row:
            if action.op is Op.BACKWARD:
                yield Action(action.stage, Op.INPUT_GRAD, action.microbatch)
                yield Action(action.stage, Op.WEIGHT_GRAD, action.microbatch)
            else:
                yield action

    return plan.with_actions(split(row) for row in plan.actions)


def merge_backwards(plan: Plan) -> Plan:
    """Writes an input gradient that is followed at once by its weight gradient as a whole backward.

    Saves the cost of splitting; the stage before then waits for the weights, too. Comes before `add_communication`.

    Example:
        >>> merge_backwards(Plan.from_text("0F0 0F1 0I0 0W0 0I1 0W1")).to_text()
        'rank 0: 0F0 0F1 0B0 0B1'
    """
    rows = []
    for row in plan.actions:
        merged: list[Action] = []
        for action in row:
            if action.op is Op.WEIGHT_GRAD and merged and merged[-1] == action._replace(op=Op.INPUT_GRAD):
                merged[-1] = action._replace(op=Op.BACKWARD)
            else:
                merged.append(action)
        rows.append(merged)
    return plan.with_actions(rows)


def add_reduce_grad(plan: Plan) -> Plan:
    """Puts `REDUCE_GRAD` behind the last action of each stage that touches weight gradients, where it is not yet.

    Example:
        >>> add_reduce_grad(Plan.from_text("0F0 0F1 0B0 0B1")).to_text()
        'rank 0: 0F0 0F1 0B0 0B1 0REDUCE_GRAD'
    """
    rows = []
    for row in plan.actions:
        last: dict[int, int] = {}
        for index, (stage, op, _) in enumerate(row):
            if op in _GRAD_TO_WEIGHT:
                last[stage] = index
        present = {stage for stage, op, _ in row if op is Op.REDUCE_GRAD}
        lowered = list(row)
        for stage, index in sorted(last.items(), key=lambda item: -item[1]):
            if stage not in present:
                lowered.insert(index + 1, Action(stage, Op.REDUCE_GRAD, None))
        rows.append(lowered)
    return plan.with_actions(rows)


def add_communication(plan: Plan) -> Plan:
    r"""Adds a send behind every action whose result another rank needs, and a receive before every use.

    Hops between two stages of one rank stay without messages. On each directed edge between two ranks the receives
    stand in the order of the sends, because a NCCL communicator is one FIFO; where the order of use differs, the
    receive of the earlier-sent message moves forward to make room. Cost: about 1 us an action.

    Raises:
        ScheduleError: The plan has communication already.

    Example:
        >>> print(add_communication(Plan.from_text("0F0 0B0 \n 1F0 1B0")).to_text())
        rank 0: 0F0 0SEND_F0 0RECV_B0 0B0
        rank 1: 1RECV_F0 1F0 1B0 1SEND_B0
    """
    if plan.has_communication:
        raise ScheduleError(f"plan {plan.name!r} has communication already; without_communication(plan) removes it")
    arrivals = _receives(plan)
    up, down = neighbours(plan)
    send_f, send_b, forward, weight = Op.SEND_F, Op.SEND_B, Op.FORWARD, Op.WEIGHT_GRAD
    rows = []
    for row, arriving in zip(plan.actions, arrivals, strict=True):
        lowered: list[Action] = []
        append = lowered.append
        for index, action in enumerate(row):
            if index in arriving:
                lowered.extend(reversed(arriving[index]))
            append(action)
            stage, op, i = action
            if op is forward:
                if up[stage] >= 0:
                    append(_new(Action, (stage, send_f, i)))
            elif op is not weight and i is not None and down[stage] >= 0:
                append(_new(Action, (stage, send_b, i)))
        rows.append(lowered)
    return plan.with_actions(rows)


def neighbours(plan: Plan) -> tuple[list[int], list[int]]:
    """For every stage the rank of the stage above and below it, or -1 where no message is needed."""
    owners = plan.placement.owners
    pairs = list(itertools.pairwise(owners))
    return [*(b if a != b else -1 for a, b in pairs), -1], [-1, *(a if a != b else -1 for a, b in pairs)]


def _receives(plan: Plan) -> list[dict[int, list[Action]]]:
    """For every rank: index in its list -> the receives that stand before it, last one first."""
    up, down = neighbours(plan)
    count = plan.num_microbatches
    forward, weight, recv_f, recv_b = Op.FORWARD, Op.WEIGHT_GRAD, Op.RECV_F, Op.RECV_B
    # Where each (stage, micro-batch) is used; a result that nobody uses is received at the end, and rejected later.
    use: tuple[dict[int, int], dict[int, int]] = ({}, {})
    queues: dict[tuple[int, int], list[Action]] = defaultdict(list)  # (sender, receiver) -> receives in send order
    for rank, row in enumerate(plan.actions):
        for index, (stage, op, i) in enumerate(row):
            if i is None or op is weight:
                continue
            use[op is not forward][stage * count + i] = index
            receiver = up[stage] if op is forward else down[stage]
            if receiver >= 0:
                about = (stage + 1, recv_f, i) if op is forward else (stage - 1, recv_b, i)
                queues[rank, receiver].append(_new(Action, about))
    receives: list[dict[int, list[Action]]] = [{} for _ in plan.actions]
    for (_, receiver), queue in queues.items():
        position, before = len(plan.actions[receiver]), receives[receiver]
        for receive in reversed(queue):
            # A receive stands right before its use, or earlier if a later-sent message is used before it.
            stage, op, i = receive
            found = use[op is recv_b].get(stage * count + (i or 0), position)
            if found < position:
                position = found
            before.setdefault(position, []).append(receive)
    return receives
