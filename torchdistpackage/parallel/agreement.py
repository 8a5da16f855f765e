"""Work that must succeed on every rank or on none: a rank that fails alone leaves the others waiting for it.

::

    rank 0: work() fine  --+                       +-->  raises: "global rank 1 could not read its stages: ..."
                           +--  texts go round  ---+
    rank 1: work() fails --+                       +-->  raises its own exception

Neighbours: `first_rank.py` has one rank decide for all; here all work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from torchdistpackage.errors import TorchDistError
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json

__all__ = ["said_by_all", "together"]

Result = TypeVar("Result")


def together(work: Callable[[], Result], what: str, failure: type[TorchDistError]) -> Result:
    """Does something on every rank of all replicas; if it fails on one, it fails on all, and the groups stay whole.

    Collective, where process groups are set up; elsewhere it is a call of `work`.

    Args:
        work: What to do. If it talks to other ranks itself, it must see to their failures.
        what: What it could not do, for the error on the other ranks.
        failure: The class of that error. The rank that failed raises its own exception.

    Raises:
        TorchDistError: Of the class `failure`: another rank failed.

    Example:
        >>> together(lambda: 3, "count to three", TorchDistError)
        3
    """
    try:
        result, cause = work(), None
    except Exception as error:
        cause = error
    mine = None if cause is None else f"global rank {_global_rank()} could not {what}: {cause}"
    texts = said_by_all(mine)
    if cause is not None:
        raise cause
    wrong = [text for text in texts if text]
    if wrong:
        raise failure("; ".join(dict.fromkeys(wrong)))
    return result


def said_by_all(value: Any) -> list[Any]:
    """What every rank of all replicas says. Collective, where process groups are set up; elsewhere this rank's value.

    Args:
        value: What JSON can say.

    Example:
        >>> said_by_all("here")
        ['here']
    """
    values = [value]
    for mode in ("pipe", "tensor", "data"):
        if tpc.is_mode_inited(mode) and tpc.get_group_size(mode) > 1:
            values = [each for theirs in gather_json(values, tpc.get_control_group(mode)) for each in theirs]
    return values


def _global_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
