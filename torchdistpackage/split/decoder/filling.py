"""A stage on the meta device gets its weights, by transformers' own loader.

The loader is asked of a class that gives out the part where it wants to make a model, and gets the tensors of all
stages under their names; it renames, converts and stacks as for the whole model, and reads what this part has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.part import filled_in
from torchdistpackage.split.decoder.weight_files import listed

__all__ = ["GivenTensors", "WeightSource", "fill_stage", "without_progress_bars"]

_logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Where the tensors of a model come from: `WeightFiles` or `GivenTensors`."""

    name: str

    def tensors(self) -> Mapping[str, Any]:
        """Name -> what gives the tensor, or a slice of it, by `[...]`."""

    def are_one(self, name: str, other: str) -> bool:
        """Whether two names are known to be of one tensor."""

    def generation_config(self) -> Any:
        """Of transformers, or None."""

    def check(self) -> None:
        """Raises what went wrong while reading, if anything did."""


def fill_stage(part: Any, whole: Any, source: WeightSource, dtype: Any, trust_remote_code: bool = False) -> None:
    """Loads a part on the meta device by `from_pretrained` of its class; afterwards it is in evaluation mode.

    Args:
        part: A stage of whole, from `split_causal_lm`.
        whole: The model on the meta device.
        source: Where the tensors are.
        dtype: Of the floating ones.
        trust_remote_code: As for `from_pretrained`.

    Raises:
        CheckpointError: Tensors are missing, of another shape, or cannot be read.
    """
    # Python does not call __init__ when __new__ returns an object of another class
    held = [part]  # emptied at the end: a class is freed late, and the weights of a part are not to wait for that
    loader = type(type(part).__name__, (type(part),), {"__new__": lambda cls, *args, **kwargs: held[0]})
    near = _ties_near(part, whole)
    own = {*part.state_dict(), *(name for tie in near.items() for name in tie)}
    once = {target for target, kept in near.items() if source.are_one(target, kept)}
    with _with_tied_partners(part, whole), _with_all_filled_in(part), _without_report():
        for module in part.modules():  # a module that two parts share counts as done after the first
            vars(module).pop("_is_hf_initialized", None)
        try:
            _, info = loader.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=whole.config,
                state_dict={name: tensor for name, tensor in source.tensors().items() if name not in once},
                dtype=dtype,
                generation_config=source.generation_config(),
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # they are reported below, with their names
                output_loading_info=True,
            )
        except Exception as error:
            source.check()
            raise CheckpointError(f"{source.name} cannot be loaded as {type(part).__name__}: {error}") from error
        finally:
            held.clear()
        source.check()
        _check(part, whole, info, source.name, own)


def _check(part: Any, whole: Any, info: Mapping[str, Any], source: str, own: set[str]) -> None:
    """Raises unless all of its own is loaded; a warning names weights that no stage knows."""
    model = type(part).__name__
    if missing := own & set(info["missing_keys"]):
        raise CheckpointError(f"{source} does not hold {listed(missing)} of {model}; is it of this model, and whole?")
    if wrong := {name: (tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"] if name in own}:
        shapes = [f"{name} is {there} in the files and {here} in {model}" for name, (there, here) in wrong.items()]
        raise CheckpointError(f"{source} does not fit its config.json: {listed(shapes)}")
    prefix = f"{whole.base_model_prefix}."  # files of a base model lack it
    known = {name.removeprefix(prefix) for name in whole.state_dict()}
    if unknown := {name for name in info["unexpected_keys"] if name.removeprefix(prefix) not in known}:
        _logger.warning("%s holds weights that %s does not have: %s", source, model, listed(unknown))


def _ties_near(part: nn.Module, whole: Any) -> dict[str, str]:
    """Name -> the name that it is tied to, for ties of which the part has an end."""
    ties, own = getattr(whole, "all_tied_weights_keys", {}), set(part.state_dict())
    return {target: kept for target, kept in ties.items() if target in own or kept in own}


@contextmanager
def _with_tied_partners(part: Any, whole: Any) -> Iterator[None]:
    """Lends a part the other ends of its ties while it is loaded.

    A tied weight is in the files under one of its names. Which one, and whether both are there and equal, is then
    decided by transformers, with all names at hand; an embedding next to its tied head costs no memory.
    """
    ties, own, near = getattr(whole, "all_tied_weights_keys", {}), set(part.state_dict()), _ties_near(part, whole)
    lent: list[tuple[nn.Module, str, bool]] = []
    for name in sorted({*near, *near.values()} - own):
        parent, steps = part, name.split(".")
        for depth, step in enumerate(steps[:-1]):
            if getattr(parent, step, None) is None:
                lent.append((parent, step, step in parent._modules))
                parent.add_module(step, whole.get_submodule(".".join(steps[: depth + 1])))
            parent = parent.get_submodule(step)
    for target in near:  # the loader ties them when it knows which are there
        path, _, attribute = target.rpartition(".")
        owner = part.get_submodule(path)
        setattr(owner, attribute, nn.Parameter(torch.empty_like(getattr(owner, attribute), device="meta")))
    part.all_tied_weights_keys = dict(near)
    try:
        yield
        if untied := near.keys() - part.all_tied_weights_keys.keys():
            pairs = [f"{name} to {near[name]}" for name in untied]
            raise CheckpointError(
                f"the configuration of {type(part).__name__} ties {listed(pairs)}, but the files hold different values "
                "of the two; pass config= with tie_word_embeddings=False"
            )
    finally:
        part.all_tied_weights_keys = dict(ties)
        for parent, step, known in lent:
            if known:
                parent._modules[step] = None
            else:
                del parent._modules[step]


@contextmanager
def _with_all_filled_in(part: nn.Module) -> Iterator[None]:
    """For the time of loading, code for first values finds lists of layers, and something for each module."""
    owners = [module for module in part.modules() if hasattr(module, "_init_weights")]

    def wrapped(init: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def init_weights(module: nn.Module) -> None:
            with filled_in(part, module):
                init(module)

        return init_weights

    for owner in owners:
        vars(owner)["_init_weights"] = wrapped(owner._init_weights)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for owner in owners:
            del vars(owner)["_init_weights"]


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing one for each part that is loaded or written."""
    from transformers.utils import logging as bars

    switch: Any = bars
    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps from the log the table in which transformers calls the other stages' weights unexpected."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class GivenTensors:
    """Tensors of a whole model in memory; the part gets copies of its own.

    Args:
        state: Name -> tensor.
        name: What to call them in errors.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str = "full_state_dict") -> None:
        self.name = name
        self._state = state

    def tensors(self) -> dict[str, Any]:
        """Name -> what copies the tensor by `[...]`."""
        return {name: _Copied(self._state, name) for name in self._state}

    def are_one(self, name: str, other: str) -> bool:
        """Whether two names are of one tensor."""
        one, two = self._state.get(name), self._state.get(other)
        return one is not None and two is not None and one.data_ptr() == two.data_ptr() and one.shape == two.shape

    def generation_config(self) -> None:
        """None."""

    def check(self) -> None:
        """Nothing: an error while reading is raised where it happens."""


class _Copied:
    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        self._state, self._name = state, name

    def __getitem__(self, part: Any) -> Tensor:
        return self._state[self._name].detach()[part].clone()
