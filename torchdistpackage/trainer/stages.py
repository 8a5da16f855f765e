"""A model that costs no memory -> this rank's stages, with the values that the whole model would have had.

::

    model_init --> record_init --> model on meta --> splitter --> stages on meta --> fill --> this rank's, on the device
                   (a tape)                          (any one)     whole-model names          only they get memory

A splitter may share the model's modules, copy them deeply and prune the copies, or move them into containers of its
own: every module of the model carries its name with it, so that each tensor of a stage is known to be one of the
model's. From then on such stages are like those of our own splitters: whole-model names, and shared parameters that
`parallel/tied_parameters.py` keeps equal. Neighbours: `splitting.py` calls the splitter and checks what it returns,
`split/deferred_init.py` makes the values.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.agreement import said_by_all, together
from torchdistpackage.schedule import Placement
from torchdistpackage.split.causal_lm import ModelSplitter
from torchdistpackage.split.decoder.find import find_layout
from torchdistpackage.split.deferred_init import RecordedInit, built, record_init
from torchdistpackage.split.names import record_names, whole_model_names
from torchdistpackage.split.pipe import put_in_use, stages_in_use
from torchdistpackage.split.places import Place, places_of
from torchdistpackage.split.ties import record_ties
from torchdistpackage.trainer.splitting import (
    Balance,
    CutResult,
    call_splitter,
    create_default_splitter,
    takes_tokens,
)

__all__ = ["CutModel", "cut_model", "is_causal_lm"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutModel:
    """This rank's part of a model.

    Attributes:
        stages: Global index -> module, in the order of the model; filled, on the device.
        names: Whole-model name -> parameter, for all parameters of this rank; a shared one once, under its first name.
        mask_creator: Makes attention masks out of the batch on each rank; None where nobody gave one.
        config: The model's configuration, where it has one.
        is_causal_lm: Whether it is a language model that predicts the next token.
        num_parameters: Of the whole model, a shared one once.
        digest: Of which tensor is on which stage: the same on every rank.
    """

    stages: dict[int, nn.Module]
    names: dict[str, nn.Parameter]
    mask_creator: Callable[..., Any] | None
    config: Any
    is_causal_lm: bool
    num_parameters: int
    digest: str


def cut_model(
    *,
    model: nn.Module | None = None,
    model_init: Callable[[], nn.Module] | None = None,
    splitter: ModelSplitter | None = None,
    placement: Placement,
    rank: int,
    group: Any = None,
    device: torch.device | str | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    train: bool = True,
    seed: int | None = None,
    construct_on: Literal["meta", "cpu"] = "meta",
    balance: Balance = "parameters",
) -> CutModel:
    """Makes a model, cuts it, and fills this rank's stages. Collective over all replicas, where groups are set up.

    Under every placement the weights are those of `torch.manual_seed(seed); model_init()` in one process, to the bit,
    and torch's CPU generator ends where it would end there. A model that is given is cut as it is.

    Args:
        model: The whole model, with weights; or
        model_init: Makes it: a function without arguments.
        splitter: Any `ModelSplitter`; None for the default one, see `splitting.create_default_splitter`.
        placement: Which rank has which stage.
        rank: This rank in the pipeline.
        group: The process group of the pipeline, for the splitter.
        device: Where this rank computes; None for the CPU.
        example_args: Positional arguments of one micro-batch.
        example_kwargs: Keyword arguments.
        train: Whether it is going to be trained; for the splitter.
        seed: Of the weights; None to go on with torch's generator as it is.
        construct_on: "meta" to give memory to this rank's stages only; "cpu" to build the whole model first.
        balance: What the default splitter makes equal where it traces: "parameters" or "flops".

    Raises:
        SplitError: Both or neither of model and model_init are given; the model cannot be cut; the splitter returned
            what is no cut of the model; or another rank failed. Exceptions of the splitter keep their type.

    Example:
        >>> def net():
        ...     return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> cut = cut_model(model_init=net, placement=Placement.loop(2), rank=1, example_args=(torch.zeros(3, 2),),
        ...                 seed=0)
        >>> list(cut.names), cut.num_parameters
        (['2.weight', '2.bias'], 17)
    """
    chosen = splitter if splitter is not None else create_default_splitter(balance)
    options = {
        "example_args": tuple(example_args),
        "example_kwargs": example_kwargs,
        "train": train,
        "device": device,
        "group": group,
    }

    def work() -> CutModel:
        source = _source(model, model_init, seed, construct_on)
        try:
            return _cut(source, chosen, placement, rank, options)
        except SplitError as error:
            empty = any(tensor.is_meta for tensor in source.model.parameters())
            if not empty or not getattr(chosen, "traces", False):
                raise
            reason = f"it cannot be traced without weights: {str(error.__cause__ or error)[:200]}"
        return _cut(source.built_instead(reason), chosen, placement, rank, options)

    cut = together(work, "cut the model", SplitError)
    digests = said_by_all(cut.digest)
    if len(set(digests)) > 1:
        raise SplitError(
            f"the splitter {_name_of(chosen)} has cut the model otherwise on other ranks: {len(set(digests))} "
            f"different cuts on {len(digests)} ranks; it must return the same stages for every rank"
        )
    return cut


def _name_of(splitter: ModelSplitter) -> str:
    return getattr(splitter, "__qualname__", type(splitter).__name__)


def _source(model: Any, model_init: Any, seed: int | None, construct_on: str) -> RecordedInit:
    if (model is None) == (model_init is None):
        given = "both" if model is not None else "neither"
        raise SplitError(f"give model, with weights, or model_init, a function that makes it; {given} was given")
    if construct_on not in ("meta", "cpu"):
        raise SplitError(
            f"construct_on={construct_on!r}: use 'meta', so that only this rank's stages get memory, or 'cpu'"
        )
    if model_init is not None:
        if isinstance(model_init, nn.Module) or not callable(model_init):
            raise SplitError(
                f"model_init must be a function without arguments that makes the model, got a "
                f"{type(model_init).__name__}; a model that exists is passed as model="
            )
        return record_init(model_init, seed=seed) if construct_on == "meta" else built(model_init, seed, "asked for")
    if not isinstance(model, nn.Module):
        raise SplitError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    empty = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if empty:
        raise SplitError(
            f"the model is on the meta device ({empty[0]} and {len(empty) - 1} more), where nobody knows its values; "
            "pass model_init, the function that makes it"
        )
    return RecordedInit(model)


def _cut(
    source: RecordedInit, splitter: ModelSplitter, placement: Placement, rank: int, options: Mapping[str, Any]
) -> CutModel:
    model = source.model
    whole = _Whole.of(model)
    count = sum(parameter.numel() for parameter in model.parameters())  # stages may share modules, and be filled
    causal = is_causal_lm(model, takes_tokens(options["example_args"], options["example_kwargs"]))
    record_names(model, [model])
    result = call_splitter(splitter, model, placement, rank, **options)
    ours = {id(stage.module) for stage in stages_in_use()}
    name = _name_of(splitter)
    known = _names_of_stages(model, result, whole, f"the splitter {name}")
    _check_complete(whole, known, f"the splitter {name}")
    _check_empty(whole, known, f"the splitter {name}")
    _share(whole, known)
    if not all(id(module) in ours for module in result.modules):  # not a splitter of ours, which notes it by itself
        record_ties(result.modules, range(placement.num_stages + 1))
        for index, module in enumerate(result.modules):
            put_in_use(module, index, placement.num_stages)
    mine = {index: result.modules[index] for index in placement.local_stages(rank)}
    source.fill(mine.values(), options["device"])
    _check_filled(mine)
    config, names = getattr(model, "config", None), _first_names(mine, whole)
    places = sorted([one.stage, one.name] for one in known if one.name is not None)
    digest = hashlib.sha256(json.dumps(places).encode()).hexdigest()
    return CutModel(mine, names, result.mask_creator, config, causal, count, digest)


@dataclass(frozen=True)
class _Whole:
    """The tensors of a model, by name and by identity; taken before a splitter may change it.

    Attributes:
        tensors: Every name -> its tensor; a shared one has several. Plain attributes, too.
        names: The id of a tensor -> its names, the first one first.
        parameters: The names of parameters.
    """

    tensors: dict[str, Tensor]
    names: dict[int, tuple[str, ...]]
    parameters: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Whole:
        """Of a whole model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        for place in places_of(model):
            tensors.setdefault(place.name, place.tensor)
        names: dict[int, tuple[str, ...]] = {}
        for name, tensor in tensors.items():
            names[id(tensor)] = (*names.get(id(tensor), ()), name)
        return cls(tensors, names, frozenset(parameters))


