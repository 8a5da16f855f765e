"""Where things are in a decoder: the list of its layers, what is around it, and what crosses a cut.

::

    LlamaForCausalLM                 containers: "", "model"            opened, on every stage
      model                          prologue:   model.embed_tokens     on the first stage
        embed_tokens                 row:        model.layers.0 .. 5,   cut anywhere
        layers  0 1 2 3 4 5                      model.norm, lm_head
        norm                         everywhere: model.rotary_emb       has no parameters
        rotary_emb
      lm_head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.cache import EmptyCache

__all__ = ["ArgumentKey", "DecoderLayout", "Skeleton", "hidden_key", "layout_by_order", "possible_skeletons"]

ArgumentKey = int | str
"""A place among the arguments of a call: a position or a keyword."""

_HIDDEN = ("hidden_states", "hidden", "x", "inputs", "input")


@dataclass(frozen=True)
class Skeleton:
    """What the module tree alone says.

    Attributes:
        layers: Dotted name of the list of layers.
        num_layers: Its length.
        containers: The modules around it, from the model ("") inwards.
        units: The other children of the containers, in their order; elements where a child is a list of modules.
        lists: The children that are lists, and their lengths.
    """

    layers: str
    num_layers: int
    containers: tuple[str, ...]
    units: tuple[str, ...]
    lists: Mapping[str, int]

    def layer(self, index: int) -> str:
        """Dotted name of a layer."""
        return f"{self.layers}.{index}"

    @property
    def listed(self) -> set[str]:
        """The units that are elements of lists."""
        return {f"{name}.{number}" for name, length in self.lists.items() for number in range(length)}


@dataclass(frozen=True)
class DecoderLayout:
    """What the dry run adds.

    Attributes:
        skeleton: The tree.
        prologue: Units with parameters that run before the row: the first stage holds them.
        row: Names of what can be distributed over stages, in the order of execution: the layers, then the units with
            parameters that run after them.
        idle: Units with parameters that a plain forward does not call; the last stage keeps them.
        randoms: Dropouts of the prologue: stages that get their hidden state from elsewhere must not draw.
        carried: Place in the row -> arguments of its call, besides the hidden state, that the prologue made of
            weights. They travel to every stage.
        chained: Place -> arguments that the element before it returned. They cross the cut right before it.
        shared: Arguments that are mappings into which layers write for later ones. What is in them travels.
        returns: For each layer the form of what it returns, see `stand_in.form_of`.
        rows_at: For each place in the row, where the hidden state's shape has (rows, tokens), counted from the end.
        reads_ids: Whether anything but the embedding looks at the token ids; then they travel.
        ids_name: What the model calls its token ids.
        switches: Arguments of the forward that can switch off what the configuration asks for.
        cache: The model's empty key-value cache and its name; None where it makes none.
        cache_places: For each layer its places in a cache.
    """

    skeleton: Skeleton
    prologue: tuple[str, ...]
    row: tuple[str, ...]
    idle: tuple[str, ...]
    randoms: tuple[str, ...]
    carried: Mapping[int, tuple[ArgumentKey, ...]]
    chained: Mapping[int, tuple[ArgumentKey, ...]]
    shared: tuple[ArgumentKey, ...]
    returns: tuple[Any, ...]
    rows_at: tuple[int, ...]
    reads_ids: bool
    ids_name: str = "input_ids"
    switches: tuple[str, ...] = ()
    cache: EmptyCache | None = None
    cache_places: tuple[tuple[int, ...], ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.skeleton.num_layers


def possible_skeletons(model: nn.Module) -> list[Skeleton]:
    """The lists of modules that may be the row of layers, the likeliest first.

    That is the one which the configuration's pipeline plan names, then those as long as the configuration says, then
    those with the most weights.

    Raises:
        SplitError: There is no list of modules.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    planned, length = _planned(model), getattr(text, "num_hidden_layers", None)
    lists = [
        (name == planned, len(module) == length, _weights(module), -name.count("."), -number, name)
        for number, (name, module) in enumerate(model.named_modules())
        if len(module._modules) and is_row(module)
    ]
    if not lists:
        raise SplitError(
            f"{type(model).__name__} has no torch.nn.ModuleList of layers to distribute, nor a ModuleDict with "
            "the keys '0', '1', ...; cut it with torchdistpackage.split_model (by tracing) or "
            "write its layers down with flatten_model(model, layer_list)"
        )
    return [_skeleton(model, name) for *_, name in sorted(lists, reverse=True)]


def is_row(module: nn.Module) -> bool:
    """Whether a module is a list of modules, or a dict whose keys are the numbers of such a list, in order."""
    return isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.ModuleDict) and [*module] == [str(number) for number in range(len(module))]
    )


def _skeleton(model: nn.Module, name: str) -> Skeleton:
    parts = name.split(".")
    containers = tuple(".".join(parts[:depth]) for depth in range(len(parts)))
    units = tuple(unit for container in containers for unit in _units(model, container, {name, *containers}))
    parents = {unit.rpartition(".")[0] for unit in units} - {*containers}
    lists = {parent: sum(unit.rpartition(".")[0] == parent for unit in units) for parent in parents}
    return Skeleton(name, len(model.get_submodule(name)), containers, units, lists)  # type: ignore[arg-type]


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layout_by_order(model: nn.Module, skeleton: Skeleton) -> DecoderLayout:
    """The layout of a model whose forward is not written, so that its parts can be looked at but not run.

    What its modules are for is taken from the order in which they were made.
    """
    names = [name for name, _ in model.named_modules()]
    begin = names.index(skeleton.layers)
    weighty = [unit for unit in skeleton.units if next(model.get_submodule(unit).parameters(), None) is not None]
    behind = tuple(unit for unit in weighty if names.index(unit) > begin)
    layers = tuple(skeleton.layer(place) for place in range(skeleton.num_layers))
    return DecoderLayout(
        skeleton=skeleton,
        prologue=tuple(unit for unit in weighty if unit not in behind),
        row=(*layers, *behind),
        idle=(),
        randoms=(),
        carried={},
        chained={},
        shared=(),
        returns=(),
        rows_at=(),
        reads_ids=False,
    )


def hidden_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ArgumentKey:
    """Where a call of an element of the row has the hidden state: in front, or under one of the usual names.

    Raises:
        SplitError: The call has no arguments.
    """
    if args:
        return 0
    found = next((name for name in _HIDDEN if name in kwargs), None) or next(iter(kwargs), None)
    if found is None:
        raise SplitError("a layer was called without arguments, so that nothing can be sent to the next stage")
    return found


def _planned(model: nn.Module) -> str | None:
    """The list in `config.base_model_pp_plan`, which names the parts of the base model in order."""
    plan = getattr(getattr(model, "config", None), "base_model_pp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    lists = [name for name in plan if isinstance(getattr(base, name, None), nn.ModuleList)]
    return f"{prefix}.{lists[0]}".lstrip(".") if len(lists) == 1 else None


def _units(model: nn.Module, container: str, inner: set[str]) -> Iterator[str]:
    for name, child in model.get_submodule(container).named_children():
        full = f"{container}.{name}".lstrip(".")
        if full in inner:
            continue
        if isinstance(child, nn.ModuleList):
            yield from (f"{full}.{number}" for number in range(len(child)))
        else:
            yield full
