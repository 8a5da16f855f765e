"""What this rank brings to a checkpoint: its parts, and what the others have to know of them.

::

    model.<name>                    parameters and persistent buffers
    optimizer.<name>.<entry>        state, and master weights
    ema.<name>                      averages

and beside the tensors, by name: which entries a parameter's state has, those that are no tensors, its other names. Only
what may change from one save to the next is sent every time; the rest is known by its digest, see `checkpointer.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final, runtime_checkable

from torch import Tensor, nn

from torchdistpackage.checkpoint.boxes import Box
from torchdistpackage.checkpoint.named_model import Named, Stages, in_one_module, named_model
from torchdistpackage.checkpoint.optimizer_parts import MASTER, Stepped, stepped_on
from torchdistpackage.checkpoint.options import group_names
from torchdistpackage.checkpoint.parts import Part, parts_of, parts_of_block, parts_of_range
from torchdistpackage.checkpoint.plan import Place, listing
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.model_tensors import is_dtensor

__all__ = ["Average", "Contents", "Held"]

_logger = logging.getLogger(__name__)


class _AveragePiece(Protocol):
    """What a rank holds of one average.

    Attributes:
        name: Of the parameter or buffer.
        shape: Of the whole.
        offsets: Of the block of which it is a part.
        sizes: Of that block.
        order: The dims from the outermost to the innermost in memory.
        begin: The first element's number in the block, in that order.
        tensor: Its values.
        is_parameter: Or else a buffer.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def order(self) -> tuple[int, ...]: ...

    @property
    def begin(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...

    @property
    def is_parameter(self) -> bool: ...


@runtime_checkable
class Average(Protocol):
    """What an average of a model has to tell to be saved; `ShardedEMA` does."""

    @property
    def num_updates(self) -> int:
        """How often it was updated."""

    def average_pieces(self) -> Sequence[_AveragePiece]:
        """All that this rank holds."""

    def average_loaded(self, num_updates: int) -> None:
        """The pieces have new values."""


@final
@dataclass(frozen=True, eq=False)
class Held:
    """What this rank has now.

    Attributes:
        model: Its parameters and buffers.
        stepped: What its optimizers step on.
        parts: All boxes.
        groups: The names of the parameters in each group of its optimizers.
    """

    model: list[Named]
    stepped: list[Stepped]
    parts: list[Part]
    groups: list[list[str]]

    def told(self, place: Place) -> dict[str, Any]:
        """What the other ranks have to know, as JSON can say it."""
        return listing(place, self.parts) | {
            "aliases": {one.name: list(one.names) for one in self.model if len(one.names) > 1},
            "entries": {one.named.name: _entries(one) for one in self.stepped if one.state},
            "stepped": {one.named.name: str(one.tensor.dtype).removeprefix("torch.") for one in self.stepped},
            "groups": self.groups,
        }

    def values(self) -> dict[str, dict[str, Any]]:
        """The entries of states that are no tensors."""
        found = {}
        for one in self.stepped:
            plain = {key: value for key, value in one.state.items() if not isinstance(value, Tensor)}
            if plain:
                found[one.named.name] = plain
        return found

    def layout(self, place: Place) -> str:
        """A digest of which elements this rank has: equal in two runs whose ranks hold the same."""
        words = [(part.key, part.box.offsets, part.box.sizes) for part in self.parts if part.kind != "state"]
        pieces = [(one.named.name, one.span) for one in self.stepped if one.span is not None]
        return hashlib.sha256(json.dumps([place, words, pieces]).encode()).hexdigest()


def _entries(one: Stepped) -> list[str]:
    return [key for key, value in one.state.items() if isinstance(value, Tensor)]


@final
class Contents:
    """The user's objects whose tensors are in checkpoints.

    Args:
        stages: This rank's modules.
        optimizer: None, one or several.
        ema: None, or one or several that tell their pieces.

    Raises:
        CheckpointError: They are something else, or do not belong together.
    """

    def __init__(self, stages: Stages, optimizer: Any, ema: Any) -> None:
        self.module: nn.Module = in_one_module(stages)
        given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        wrong = [one for one in given if not (hasattr(one, "param_groups") and hasattr(one, "state"))]
        if wrong:
            raise CheckpointError(
                f"optimizer must be a torch optimizer or a list of them, but it holds a {type(wrong[0]).__name__}"
            )
        averages = [] if ema is None else list(ema) if isinstance(ema, list | tuple) else [ema]
        for one in averages:
            if not isinstance(one, Average):
                raise CheckpointError(f"ema must be a ShardedEMA, not a {type(one).__name__}; give others as objects=")
        self.optimizers, self.averages = given, averages
        self.held()
        _warn_of_extra_states(self.module)

    @property
    def num_updates(self) -> int:
        """Of the averages."""
        return max((one.num_updates for one in self.averages), default=0)

    def held(self) -> Held:
        """What there is now."""
        model = named_model(self.module)
        stepped = stepped_on(self.optimizers, model)
        parts: list[Part] = []
        for one in model:
            kind = "parameter" if one.is_parameter else "buffer"
            found = parts_of(f"model.{one.name}", one.tensor, kind=kind, tied=one.tied)
            parts += [replace(part, expert=True) for part in found] if one.expert else found
        for place in stepped:
            if place.is_master:
                parts += place.parts(MASTER, place.tensor)
            for entry, value in place.state.items():
                if isinstance(value, Tensor):
                    parts += place.parts(entry, value)
        parts += [part for _, part in average_parts(self.averages, model)]
        return Held(model, stepped, parts, group_names(self.optimizers, model))


def _warn_of_extra_states(module: nn.Module) -> None:
    own = nn.Module.get_extra_state
    names = [name or "the module" for name, one in module.named_modules() if type(one).get_extra_state is not own]
    if names:
        _logger.warning(
            "the extra state of %s (%d in all) is no tensor of the model and is not in checkpoints; keep it in "
            "buffers, or give what it holds as objects=",
            ", ".join(names[:4]),
            len(names),
        )


def average_parts(averages: Sequence[Average], model: Sequence[Named]) -> list[tuple[str, Part]]:
    """The name of each averaged tensor, and its parts.

    Args:
        averages: All of this rank.
        model: What they are of: a DTensor says where its elements lie.
    """
    sharded = {name: one.tensor for one in model if is_dtensor(one.tensor) for name in one.names}
    found = []
    for piece in (piece for one in averages for piece in one.average_pieces()):
        key, kind = f"ema.{piece.name}", "state" if piece.is_parameter else "buffer"
        if piece.name in sharded:
            stop = piece.begin + piece.tensor.numel()
            parts = parts_of_range(key, sharded[piece.name], piece.begin, stop, piece.tensor, kind=kind)
        else:
            block = Box(tuple(piece.offsets), tuple(piece.sizes))
            parts = parts_of_block(key, piece.shape, block, piece.order, piece.begin, piece.tensor, kind=kind)
        found += [(piece.name, part) for part in parts]
    return found


def first_of_all(told: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """One dict of what all ranks have said, the first of them for what several have."""
    merged: dict[str, Any] = {}
    for one in told:
        for key, value in one[what].items():
            merged.setdefault(key, value)
    return merged