@dataclass(frozen=True)
class _Known:
    """A place in a stage, and which tensor of the model belongs there; None where the model has none."""

    stage: int
    place: Place
    name: str | None


def _names_of_stages(model: nn.Module, result: CutResult, whole: _Whole, who: str) -> list[_Known]:
    """Which tensor of the model is at which place of all stages."""
    for module in result.modules:
        shares = any(id(parameter) in whole.names for parameter in module.parameters())
        record_names(model if shares else module, [module], keep=True)
    known = []
    for index, module in enumerate(result.modules):
        try:
            local = whole_model_names(module)
        except SplitError as error:
            raise SplitError(f"{who}: stage {index}: {error}") from error
        for place in places_of(module):
            names = whole.names.get(id(place.tensor), ())
            name = next((n for n in (*names, local.get(place.name), place.name) if n in whole.tensors), None)
            if place.kind == "parameter":
                _check_parameter(place, local.get(place.name, place.name), name, whole, f"{who}: stage {index}")
            elif place.tensor.is_meta and name is None and place.kind == "buffer":
                raise SplitError(
                    f"{who}: stage {index} has a buffer {place.name} on the meta device that the model does not have; "
                    "give it values, or take the model's own buffers"
                )
            known.append(_Known(index, place, name))
    return known


def _check_parameter(place: Place, called: str, name: str | None, whole: _Whole, who: str) -> None:
    if name is None or name not in whole.parameters:
        raise SplitError(
            f"{who} has a parameter {called!r} that the model does not have; a stage shares the model's modules, or "
            "has copies of them (copy.deepcopy), which keep their names"
        )
    mine, theirs = place.tensor, whole.tensors[name]
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        raise SplitError(
            f"{who}: {name} is {tuple(mine.shape)} {mine.dtype}, and {tuple(theirs.shape)} {theirs.dtype} in the model"
        )


