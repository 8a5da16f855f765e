"""The one judge of plans: what it accepts runs to its end on any transport, what it rejects it shows.

It plays the plan once, without time: every rank goes down its list and stops at an action whose inputs are not there
yet. A receive waits for its send (the strictest reading, true for NCCL), a send never waits. What it proves:

- every stage runs each micro-batch exactly once, forward and (in training) backward, whole or as I + W;
- nothing is used before it exists, and gradients are reduced after the last backward of their stage;
- every hop between two ranks has exactly one send and one receive, in one order on each directed edge;
- all ranks reach the end of their lists: no deadlock.

Cost: once per distinct plan, about 2 us an action.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from torchdistpackage.errors import DeadlockError, ScheduleError
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.lowering import _matching_receive, _send_after
from torchdistpackage.schedule.plan import Plan

__all__ = ["peak_activations", "verify"]

_WINDOW = 6


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
    count = Counter(action for row in plan.actions for action in row)
    for rank, row in enumerate(plan.actions):
        for index, action in enumerate(row):
            known = 0 <= action.stage < plan.placement.num_stages
            if not known or plan.placement.owner(action.stage) != rank:
                raise _rejected(plan, rank, index, f"{action} is on rank {rank}, which does not own its stage")
            if action.microbatch is not None and not 0 <= action.microbatch < plan.num_microbatches:
                raise _rejected(plan, rank, index, f"{action} is outside of the {plan.num_microbatches} micro-batches")
            if plan.forward_only and action.op is Op.REDUCE_GRAD:
                raise _rejected(plan, rank, index, f"{action} has no backward before it anywhere in the plan")
            if count[action] > 1:
                raise _rejected(plan, rank, index, f"{action} stands {count[action]} times in the plan")
    for stage in range(plan.placement.num_stages):
        for i in range(plan.num_microbatches):
            forward, whole, half, weight = (
                count[Action(stage, op, i)] for op in (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD)
            )
            if not forward:
                raise ScheduleError(f"{Action(stage, Op.FORWARD, i)} is missing from the plan")
            if not plan.forward_only and (whole, half, weight) not in ((1, 0, 0), (0, 1, 1)):
                raise ScheduleError(
                    f"micro-batch {i} on stage {stage} needs one B, or one I and one W; the plan has "
                    f"{whole} B, {half} I and {weight} W"
                )


def _check_edges(plan: Plan) -> None:
    """Sends meet receives: one each for every hop that needs one, in one order on each directed edge."""
    placement = plan.placement
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    needed = {send for row in plan.actions for action in row if (send := _send_after(plan, action)) is not None}
    for rank, row in enumerate(plan.actions):
        for index, action in enumerate(row):
            if action.op in (Op.SEND_F, Op.SEND_B):
                if action not in needed:
                    raise _rejected(plan, rank, index, f"{action} sends what no other rank takes")
                needed.remove(action)
                receive = _matching_receive(action)
                sent[rank, placement.owner(receive.stage)].append(receive)
            elif action.op in (Op.RECV_F, Op.RECV_B):
                source = action.stage + (-1 if action.op is Op.RECV_F else 1)
                if not 0 <= source < placement.num_stages:
                    raise _rejected(plan, rank, index, f"{action} has no stage to receive from")
                received[placement.owner(source), rank].append(action)
    if needed:
        raise ScheduleError(f"{min(needed)} is missing: another rank needs the result")
    for edge in sent.keys() | received.keys():
        if sent[edge] != received[edge]:
            pairs = zip(sent[edge] + [None], received[edge] + [None], strict=False)
            first = next(pair for pair in pairs if pair[0] != pair[1])
            raise ScheduleError(
                f"on the edge from rank {edge[0]} to rank {edge[1]} the sends and the receives differ: the sender is "
                f"at the message for {first[0]}, the receiver at {first[1]}"
            )


def _play(plan: Plan) -> None:
    """Runs all ranks as far as they go; whoever is left is stuck."""
    done: set[Action] = set()
    position = [0] * len(plan.actions)
    waiting: dict[Action, list[int]] = defaultdict(list)  # missing action -> ranks that stopped there
    left = _actions_left_for_reduce(plan)
    runnable = list(range(len(plan.actions)))
    while runnable:
        rank = runnable.pop()
        row = plan.actions[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            missing = _missing_input(plan, action, done, left)
            if missing is not None:
                waiting[missing].append(rank)
                break
            done.add(action)
            if action.op in (Op.BACKWARD, Op.WEIGHT_GRAD):
                left[action.stage] -= 1
            position[rank] += 1
            if action in waiting:
                runnable.extend(waiting.pop(action))
    stuck = {rank: needed for needed, ranks in waiting.items() for rank in ranks}
    if stuck:
        _raise_stuck(plan, position, stuck)


def _actions_left_for_reduce(plan: Plan) -> list[int]:
    left = [0] * plan.placement.num_stages
    for row in plan.actions:
        for action in row:
            if action.op in (Op.BACKWARD, Op.WEIGHT_GRAD):
                left[action.stage] += 1
    return left


def _missing_input(plan: Plan, action: Action, done: set[Action], left: list[int]) -> Action | None:
    """The first input of an action that does not exist yet."""
    stage, op, i = action
    last, owner = plan.placement.num_stages - 1, plan.placement.owners
    needs: list[Action] = []
    if op is Op.FORWARD and stage > 0:
        by_message = plan.has_communication and owner[stage - 1] != owner[stage]
        needs = [Action(stage, Op.RECV_F, i) if by_message else Action(stage - 1, Op.FORWARD, i)]
    elif op in (Op.BACKWARD, Op.INPUT_GRAD):
        needs = [Action(stage, Op.FORWARD, i)]
        if stage < last:
            if plan.has_communication and owner[stage + 1] != owner[stage]:
                needs.append(Action(stage, Op.RECV_B, i))
            elif Action(stage + 1, Op.BACKWARD, i) not in done:
                needs.append(_input_gradient(plan, stage + 1, i))
    elif op is Op.WEIGHT_GRAD:
        needs = [Action(stage, Op.INPUT_GRAD, i)]
    elif op is Op.SEND_F:
        needs = [Action(stage, Op.FORWARD, i)]
    elif op is Op.SEND_B:
        needs = [_input_gradient(plan, stage, i)]
    elif op is Op.RECV_F:
        needs = [Action(stage - 1, Op.SEND_F, i)]
    elif op is Op.RECV_B:
        needs = [Action(stage + 1, Op.SEND_B, i)]
    elif op is Op.REDUCE_GRAD and left[stage]:
        row = plan.actions[owner[stage]]
        ops = (Op.BACKWARD, Op.WEIGHT_GRAD)
        needs = [a for a in row if a.stage == stage and a.op in ops and a not in done]
    return next((need for need in needs if need not in done), None)


def _input_gradient(plan: Plan, stage: int, microbatch: int | None) -> Action:
    """The action that makes the input gradient: B or I, whichever the plan has for this stage."""
    split = Action(stage, Op.INPUT_GRAD, microbatch)
    return split if stage in _split_stages(plan) else Action(stage, Op.BACKWARD, microbatch)


def _split_stages(plan: Plan) -> frozenset[int]:
    cached: frozenset[int] | None = plan.__dict__.get("_split_stages")
    if cached is None:
        cached = frozenset(a.stage for row in plan.actions for a in row if a.op is Op.INPUT_GRAD)
        plan.__dict__["_split_stages"] = cached
    return cached


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
    every = {action for row in plan.actions for action in row}
    rank, needed = min(stuck.items())
    at = plan.actions[rank][position[rank]]
    if needed not in every:
        raise _rejected(plan, rank, position[rank], f"{at} on rank {rank} needs {needed}, which the plan does not have")
    waits = "; ".join(
        f"rank {r} at {plan.actions[r][position[r]]} waits for {needs}" for r, needs in sorted(stuck.items())
    )
    raise _rejected(plan, rank, position[rank], f"ranks wait for each other: {waits}", DeadlockError)


def _rejected(
    plan: Plan, rank: int, index: int, reason: str, kind: type[ScheduleError] = ScheduleError
) -> ScheduleError:
    return kind(f"{reason}\n{plan.to_text(mark=(rank, index), window=_WINDOW)}")
