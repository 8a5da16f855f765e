"""The ranks that read and write safetensors together: one group of theirs for as long as torch.distributed runs.

Made at the first call and kept. A group that is made and destroyed in every call costs more, and in torch 2.6 the
destructor of a gloo group that has just been used may wait for a thread that waits for it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from torchdistpackage.checkpoint.ranks import Ranks

__all__ = ["all_ranks"]

_TIMEOUT = 1800.0  # seconds that ranks wait for one that reads or writes
_made: list[tuple[Any, Ranks]] = []  # the group of all ranks for which it was made, and what was made


def all_ranks() -> Ranks:
    """All ranks, or this process alone. The first call is collective.

    Example:
        >>> all_ranks().size
        1
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is None:
        return Ranks(_TIMEOUT)
    if not _made or _made[0][0] is not world:
        _made[:] = [(world, Ranks(_TIMEOUT))]
    return _made[0][1]
