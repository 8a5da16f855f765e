"""A learning rate scheduler's state, for the groups of this rank's optimizer.

A scheduler has lists with an entry a parameter group. Stages have groups of their own, in number, order and options, so
another rank's lists are of other groups: learning rates of 0.01 would become 0.1, and nothing would say so::

    same layout        each rank's own state, as it was
    another layout     the first rank's, with the lists that are here:
                         alike on all ranks and for all groups     as they were, an entry a group
                         base_lrs, _last_lr                        initial_lr and lr of the groups, which have theirs
                                                                   by the names of their parameters (`options.py`)
                         lr_lambdas, min_lrs, max_lrs              as the present scheduler was made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from torchdistpackage.checkpoint.options import equal_options

__all__ = ["is_scheduler", "state_for"]

_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs")


def is_scheduler(value: object) -> bool:
    """Whether its state has an entry a parameter group."""
    return isinstance(value, LRScheduler)


def state_for(scheduler: Any, states: Sequence[Mapping[str, Any]], rank: int, *, same: bool) -> dict[str, Any]:
    """What this rank's scheduler is to load, after its optimizer has its options.

    Args:
        scheduler: Of this rank.
        states: Of all ranks that saved.
        rank: This one.
        same: Whether they hold what the ranks hold now.

    Example:
        >>> import torch
        >>> groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2)]
        >>> here = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(groups), 5)
        >>> state_for(here, [{"last_epoch": 3, "base_lrs": [0.1]}, {"last_epoch": 3, "base_lrs": [0.2]}], 0, same=False)
        {'last_epoch': 3, 'base_lrs': [0.1, 0.2]}
    """
    if same and len(states[rank].get("_last_lr", ())) in (0, len(scheduler.optimizer.param_groups)):
        return dict(states[rank])
    alike = all(equal_options(states[0], one) for one in states)
    return _fitted(scheduler, states[0], alike=alike)


def _fitted(scheduler: Any, state: Mapping[str, Any], *, alike: bool) -> dict[str, Any]:
    groups, fitted = scheduler.optimizer.param_groups, dict(state)
    if "_schedulers" in fitted:
        both = zip(scheduler._schedulers, state["_schedulers"], strict=True)
        fitted["_schedulers"] = [_fitted(one, its, alike=alike) for one, its in both]
    for key in _LISTS:
        values = state.get(key)
        if not isinstance(values, list):
            continue
        if alike and values and all(equal_options(values[0], one) for one in values):
            fitted[key] = [_copied(values[0]) for _ in groups]
        elif key == "base_lrs":
            fitted[key] = [_copied(group.get("initial_lr", group["lr"])) for group in groups]
        elif key == "_last_lr":
            fitted[key] = [_copied(group["lr"]) for group in groups]
        elif key == "lr_lambdas":
            fitted[key] = [None for _ in groups]  # the key itself is asked for
        else:
            del fitted[key]
    return fitted


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
