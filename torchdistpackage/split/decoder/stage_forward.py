"""The forward of one stage: the whole model's, with something coming in, and left where something goes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torchdistpackage.errors import PipelineError
from torchdistpackage.split.decoder.cache import cache_in, mark_length
from torchdistpackage.split.decoder.dry_run import model_output
from torchdistpackage.split.decoder.layout import ArgumentKey, DecoderLayout, hidden_key
from torchdistpackage.split.decoder.router import RouterLoss
from torchdistpackage.split.decoder.stand_in import HIDDEN, WARNING, AbsentModule, Called, filled, nothing, shown

__all__ = ["STAGE", "LastOutput", "Stage", "run_stage", "stage_forward"]

STAGE = "_torchdistpackage_stage"
"""Where a part keeps its `Stage`."""


@final
@dataclass(frozen=True)
class Stage:
    """What a part knows about itself; copies of the part share it.

    Attributes:
        layout: Of the whole model.
        twin: The whole model without weights.
        start: First place in the row that it holds.
        stop: The place after its last one.
        first: Whether the ids enter here.
        last: Whether the logits leave here.
    """

    layout: DecoderLayout
    twin: nn.Module
    start: int
    stop: int
    first: bool
    last: bool

    @cached_property
    def passed(self) -> dict[int, Called]:
        """The layers that this stage only passes by, by place: the same objects in every forward."""
        layout, ends = self.layout, {self.stop, max(self.stop, self.layout.num_layers - 1)}
        return {
            place: Called(self.twin.get_submodule(layout.row[place]), _passing(layout, place))
            for place in range(layout.num_layers)
            if place < self.start or (place > self.stop and place not in ends and place not in layout.carried)
        }

    def __deepcopy__(self, memo: Any) -> Stage:
        return self


class _Left(Exception):
    """The forward has done what this stage is for. It is the way out of code that is not ours."""


@dataclass
class _Run:
    """One forward: what came in, what goes out.

    Attributes:
        stage: Where.
        hidden: The hidden state that arrived; None on the first stage.
        carried: What arrived with it, by name.
        leaving: The hidden state that goes out.
        travelling: What goes out with it.
    """

    stage: Stage
    hidden: Tensor | None
    carried: Mapping[str, Any]
    leaving: Tensor | None = None
    travelling: dict[str, Any] = field(default_factory=dict)


def stage_forward(self: Any, x: Any = None, **kwargs: Any) -> Any:
    """Runs one stage.

    Args:
        self: The part.
        x: On the first stage the token ids, (rows, tokens); on the others what the stage before returned.
        **kwargs: The model's own arguments, the same on every stage: `attention_mask`, `position_ids`,
            `past_key_values`, ...; `labels` count on the last stage only.

    Returns:
        The hidden state, (rows, tokens, width), or a dict with it where the family sends more; on the last stage the
        logits, (rows, tokens, vocabulary), or the model's own loss if there are labels.

    Raises:
        PipelineError: What came in is not what this stage takes, or the model skipped a layer.
    """
    output = run_stage(self, x, kwargs)
    if isinstance(output, LastOutput):
        return output.logits if output.loss is None else output.loss
    return output


@final
@dataclass(frozen=True, eq=False)
class LastOutput:
    """What the forward of the last stage gave.

    Attributes:
        result: What the model's own forward returned; losses and hidden states in it are of this stage alone.
        loss: The model's loss over all stages, if there were labels.
    """

    result: Any
    loss: Tensor | None

    @property
    def logits(self) -> Tensor:
        """(rows, tokens, vocabulary)."""
        return model_output(self.result)


def run_stage(part: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    """One forward of a stage; see `stage_forward`.

    Args:
        part: The stage.
        x: Its input.
        kwargs: Arguments of the model's forward.

    Returns:
        What the next stage takes, or a `LastOutput`.

    Raises:
        PipelineError: See `stage_forward`.
    """
    stage: Stage = vars(part)[STAGE]
    _check_containers(part, stage)
    ids, run = _incoming(stage, x, kwargs)
    router = RouterLoss.of(part, kwargs, "output_router_logits" in stage.layout.switches)
    options = _options(stage, kwargs)
    with shown(part, _stand_ins(part, run)), router.listening():
        try:
            result = type(part)._whole_forward(part, **{stage.layout.ids_name: ids}, **options)
        except _Left:
            router.add(run.travelling, run.carried, kwargs.get("attention_mask"))
            return _outgoing(run, ids)
    if not stage.last:
        raise PipelineError(
            f"{type(part).__name__} went past its layers without calling number {stage.stop}: layers are skipped at "
            "random (layerdrop) or by configuration; a pipeline needs every layer in every forward: set layerdrop to 0"
        )
    loss = getattr(result, "loss", None) if kwargs.get("labels") is not None else None
    if loss is not None:
        loss = router.added_to(loss, run.carried, kwargs.get("attention_mask"))
    return LastOutput(result, loss)


def _check_containers(part: Any, stage: Stage) -> None:
    """The forward of what is around the layers is left half way, and its hooks do not run."""
    if type(part)._whole_forward is nn.Module.forward:
        raise PipelineError(f"{type(part).__name__} has no forward, so that its stages cannot run")
    if stage.last:
        return
    for name in stage.layout.skeleton.containers[1:]:
        if hasattr(part.get_submodule(name), "set_requires_gradient_sync"):
            raise PipelineError(
                f"fully_shard was applied to {name!r} inside of a stage, whose forward does not end on this stage; "
                "apply it to the layers and to the stage itself"
            )


def _incoming(stage: Stage, x: Any, kwargs: dict[str, Any]) -> tuple[Tensor, _Run]:
    ids = kwargs.pop(stage.layout.ids_name, None)
    if stage.first:
        ids = x if x is not None else ids
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise PipelineError(f"the first stage takes token ids, integers (rows, tokens); got {_kind(ids)}")
        return ids, _Run(stage, None, {})
    message = x if isinstance(x, dict) else {"hidden_states": x}
    hidden = message.get("hidden_states")
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise PipelineError(
            f"the stage that begins with {stage.layout.row[stage.start]} takes the hidden state that the stage before "
            f"returned, a floating tensor (rows, tokens, width); got {_kind(hidden)}"
        )
    ids = message.get("input_ids", ids)
    if ids is None:
        at = stage.layout.rows_at[stage.start]
        ids = torch.zeros(hidden.shape[at], hidden.shape[at + 1], dtype=torch.long, device=hidden.device)
    values = message.get("values", ())
    carried = {name: values[number] for name, number in message.get("names", {}).items()}
    return ids, _Run(stage, hidden, {**message, **carried})


def _outgoing(run: _Run, ids: Tensor) -> Any:
    """The message to the next stage: a tensor, if that is all; else a dict in which every tensor is once."""
    assert run.leaving is not None
    message: dict[str, Any] = {"input_ids": ids} if run.stage.layout.reads_ids else {}
    numbers: dict[int, int] = {}
    names: dict[str, int] = {}
    for name, value in run.travelling.items():
        if isinstance(value, Tensor):
            names[name] = numbers.setdefault(id(value), len(numbers))
            message.setdefault("values", []).extend([value] if names[name] == len(message["values"]) else [])
        else:
            message[name] = value
    if not message:
        return run.leaving
    return {"hidden_states": run.leaving, **message, **({"names": names} if names else {})}


def _options(stage: Stage, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model's forward."""
    options = {key: value for key, value in kwargs.items() if stage.last or key != "labels"}
    empty = stage.layout.cache
    if options.get("past_key_values") is not None and empty is not None:
        options[empty.name] = options.pop("past_key_values")
    elif options.get("cache_params") is None and "use_cache" in stage.layout.switches:
        if options.get("use_cache"):
            raise PipelineError(
                "use_cache=True without a cache: a stage returns none, so pass past_key_values=new_cache(part) to each"
            )
        options["use_cache"] = False
    return options


