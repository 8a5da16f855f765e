"""Which checkpoint all ranks load: the first rank looks at the folders, and all share the reading of hashes.

Only a checkpoint whose every file is whole counts. What is newer and torn is named, so that nobody wonders where the
steps went.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torchdistpackage.checkpoint.folder import candidates, fault_of, find_unfinished, step_folder, step_of, what_it_is
from torchdistpackage.checkpoint.manifest import Manifest, read_manifest
from torchdistpackage.checkpoint.ranks import Ranks
from torchdistpackage.errors import CheckpointError

__all__ = ["Choice", "choose"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Choice:
    """What is to be loaded.

    Attributes:
        path: Its folder; None: there is none.
        skipped: Name and fault of each newer one that is torn.
    """

    path: Path | None
    skipped: tuple[tuple[str, str], ...]


def choose(run: Path, which: int | str | os.PathLike[str] | None, ranks: Ranks, *, verify: bool) -> Choice:
    """The checkpoint that is asked for, or the newest one that is whole. Collective.

    Args:
        run: The folder of the run.
        which: A step, a folder, or None for the newest.
        ranks: All.
        verify: Compare hashes, not only sizes.

    Raises:
        CheckpointError: What is asked for is not there, torn or foreign. On every rank.
    """
    skipped: list[tuple[str, str]] = []
    while True:
        answer = _look(run, which, skipped, ranks)
        skipped = [(name, reason) for name, reason in answer["skipped"]]
        path = None if answer["path"] is None else Path(answer["path"])
        fault = _shared_fault(path, ranks) if path is not None and verify else None
        if path is None or fault is None:
            break
        if which is not None:
            raise CheckpointError(f"{path} is torn: {fault}. Load another one; list_checkpoints({str(run)!r}) has all")
        skipped.append((path.name, fault))
    if ranks.rank == 0:
        for name, reason in skipped:
            _logger.warning("checkpoint %s was skipped: %s", name, reason)
    return Choice(path, tuple(skipped))


def _look(run: Path, which: Any, skipped: list[tuple[str, str]], ranks: Ranks) -> dict[str, Any]:
    """Rank 0's word, on all ranks."""

    def look() -> dict[str, Any] | None:
        if ranks.rank:
            return None
        return _newest(run, skipped) if which is None else _named(run, which)

    found = ranks.together("load", look)[0]
    assert found is not None
    return found


def _named(run: Path, which: int | str | os.PathLike[str]) -> dict[str, Any]:
    path = step_folder(run, which) if isinstance(which, int) else Path(which)
    if isinstance(which, int) and not path.exists():
        path = next((one for one in candidates(run) if step_of(one) == which), path)
    if (problem := what_it_is(path)) is not None:
        have = ", ".join(one.name for one in candidates(run)[:5])
        raise CheckpointError(f"{path} is no checkpoint: {problem}. {run} has {have or 'none'}")
    if (problem := fault_of(path, hashes=False)) is not None:
        raise CheckpointError(f"{path} is torn: {problem}. Load another one; list_checkpoints({str(run)!r}) has all")
    return {"path": str(path), "skipped": []}


def _newest(run: Path, known: list[tuple[str, str]]) -> dict[str, Any]:
    skipped = list(known)
    names = {name for name, _ in skipped}
    chosen = None
    for path in candidates(run):
        if path.name in names:
            continue
        fault = fault_of(path, hashes=False)
        if fault is None:
            chosen = path
            break
        skipped.append((path.name, fault))
        names.add(path.name)
    newest = -1 if chosen is None else step_of(chosen) or 0
    for path in find_unfinished(run):
        step = step_of(path.with_name(path.name.partition(".")[0]))
        if step is not None and step > newest and path.name not in names:
            skipped.append((path.name, what_it_is(path) or "it was not finished"))
    return {"path": None if chosen is None else str(chosen), "skipped": sorted(skipped, reverse=True)}


def _shared_fault(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with the contents of any file; each rank reads some of them."""

    def look() -> str | None:
        manifest = read_manifest(path)
        return fault_of(path, names=_share(manifest, ranks.rank, ranks.size))

    return next((fault for fault in ranks.together("load", look) if fault is not None), None)


def _share(manifest: Manifest, rank: int, size: int) -> list[str]:
    """A rank's files: the largest first, each to the rank with the fewest bytes."""
    loads = [0] * size
    mine = []
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += manifest.files[name].nbytes + 1
        if least == rank:
            mine.append(name)
    return mine