def _check_empty(whole: _Whole, known: Sequence[_Known], who: str) -> None:
    """Whether what has no values in the model still has none: memory alone would be taken for weights."""
    filled = [
        one.name
        for one in known
        if one.name is not None and whole.tensors[one.name].is_meta and not one.place.tensor.is_meta
    ]
    if filled:
        raise SplitError(
            f"{who} gave memory to {filled[0]} and {len(filled) - 1} more, which the model has on the meta device: "
            "leave them there, the first values come later; or pass model=, a model with weights"
        )


def _check_complete(whole: _Whole, known: Sequence[_Known], who: str) -> None:
    held = {id(whole.tensors[entry.name]) for entry in known if entry.name is not None}
    lost = [name for name in whole.parameters if id(whole.tensors[name]) not in held]
    if lost:
        lost = sorted(lost, key=list(whole.tensors).index)
        rest = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        raise SplitError(f"{who} put {', '.join(lost[:8])}{rest} on no stage; every parameter must be on one")


def _share(whole: _Whole, known: Sequence[_Known]) -> None:
    """Puts the model's own tensor where a copy without a value is, and one object where several are one parameter."""
    chosen: dict[int, Tensor] = {}
    for entry in known:
        if entry.name is None:
            continue
        origin = whole.tensors[entry.name]
        own = entry.place.tensor
        if entry.place.kind == "parameter":
            tensor = chosen.setdefault(id(origin), origin if own.is_meta else own)
        else:
            tensor = origin if own.is_meta else own
        if tensor is not own:
            entry.place.put(tensor)


def _check_filled(stages: Mapping[int, nn.Module]) -> None:
    for index, stage in stages.items():
        empty = [place.name for place in places_of(stage) if place.tensor.is_meta]
        if empty:
            raise SplitError(
                f"stage {index} still has {', '.join(empty[:4])} on the meta device: nobody knows the values; pass "
                "construct_on='cpu' (construct_model_on='cpu' of the trainer) to build the whole model first"
            )


def _first_names(stages: Mapping[int, nn.Module], whole: _Whole) -> dict[str, nn.Parameter]:
    """Whole-model name -> parameter of this rank's stages, each once."""
    names: dict[str, nn.Parameter] = {}
    done: set[int] = set()
    for stage in stages.values():
        local = whole_model_names(stage)
        for path, parameter in stage.named_parameters():
            name = local[path]
            first = whole.names[id(whole.tensors[name])][0]
            if id(parameter) not in done:
                done.add(id(parameter))
                names[first] = parameter
    return names


def is_causal_lm(model: nn.Module, tokens: bool = False) -> bool:
    """Whether a model predicts the next token: a class of transformers for that, by its name, or one's own decoder.

    Args:
        model: The whole model.
        tokens: Whether its input is token ids: then any model that is not of transformers, and is built as
            `split_causal_lm` needs it, is taken for one.

    Example:
        >>> is_causal_lm(nn.Linear(2, 2))
        False
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    if hasattr(config, "model_type"):
        return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not tokens:
        return False
    try:
        find_layout(model)
    except SplitError:
        return False
    return True
