"""What goes with a model beside its tensors: scheduler, scaler, named objects, random numbers, the place in the data.

::

    objects      the same on every rank: the first rank's state, for all           shared.pt
    schedulers   alike, but for the groups of each rank's optimizer                shared.pt
    random       a rank's own, or new streams where the layout is another one      random.<rank>....
    data         a rank's own, or that of all where all had the same               rank-00003.pt
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torchdistpackage.checkpoint.job import rank_file
from torchdistpackage.checkpoint.manifest import read_manifest
from torchdistpackage.checkpoint.plain import packed, unpacked
from torchdistpackage.checkpoint.random_states import seed_streams, set_random_states
from torchdistpackage.checkpoint.restore import Restore
from torchdistpackage.checkpoint.schedulers import is_scheduler, state_for
from torchdistpackage.errors import CheckpointError

__all__ = ["Companions"]

_logger = logging.getLogger(__name__)


@final
class Companions:
    """The user's objects without tensors of the model.

    Args:
        scheduler: None, or something with a state.
        scaler: None, or something with a state.
        objects: More such, by name.
        data: None, or something with a state of this rank's own.

    Raises:
        CheckpointError: One has no state_dict and load_state_dict.
    """

    def __init__(self, scheduler: Any, scaler: Any, objects: Mapping[str, Any], data: Any) -> None:
        taken = {name for name, given in (("scheduler", scheduler), ("scaler", scaler)) if given is not None} & {
            *objects
        }
        if taken:
            raise CheckpointError(f"objects has {', '.join(sorted(taken))}, which is an argument, too; give it once")
        named = {"scheduler": scheduler, "scaler": scaler, **objects}
        self._objects = {name: one for name, one in named.items() if one is not None}
        self._data = data
        for name, one in [*self._objects.items(), *([("data", data)] if data is not None else [])]:
            if not (callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))):
                raise CheckpointError(
                    f"{name} is a {type(one).__name__} without state_dict and load_state_dict; save plain values with "
                    "save(step, extra=...)"
                )

    def states(self) -> dict[str, Any]:
        """Of the objects that are the same on all ranks.

        Raises:
            CheckpointError: Something in one could not be read back.
        """
        return {name: unpacked(packed(name, one.state_dict())) for name, one in self._objects.items()}

    def schedulers(self) -> dict[str, Any]:
        """States that are of this rank's parameter groups."""
        return {name: one.state_dict() for name, one in self._objects.items() if is_scheduler(one)}

    def own(self) -> bytes | None:
        """This rank's own state.

        Raises:
            CheckpointError: Something in it could not be read back.
        """
        return None if self._data is None else packed("data", self._data.state_dict())

    def look(self, saved: Mapping[str, Any], *, strict: bool) -> None:
        """Raises if an object was not saved.

        Raises:
            CheckpointError: One is missing.
        """
        missing = [name for name in self._objects if name not in saved]
        if missing and strict:
            raise CheckpointError(
                f"the checkpoint has no {', '.join(missing)}, only {', '.join(saved) or 'no objects'}; leave it out, "
                "or load(strict=False) to go on with it as it is"
            )

    def look_for_own(self, path: Path, rank: int, *, same: bool) -> str | None:
        """The file that this rank takes its own state from.

        Raises:
            CheckpointError: There is none for this layout.
        """
        if self._data is None:
            return None
        files = {name: facts for name, facts in read_manifest(path).files.items() if name.startswith("rank-")}
        if same and rank_file(rank) in files:
            return rank_file(rank)
        if not files:
            raise CheckpointError(
                f"{path.name} was saved without data=; load it without, or give data at the next save"
            )
        if len({facts.sha256 for facts in files.values()}) > 1:
            raise CheckpointError(
                f"{len(files)} ranks had each its own place in the data, and the layout is another one now: there is "
                "no way to tell a place for this rank. Save a position in rows of the whole data set instead: a "
                "ResumableSampler, through objects={'sampler': sampler}"
            )
        return min(files)

    def load(self, restore: Restore, rank: int, own: str | None, *, same: bool) -> None:
        """Gives everything back its state."""
        saved, schedulers = restore.shared["objects"], restore.shared["schedulers"]
        for name, one in self._objects.items():
            if is_scheduler(one) and name in schedulers[0]:
                one.load_state_dict(state_for(one, [each[name] for each in schedulers], rank, same=same))
            elif name in saved:
                one.load_state_dict(saved[name])
        if self._data is not None and own is not None:
            self._data.load_state_dict(unpacked((restore.path / own).read_bytes()))
        self._load_random(restore, rank, same=same)

    def _load_random(self, restore: Restore, rank: int, *, same: bool) -> None:
        prefix = f"random.{rank}."
        keys = [key for key in restore.files.keys if key.startswith(prefix)]
        if same and keys:
            set_random_states({key.removeprefix(prefix): restore.files.read_whole(key) for key in keys})
            return
        step = int(restore.shared["step"])
        seed_streams(restore.files.read_whole("random.0.torch"), step, rank)
        if rank == 0:
            _logger.info("another layout than at step %d: new random numbers, made from rank 0's state", step)
