"""How many rows the batch has, on every rank: only the rank where it enters can count them.

A step needs to know it before it starts where the number of micro-batches depends on it. The number goes from neighbour
to neighbour, ahead of the first activation, for which everybody waits anyway::

    rank 0: rows -> rank 1 -> rank 2 -> rank 3          then F0 of rank 0, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from zlib import crc32

import torch

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.pipeline_state import current_state
from torchdistpackage.runtime.message import Kind, flatten

__all__ = ["rows_on_every_rank"]

_ROWS = 5  # what an exchange is about, in the place of a micro-batch's number; see `step_plan.py`


def rows_on_every_rank(count: Callable[[], int | None], owner: int = 0, given: Iterable[str] = ()) -> int:
    """The rows of the batch that comes next. Collective over the pipeline.

    Args:
        count: Looks at this rank's inputs; what it raises, every rank hears of. Its result counts on one rank.
        owner: The rank of the first stage.
        given: Names of what was given on this rank and must have been given on all of them.

    Raises:
        PipelineError: There is nothing to count on the rank of the first stage; something else was given here than
            there; or another rank failed.
        TopologyError: Process groups have not been set up.

    Example:
        >>> samples = torch.zeros(6, 2)  # on the rank of the first stage
        >>> rows_on_every_rank(lambda: len(samples))
        6
    """
    state = current_state()
    transport = state.transport
    rank, names = transport.rank, crc32(" ".join(sorted(given)).encode())
    with transport.guard("counting the rows of the batch"):
        state.recover()
        transport.announce("the rows of the batch")
        rows = count()
        if rank != owner:
            sender = rank + 1 if rank < owner else rank - 1
            rows, there = transport.inlet(sender).take(Kind.VALUE, owner, _ROWS).tensors[0].tolist()
            if there != names:
                raise PipelineError(
                    f"rank {rank} of the pipeline was given {', '.join(sorted(given)) or 'no keyword arguments'}, and "
                    f"rank {owner}, where the first stage is, something else: give every rank the same ones"
                )
        elif not rows:
            raise PipelineError(
                f"there is no batch on rank {rank} of the pipeline, where the first stage is: pass it there, with at "
                "least one row"
            )
        for receiver in (rank - 1, rank + 1):
            if 0 <= receiver < transport.num_ranks and abs(receiver - owner) > abs(rank - owner):
                transport.outlet(receiver).send(Kind.VALUE, owner, _ROWS, 0, *flatten(torch.tensor([rows, names])))
    assert rows is not None
    return rows
