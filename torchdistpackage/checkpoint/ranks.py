"""What the ranks of a checkpoint tell each other: plain data, over a group of their own, and one error for all.

A save may run beside the steps, so its messages must never meet theirs: it has its own gloo group of all ranks, made
at construction. In one process without process groups everything here is that process's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

import torch.distributed as dist

from torchdistpackage.errors import CheckpointError, TorchDistError
from torchdistpackage.topology import tpc
from torchdistpackage.topology.connections import interrupt
from torchdistpackage.topology.exchange import gather_json
from torchdistpackage.topology.process_groups import create_groups, destroy_groups
from torchdistpackage.topology.rank_table import rank_table

__all__ = ["Ranks"]

T = TypeVar("T")


@final
class Ranks:
    """All ranks, or this process alone. Making it is collective.

    Args:
        timeout: Seconds until a rank that does not answer is given up.
    """

    def __init__(self, timeout: float) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                table = rank_table(self.size, [("data", self.size)])
                made = create_groups({"checkpoint": (table, "data")}, timeout=timeout, backend="gloo")
                self._group = made["checkpoint"]
        self._broken = False

    @property
    def place(self) -> tuple[int, int]:
        """In the pipeline, and among the ranks that share out experts: with equal ones, replicas or shards."""
        pipe = tpc.get_pp_rank() if tpc.is_mode_inited("pipe") else 0
        return pipe, tpc.get_group_rank("moe_ep") if tpc.is_mode_inited("moe_ep") else 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can say. Collective.

        Raises:
            CheckpointError: A rank has ended or does not answer.
        """
        if self.size == 1:
            return [value]
        return self._reached(lambda group: gather_json(value, group))

    def together(self, what: str, function: Callable[[], T]) -> list[T]:
        """Calls a function on every rank, and gathers what comes of it: JSON, or one error on all ranks. Collective.

        Args:
            what: What is tried, in words, for the error.
            function: Makes no messages.

        Raises:
            CheckpointError: It raised on some rank, or a rank has ended.
        """
        error: BaseException | None = None
        answer: Any = {}
        try:
            answer = {"value": function()}
        except Exception as raised:  # told to the others below, whatever it is
            error, answer = raised, {"error": _words(raised)}
        answers = self.gather(answer)
        failed = [rank for rank, one in enumerate(answers) if "error" in one]
        if failed:
            first = answers[failed[0]]["error"]
            others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            where = f"{what}: on rank {failed[0]}{others}: " if self.size > 1 else f"{what}: "
            raise CheckpointError(f"{where}{first}") from error
        return [one["value"] for one in answers]

    def close(self) -> None:
        """Lets go of the group, where torch allows it."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            destroy_groups([group])

    def _reached(self, exchange: Callable[[dist.ProcessGroup], T]) -> T:
        group = self._group
        if group is None or self._broken:
            raise CheckpointError("the ranks of the checkpoint have lost each other before; start all ranks again")
        try:
            return exchange(group)
        except (RuntimeError, ValueError) as error:
            self._broken = True
            interrupt([group])  # ends the waits of the other ranks: they get an error now, not after the timeout
            raise CheckpointError(
                f"the ranks of the checkpoint cannot reach each other any more: one has ended, failed or is stuck "
                f"({str(error).splitlines()[0][:200]}); the newest whole checkpoint is still there, start again from it"
            ) from error


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, TorchDistError) else f"{type(error).__name__}: {error}"
