"""From a checkpoint of any layout into the objects of this one.

Everything is looked up before anything is changed: names, shapes, options. Then the boxes are read, straight into the
parameters where they are on the CPU, and into the state, which is made where the optimizer has none yet.

Which tensor a parameter is read from::

    here            in the checkpoint
    parameter       model.<name>; its master weights, if there are some and the parameter is as precise
    master weights  optimizer.<name>.master_weights; without such, model.<name>
    state           optimizer.<name>.<entry>
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.checkpoint.contents import Contents, Held, average_parts
from torchdistpackage.checkpoint.job import SHARED
from torchdistpackage.checkpoint.named_model import Named, saved_name
from torchdistpackage.checkpoint.optimizer_parts import MASTER, Stepped, fresh_entry
from torchdistpackage.checkpoint.options import apply_options
from torchdistpackage.checkpoint.parts import Part, parts_of
from torchdistpackage.checkpoint.plain import unpacked
from torchdistpackage.checkpoint.tensor_files import TensorFiles
from torchdistpackage.errors import CheckpointError

__all__ = ["Restore"]


@final
@dataclass(eq=False)
class Restore:
    """One checkpoint that is being loaded, on one rank.

    Args:
        path: Its folder.
        contents: What it is loaded into.
        strict: Raise for what one has and the other has not.
    """

    path: Path
    contents: Contents
    strict: bool
    missing: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    _targets: list[tuple[str, Part]] = field(default_factory=list)
    _writes: list[Callable[[], None]] = field(default_factory=list)

    def look(self) -> None:
        """Finds everything, and changes nothing.

        Raises:
            CheckpointError: Something is missing, or has another shape.
        """
        self.files = TensorFiles(self.path)
        self.shared: dict[str, Any] = unpacked((self.path / SHARED).read_bytes())
        self.model_names = {key.removeprefix("model.") for key in self.files.keys if key.startswith("model.")}
        held = self.contents.held()
        self._find_model(held)
        if self.contents.optimizers:
            self._find_state(held)
        self._find_averages(held)
        if self.missing and self.strict:
            raise CheckpointError(
                f"{self.path.name} has no {_listed(self.missing)}; it is of another model, or of a part of this one. "
                "load(strict=False) leaves what is missing as it is"
            )
        self._check_shapes()

    def used_mask(self) -> str:
        """Which of the checkpoint's parameters this rank has found a place for; joined over the ranks by `unused`."""
        names = sorted(self.model_names)
        bits = "".join("1" if name in self.used else "0" for name in names)
        return f"{int('1' + bits, 2):x}"

    def unused(self, masks: Sequence[str]) -> list[str]:
        """The parameters and buffers that no rank has a place for."""
        joined = 0
        for mask in masks:
            joined |= int(mask, 16)
        return [name for name, bit in zip(sorted(self.model_names), f"{joined:b}"[1:], strict=True) if bit == "0"]

    @torch.no_grad()
    def read(self) -> None:
        """Reads the tensors, and gives options and states to the optimizers."""
        self.files.read(self._targets)
        for write in self._writes:
            write()

    # ---- the model ----

    def _find_model(self, held: Held) -> None:
        for one in held.model:
            name = self._name(one, self.model_names)
            if name is None:
                self.missing.append(one.name)
                continue
            self.used |= {name, *(other for other in one.names if other in self.model_names)}
            self._check_tie(one)
            key = f"model.{name}"
            master = f"optimizer.{name}.{MASTER}"
            if master in self.files and _as_precise(one.tensor.dtype, self.files.dtype(master)):
                key = master
            self._targets += [(key, part) for part in parts_of(key, one.tensor)]

    def _check_tie(self, one: Named) -> None:
        """Names that are one parameter here may be several in the checkpoint, if those are equal."""
        first, *others = [name for name in one.names if name in self.model_names] or [""]
        for other in others if self.strict else ():
            values = [self.files.read_whole(f"model.{name}") for name in (first, other)]
            if not torch.equal(*values):
                raise CheckpointError(
                    f"{first} and {other} are one parameter here, but two that differ in {self.path.name}; build the "
                    f"model without tying them, or load(strict=False) to take {first}"
                )

    def _name(self, one: Named, keys: Any) -> str | None:
        return saved_name(one.names, self.shared["aliases"], keys)

    # ---- optimizers ----

    def _find_state(self, held: Held) -> None:
        saved = self.shared["optimizer"]
        if not saved["groups"]:
            raise CheckpointError(
                f"{self.path.name} was saved without an optimizer; load the model only, with Checkpointer(run, stages)"
            )
        for one in held.stepped:
            self._find_entries(one, saved)
        self._writes += apply_options(
            self.contents.optimizers, held.model, saved["groups"], self._name, strict=self.strict
        )
        for optimizer in self.contents.optimizers:
            if hasattr(optimizer, "state_loaded"):
                self._writes.append(optimizer.state_loaded)

    def _find_entries(self, one: Stepped, saved: Mapping[str, Any]) -> None:
        name = self._name(one.named, saved["stepped"])
        if one.is_master:
            master = None if name is None else one.key(MASTER, name)
            plain = self._name(one.named, self.model_names)
            key = master if master is not None and master in self.files else f"model.{plain}"
            if plain is not None:
                self._targets += [(key, part) for part in one.parts(MASTER, one.tensor)]
        if name is None:
            return
        before, state = one.state, {}
        as_saved = saved["stepped"][name] == str(one.tensor.dtype).removeprefix("torch.")
        for entry in saved["entries"].get(name, ()):
            key = one.key(entry, name)
            if key not in self.files:
                raise CheckpointError(f"{self.path.name} lists {key}, but has no such tensor; it is damaged")
            state[entry] = self._memory(one, entry, key, before.get(entry), as_saved=as_saved)
            self._targets += [(key, part) for part in one.parts(entry, state[entry])]
        state |= saved["values"].get(name, {})
        self._writes.append(partial(_set_state, one, state))

    def _memory(self, one: Stepped, entry: str, key: str, present: Any, *, as_saved: bool) -> Tensor:
        """Where an entry goes: into what the optimizer has, or new memory as it would make it."""
        shape, dtype = self.files.shape(key), self.files.dtype(key)
        if isinstance(present, Tensor) and tuple(present.shape) in (shape, tuple(one.tensor.shape)):
            return torch.empty_like(present)  # beside it: a load that fails changes nothing
        if shape and dtype.is_floating_point and not as_saved:
            dtype = one.tensor.dtype
        return fresh_entry(one, entry, shape, dtype)

    # ---- averages ----

    def _find_averages(self, held: Held) -> None:
        averages = self.contents.averages
        if not averages:
            return
        keys = {key.removeprefix("ema.") for key in self.files.keys if key.startswith("ema.")}
        if not keys:
            raise CheckpointError(
                f"{self.path.name} was saved without averages; load it without ema= and make new ones"
            )
        for name, part in average_parts(averages, held.model):
            found = saved_name([name], self.shared["aliases"], keys)
            if found is None:
                self.missing.append(f"ema.{name}")
                continue
            self._targets.append((f"ema.{found}", part))
        for one in averages:
            self._writes.append(partial(one.average_loaded, int(self.shared["num_updates"])))

    def _check_shapes(self) -> None:
        wrong = {
            f"{key} is {self.files.shape(key)} in the checkpoint and {part.shape} here"
            for key, part in self._targets
            if self.files.shape(key) != part.shape
        }
        if wrong:
            raise CheckpointError(
                f"{self.path.name} is of another model: {_listed(sorted(wrong), '; ')}. Build the model with the sizes "
                "that it had when it was saved"
            )


def _set_state(one: Stepped, state: dict[str, Any]) -> None:
    if state:
        one.optimizer.state[one.tensor] = state
    else:
        one.optimizer.state.pop(one.tensor, None)


def _as_precise(here: torch.dtype, master: torch.dtype) -> bool:
    return here.is_floating_point and here.itemsize >= master.itemsize


def _listed(names: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + rest
