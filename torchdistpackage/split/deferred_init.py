"""A model without memory, and later the values of some of its weights, as if all of it had been built.

::

    torch.manual_seed(0)                   record_init(model_init, seed=0)     no weight gets memory
    model = model_init()          ==       recorded.model                      all on the meta device: cut it
                                           recorded.fill(stages, "cuda")       this rank's, with the same values

The values are those of plain construction, to the bit: what was done to tensors was recorded, and is done again, on
the CPU, for those that are wanted. For the others only the random numbers are drawn, into memory that is given back at
once. So a stage costs the time of building the model, and the memory of the stage and of the largest other tensor. The
idea of recording how a model is initialised is that of `deferred_init` in torchdistx.

Where a tape would not be right (values are looked at, memory is shared in ways that cannot be seen) the model is built
for real, and a line in the log says why. Neighbours: `init_recorder.py` and `init_tape.py` do the work, `places.py`
knows where modules keep tensors.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.init_recorder import Disguise, Recorder
from torchdistpackage.split.init_tape import NotRepeatable, Region, Tape
from torchdistpackage.split.places import Place, places_of

__all__ = ["RecordedInit", "built", "record_init"]

_log = logging.getLogger(__name__)


@final
class RecordedInit:
    """A model, and how to get the values of its tensors; made by `record_init` or `built`.

    Attributes:
        model: The whole model, on the meta device, or with weights where it had to be built for real.
        reason: Why it was built for real; None where it was recorded, or was there already.

    Example:
        >>> recorded = record_init(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), seed=0)
        >>> recorded.model[1].weight.device.type, recorded.reason
        ('meta', None)
        >>> recorded.fill([recorded.model[1]])  # one stage, with the values that the whole model would have
        >>> _ = torch.manual_seed(0)
        >>> bool((nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))[1].weight == recorded.model[1].weight).all())
        True
    """

    def __init__(self, model: nn.Module, reason: str | None = None, record: _Record | None = None) -> None:
        self.model, self.reason, self._record = model, reason, record

    def built_instead(self, reason: str) -> RecordedInit:
        """The same model with all of its weights, for those who cannot work without.

        Args:
            reason: Why; for the log.

        Raises:
            SplitError: The model was not recorded: it has its weights.

        Example:
            >>> record_init(lambda: nn.Linear(2, 2), seed=0).built_instead("an example").model.weight.device.type
            'cpu'
        """
        if self._record is None:
            raise SplitError(f"{type(self.model).__name__} has its weights already")
        return self._record.built(reason)

    def make(self, tensors: Iterable[Tensor], device: torch.device | str | None = None) -> dict[int, Tensor]:
        """The values of some tensors of the model; torch's CPU generator ends where building all would leave it.

        Args:
            tensors: Parameters, buffers, or other tensors that modules of the model keep.
            device: Where the values go; None for the CPU.

        Returns:
            The `id` of each tensor -> the tensor with values: a parameter for a parameter. What shared memory shares
            memory. Tensors that were not recorded, because they had values all the time, are returned as they are.

        Raises:
            SplitError: The model could not be built again.

        Example:
            >>> recorded = record_init(lambda: nn.Linear(2, 1, bias=False), seed=0)
            >>> recorded.make([recorded.model.weight])[id(recorded.model.weight)].data
            tensor([[-0.0053,  0.3793]])
        """
        wanted = list(tensors)
        if self._record is None:
            return {id(tensor): tensor for tensor in wanted}
        return self._record.make(wanted, torch.device(device or "cpu"))

    def fill(self, modules: Iterable[nn.Module], device: torch.device | str | None = None) -> None:
        """Gives modules the values of their tensors, in place; a tensor of several modules stays one.

        Args:
            modules: Modules that hold tensors of the model: its own, or others. What has values goes to the device.
            device: Where to; None for the CPU, or for leaving what has values where it is.

        Raises:
            SplitError: The model could not be built again.

        Example:
            >>> recorded = record_init(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), seed=0)
            >>> recorded.fill([recorded.model[1]])
            >>> recorded.model[0].weight.device.type, recorded.model[1].weight.device.type
            ('meta', 'cpu')
        """
        modules = list(modules)
        places = [place for module in modules for place in places_of(module) if place.tensor.is_meta]
        # `.to(device)` moves what a module has registered, and no more.
        moved = [place.tensor for place in places if place.kind != "attribute"]
        kept = [place.tensor for place in places if place.kind == "attribute"]
        made = self.make([*moved, *kept], "cpu" if kept else device)
        for place in places:
            place.put(made[id(place.tensor)])
        if device is not None:
            for module in modules:
                module.to(device)


@final
class _Record:
    """A tape, and which tensor of the model is where on it."""

    def __init__(
        self, tape: Tape, regions: dict[int, Region], places: list[Place], built: Callable[[str], RecordedInit]
    ) -> None:
        self.built = built
        self._tape, self._regions = tape, regions
        self._names = {id(place.tensor): place.name for place in places}
        self._kept = [place.tensor for place in places]  # the ids stay those of these tensors

    def make(self, tensors: list[Tensor], device: torch.device) -> dict[int, Tensor]:
        wanted = {id(tensor): self._regions[id(tensor)] for tensor in tensors if id(tensor) in self._regions}
        made = {id(tensor): tensor for tensor in tensors}
        try:
            storages = self._tape.replay({region.storage for region in wanted.values()}, device)
        except NotRepeatable as error:
            return {**made, **self._built(tensors, device, str(error))}
        for tensor in tensors:
            region = wanted.get(id(tensor))
            if region is not None and made[id(tensor)] is tensor:
                made[id(tensor)] = _dressed(region.on(storages[region.storage]), tensor)
        return made

    def _built(self, tensors: list[Tensor], device: torch.device, reason: str) -> dict[int, Tensor]:
        real = {place.name: place.tensor for place in places_of(self.built(reason).model)}
        return {id(tensor): _dressed(real[self._names[id(tensor)]].detach().to(device), tensor) for tensor in tensors}


def built(model_init: Callable[[], nn.Module], seed: int | None = None, reason: str | None = None) -> RecordedInit:
    """Builds a model for real.

    Args:
        model_init: Makes it.
        seed: For torch's generator; None to leave it as it is.
        reason: Why it is not recorded.

    Raises:
        SplitError: What it made is no module, or is on the meta device.

    Example:
        >>> built(lambda: nn.Linear(2, 2), 0).model.weight.device.type
        'cpu'
    """
    if seed is not None:
        torch.manual_seed(seed)
    model = _module(model_init())
    empty = [place.name for place in places_of(model) if place.tensor.is_meta]
    if empty:
        raise SplitError(
            f"model_init leaves {', '.join(empty[:4])} on the meta device, where nobody knows the values; build the "
            "model on the CPU, its stages alone will get memory. If they come from a cache outside of the model, pass "
            "model=model_init() instead"
        )
    return RecordedInit(model, reason)


def record_init(model_init: Callable[[], nn.Module], *, seed: int | None = None) -> RecordedInit:
    """Builds a model without memory, such that the values of any of its tensors can be had later.

    Args:
        model_init: Makes the model, on the CPU, out of nothing but its closure. It may seed torch, share weights, look
            at values that are not random (drop path rates), use numpy's and Python's random numbers, and initialise
            as often as it likes. It is called again, with the random states of now, if it cannot be recorded.
        seed: For torch's generator; None to go on as it is.

    Returns:
        The model on the meta device; where it cannot be recorded (the log says why), with all of its weights. Tensors
        that had values before, or that were read from a file, keep them. Torch's CPU generator is where it was, or,
        if the model was built, where that has left it.

    Raises:
        SplitError: What it made is no module, or is on the meta device. Its own exceptions come as they are.

    Example:
        >>> recorded = record_init(lambda: nn.Linear(2, 2), seed=0)
        >>> recorded.model.weight.device.type, recorded.reason
        ('meta', None)
    """
    if seed is not None:
        torch.manual_seed(seed)
    before = _random_states()

    def again(reason: str) -> RecordedInit:
        _log.info("the model is built for real: %s", reason)
        _restore(before)
        return built(model_init, None, reason)

    recorder = Recorder()
    model: Any = None
    try:
        with recorder, Disguise(recorder):
            model = model_init()
    except Exception as error:
        recorder.fail(f"{type(error).__name__}: {error}")
    tape = recorder.finish()
    if recorder.trouble is None and isinstance(model, nn.Module):
        places = list(places_of(model))
        regions = {id(place.tensor): recorder.region(place.tensor) for place in places}
        trouble = _hidden(places, regions) or _held_elsewhere(recorder, places)
        if trouble is None:
            found = {key: region for key, region in regions.items() if region is not None}
            return RecordedInit(model, None, _Record(tape, found, places, again) if found else None)
        recorder.fail(trouble)
    reason = recorder.trouble or f"model_init returned a {type(model).__name__}"
    del model, recorder, tape
    return again(f"building it cannot be recorded: {reason}")


def _module(made: Any) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise SplitError(f"model_init must return a torch.nn.Module, it returned a {type(made).__name__}")
    return made


def _dressed(value: Tensor, like: Tensor) -> Tensor:
    """A value as the tensor that stood for it: of its class, with its attributes."""
    made: Tensor = value
    if isinstance(like, nn.Parameter):
        made = torch.Tensor._make_subclass(type(like), value, like.requires_grad)
    elif like.requires_grad:
        made.requires_grad_()
    vars(made).update(vars(like))
    return made


def _hidden(places: list[Place], regions: dict[int, Region | None]) -> str | None:
    """What is in the model and cannot be made again."""
    for place in places:
        tensor = place.tensor
        if nn.parameter.is_lazy(tensor):
            return f"{place.name} has no shape yet"
        if tensor.is_meta and regions[id(tensor)] is None:
            return f"it is not known where {place.name} comes from"
        if regions[id(tensor)] is not None:
            if tensor.grad_fn is not None or tensor.grad is not None:
                return f"{place.name} has a gradient, or was computed from parameters"
            if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                return f"{place.name} has hooks"
            if not isinstance(tensor, nn.Parameter) and type(tensor) is not Tensor:
                return f"{place.name} is a {type(tensor).__name__}"
    return None


def _held_elsewhere(recorder: Recorder, places: list[Place]) -> str | None:
    """Who else holds a tensor of the model: it would stay without values."""
    if _other_holder(recorder, places) is None:
        return None
    gc.collect()  # it may be garbage
    return _other_holder(recorder, places)


def _other_holder(recorder: Recorder, places: list[Place]) -> str | None:
    known = {id(place.tensor): place for place in places}
    bases = {id(place.tensor._base) for place in places} - known.keys()  # of views: held by them alone
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.is_meta and id(o) not in bases]
    alive = [tensor for tensor in alive if recorder.region(tensor) is not None]
    stray = [tensor for tensor in alive if id(tensor) not in known]
    if stray:
        return f"a tensor of shape {tuple(stray[0].shape)} is kept where no module shows it"
    own = {id(alive), *(id(place.container) for place in places)}
    for holder in gc.get_referrers(*alive) if alive else ():
        if id(holder) in own or isinstance(holder, (types.FrameType, Place)):
            continue
        if isinstance(holder, dict) and any(holder is vars(place) for place in places):
            continue
        found = next((known[id(t)].name for t in gc.get_referents(holder) if id(t) in known), "a tensor")
        return f"{found} is also held by a {type(holder).__name__}, which would keep one without values"
    return None


def _random_states() -> dict[str, Any]:
    numpy = sys.modules.get("numpy")
    states: dict[str, Any] = {"torch": torch.default_generator.get_state(), "python": random.getstate()}
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore(states: dict[str, Any]) -> None:
    torch.default_generator.set_state(states["torch"])
    random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
