"""Passes: plan in, plan out. A recipe yields compute actions only; the passes add everything that follows from them.

::

    recipe            0F0 0F1 0B0 0F2 0B1 0B2
    add_communication 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2
    add_reduce_grad   ... 0B2 0REDUCE_GRAD
    forward_only      0F0 0F1 0F2

Neighbours: `registry.py` strings the passes together, `verify.py` judges what comes out.
"""

from __future__ import annotations

from collections import defaultdict

from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.plan import Plan

__all__ = ["add_communication", "add_reduce_grad", "forward_only"]

_GRAD_TO_INPUT = (Op.BACKWARD, Op.INPUT_GRAD)
_GRAD_TO_WEIGHT = (Op.BACKWARD, Op.WEIGHT_GRAD)


def forward_only(plan: Plan) -> Plan:
    """Keeps the forwards: the same order without any backward, for evaluation.

    Example:
        >>> forward_only(Plan.from_text("0F0 0B0 0F1 0B1")).to_text()
        'rank 0: 0F0 0F1'
    """
    return plan.with_actions([action for action in row if action.op is Op.FORWARD] for row in plan.actions)


def add_reduce_grad(plan: Plan) -> Plan:
    """Puts `REDUCE_GRAD` behind the last action of each stage that touches weight gradients.

    Example:
        >>> add_reduce_grad(Plan.from_text("0F0 0F1 0B0 0B1")).to_text()
        'rank 0: 0F0 0F1 0B0 0B1 0REDUCE_GRAD'
    """
    rows = []
    for row in plan.actions:
        last = {action.stage: index for index, action in enumerate(row) if action.op in _GRAD_TO_WEIGHT}
        lowered: list[Action] = []
        for index, action in enumerate(row):
            lowered.append(action)
            if last.get(action.stage) == index:
                lowered.append(Action(action.stage, Op.REDUCE_GRAD, None))
        rows.append(lowered)
    return plan.with_actions(rows)


def add_communication(plan: Plan) -> Plan:
    r"""Adds a send behind every action whose result another rank needs, and a receive before every use.

    Hops between two stages of one rank stay without messages. On each directed edge between two ranks the receives
    stand in the order of the sends, because a NCCL communicator is one FIFO; where the order of use differs, the
    receive of the earlier-sent message moves forward to make room.

    Example:
        >>> print(add_communication(Plan.from_text("0F0 0B0 \n 1F0 1B0")).to_text())
        rank 0: 0F0 0SEND_F0 0RECV_B0 0B0
        rank 1: 1RECV_F0 1F0 1B0 1SEND_B0
    """
    sends = {action: _send_after(plan, action) for row in plan.actions for action in row}
    queues: dict[tuple[int, int], list[Action]] = defaultdict(list)  # (sender, receiver) -> receives in send order
    for rank, row in enumerate(plan.actions):
        for action in row:
            send = sends[action]
            if send is not None:
                receive = _matching_receive(send)
                queues[rank, plan.placement.owner(receive.stage)].append(receive)
    receives: list[dict[int, list[Action]]] = [defaultdict(list) for _ in plan.actions]
    uses = [{_receive_before(action): index for index, action in enumerate(row)} for row in plan.actions]
    for (_, receiver), queue in queues.items():
        position = len(plan.actions[receiver])
        for receive in reversed(queue):
            # A receive stands right before its use, or earlier if a later-sent message is used before it.
            position = min(position, uses[receiver].get(receive, position))
            receives[receiver][position].append(receive)
    rows = []
    for rank, row in enumerate(plan.actions):
        lowered: list[Action] = []
        for index, action in enumerate(row):
            lowered.extend(reversed(receives[rank].get(index, [])))
            lowered.append(action)
            send = sends[action]
            if send is not None:
                lowered.append(send)
        rows.append(lowered)
    return plan.with_actions(rows)


def _send_after(plan: Plan, action: Action) -> Action | None:
    """The send that the result of a compute action needs; None when it stays on the rank or has no taker."""
    stage, owner = action.stage, plan.placement.owners
    if action.op is Op.FORWARD and stage + 1 < len(owner) and owner[stage + 1] != owner[stage]:
        return Action(stage, Op.SEND_F, action.microbatch)
    if action.op in _GRAD_TO_INPUT and stage > 0 and owner[stage - 1] != owner[stage]:
        return Action(stage, Op.SEND_B, action.microbatch)
    return None


def _matching_receive(send: Action) -> Action:
    """2SEND_F0 is met by 3RECV_F0, 2SEND_B0 by 1RECV_B0."""
    if send.op is Op.SEND_F:
        return Action(send.stage + 1, Op.RECV_F, send.microbatch)
    return Action(send.stage - 1, Op.RECV_B, send.microbatch)


def _receive_before(action: Action) -> Action | None:
    """The receive that would feed a compute action, whether or not the plan needs one."""
    if action.op is Op.FORWARD:
        return Action(action.stage, Op.RECV_F, action.microbatch)
    if action.op in _GRAD_TO_INPUT:
        return Action(action.stage, Op.RECV_B, action.microbatch)
    return None
