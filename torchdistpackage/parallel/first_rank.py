"""What one rank measures or decides, for all: times differ from process to process, and so would what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdistpackage.errors import SplitError
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import broadcast_json

__all__ = ["decided_by_the_first_rank"]


def decided_by_the_first_rank(decide: Callable[[], Any], failure: str) -> Any:
    """What the first rank of the first pipeline decides, on every rank. Collective over all replicas.

    Args:
        decide: Returns what JSON can say, and no text; runs on that rank alone.
        failure: What it could not do, for the error on the other ranks.

    Raises:
        SplitError: It failed there; an error goes round as well, because the others would wait for ever.
    """
    # First to the first ranks of the replicas, whose stages must be alike, then down each pipeline.
    modes = [mode for mode in ("data", "tensor", "pipe") if tpc.is_mode_inited(mode)]
    found: Any = ""
    cause: Exception | None = None
    if all(tpc.get_group_rank(mode) == 0 for mode in modes):
        try:
            found = decide()
        except Exception as error:
            cause, found = error, str(error)
    for mode in modes:
        found = broadcast_json(found, tpc.get_control_group(mode))
    if isinstance(found, str):
        raise SplitError(f"the first rank of the pipeline could not {failure}: {found}") from cause
    return found