def _stand_ins(part: nn.Module, run: _Run) -> dict[str, Any]:
    """What the forward sees in the place of what is elsewhere, and of elements where something comes in or goes out."""
    stage, layout, skeleton = run.stage, run.stage.layout, run.stage.layout.skeleton
    changed: dict[str, Any] = {}
    if run.hidden is not None:
        dtype = run.hidden.dtype if _was_cast(part, stage.twin) else None
        for unit in set(layout.prologue) - set(layout.row[stage.start : stage.stop]):
            changed[unit] = AbsentModule(stage.twin.get_submodule(unit), run.hidden.device, dtype)
        changed |= {unit: nn.Identity() for unit in layout.randoms}
        changed |= {f"{name}.{WARNING}".lstrip("."): nothing for name in skeleton.containers}  # the ids may be made up
    layers: list[Any] = []
    for place, name in enumerate(layout.row):
        if place in stage.passed:
            layers.append(stage.passed[place])
            continue
        here = stage.start <= place < stage.stop
        module = part.get_submodule(name) if here else stage.twin.get_submodule(name)
        plain = here and place not in layout.carried and (place != stage.start or run.hidden is None)
        seen = module if plain else Called(module, _call(run, place, module if here else None))
        if place < skeleton.num_layers:
            layers.append(seen)
        elif not plain:
            changed[name] = seen
    by_name = isinstance(stage.twin.get_submodule(skeleton.layers), nn.ModuleDict)
    row = {str(place): layer for place, layer in enumerate(layers)} if by_name else layers
    return {skeleton.layers: row, **_listed(part, stage, changed)}


def _was_cast(part: nn.Module, twin: nn.Module) -> bool:
    """Whether the weights have another type than when the model was cut, so that the twin's types are old."""
    name, parameter = next(part.named_parameters(), ("", None))
    return parameter is not None and parameter.dtype != twin.get_parameter(name).dtype


def _listed(part: nn.Module, stage: Stage, changed: dict[str, Any]) -> dict[str, Any]:
    """With lists in the place of lists: a part keeps those in dictionaries."""
    found = {name: value for name, value in changed.items() if name not in stage.layout.skeleton.listed}
    for name, length in stage.layout.skeleton.lists.items():
        own = part.get_submodule(name)
        assert isinstance(own, nn.ModuleDict)
        kept = [own[str(number)] if str(number) in own else None for number in range(length)]
        found[name] = [changed.get(f"{name}.{number}", element) for number, element in enumerate(kept)]
    return found


def _passing(layout: DecoderLayout, place: int) -> Callable[..., Any]:
    """What a layer does that is elsewhere: it hands on what it gets."""
    form = layout.returns[place] if layout.returns else HIDDEN

    def call(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs[str(hidden_key(args, kwargs))]
        _mark(layout, place, args, kwargs, hidden)
        return filled(form, hidden)

    return call


def _mark(layout: DecoderLayout, place: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> None:
    cache = cache_in(args, kwargs)
    if cache is not None:
        at = layout.rows_at[place]
        mark_length(cache, layout.cache_places[place], hidden.shape[at], hidden.shape[at + 1], hidden.device)


def _call(run: _Run, place: int, module: nn.Module | None) -> Callable[..., Any]:
    """What happens when the forward calls an element of the row: something comes in, is computed, or goes out."""
    stage, layout = run.stage, run.stage.layout
    leaves_at = max(stage.stop, layout.num_layers - 1)

    def call(*args: Any, **kwargs: Any) -> Any:
        key = hidden_key(args, kwargs)
        arguments: dict[ArgumentKey, Any] = {**dict(enumerate(args)), **dict(kwargs.items())}
        if place == stage.start and run.hidden is not None:
            arguments[key] = run.hidden
            _take(run, place, arguments, layout.chained.get(place, ()))
            _take_shared(run, arguments)
        _take(run, place, arguments, layout.carried.get(place, ()))
        if module is not None:
            positional = [arguments.pop(number) for number in range(len(args))]
            return module(*positional, **{str(name): value for name, value in arguments.items()})
        hidden: Tensor = arguments[key]
        if place == stage.stop:
            run.leaving = hidden
            _give(run, place, arguments, layout.chained.get(place, ()))
            _give_shared(run, arguments)
        if place >= stage.stop:
            _give(run, place, arguments, layout.carried.get(place, ()))
        if place < layout.num_layers:
            _mark(layout, place, args, kwargs, hidden)
        if place == leaves_at and not stage.last:
            raise _Left
        return hidden if place >= layout.num_layers else filled(layout.returns[place], hidden)

    return call


def _take(run: _Run, place: int, arguments: dict[ArgumentKey, Any], keys: tuple[ArgumentKey, ...]) -> None:
    """Puts what arrived in the place of what this stage made of nothing."""
    for key in keys:
        leaves, form = tree_flatten(arguments[key])
        names = [f"{place}.{key}.{number}" for number in range(len(leaves))]
        found = [run.carried.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        arguments[key] = tree_unflatten(found, form)


def _give(run: _Run, place: int, arguments: dict[ArgumentKey, Any], keys: tuple[ArgumentKey, ...]) -> None:
    for key in keys:
        for number, leaf in enumerate(tree_leaves(arguments[key])):
            if isinstance(leaf, Tensor):
                run.travelling[f"{place}.{key}.{number}"] = leaf


def _take_shared(run: _Run, arguments: dict[ArgumentKey, Any]) -> None:
    for key in run.stage.layout.shared:
        for name, value in run.carried.get(f"shared.{key}", ()):
            arguments[key][name] = value


def _give_shared(run: _Run, arguments: dict[ArgumentKey, Any]) -> None:
    for key in run.stage.layout.shared:
        if arguments.get(key):
            run.travelling[f"shared.{key}"] = list(arguments[key].items())


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return "a tuple; with use_cache=True a Bottom or Trunk returns the pair (hidden state, cache)"
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
