"""One forward of the twin, without weights or values, to see who calls whom with what.

Modules with parameters run on the meta device, for the form of what they return, and that is replaced by a fresh leaf
of autograd, so that `findings.py` can ask what depends on what. Everything else, masks and rotary embeddings, runs on
the CPU with a few zeros, because such code looks at values ("is anything padded?"), and there are none on the meta
device.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, MutableMapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.cache import EmptyCache, cache_places, is_cache
from torchdistpackage.split.decoder.findings import ROWS, TOKENS, Call, Findings, conclude
from torchdistpackage.split.decoder.layout import DecoderLayout, Skeleton
from torchdistpackage.split.decoder.stand_in import HIDDEN, WARNING, filled, form_of, nothing, on_meta

__all__ = ["dry_run", "ids_name", "model_output", "switches"]

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_key_values_length")


def dry_run(twin: nn.Module, skeleton: Skeleton) -> DecoderLayout:
    """Runs the twin, and says how its parts work together.

    Args:
        twin: The model on the meta device; it is used up: its layers do not compute afterwards.
        skeleton: Its tree.

    Raises:
        SplitError: The forward is not a prologue, a row of layers and an epilogue.
    """
    seen, watch = Findings(), _WatchIds()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # frozen ones make values as well
    _replace(twin, skeleton, seen, watch)
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
    watch.known = {id(ids): ids}
    with torch.enable_grad():
        try:
            with watch:
                logits = model_output(twin(**{ids_name(twin): ids}, **dict.fromkeys(switches(twin), False)))
        except Exception as error:
            raise SplitError(
                f"the structure of {type(twin).__name__} could not be looked at: its forward without weights fails "
                f"with {type(error).__name__}: {error}; cut it with torchdistpackage.split_model, by tracing"
            ) from error
        layout = conclude(twin, skeleton, seen, logits, watch.read)
        return dataclasses.replace(
            layout,
            ids_name=ids_name(twin),
            switches=switches(twin),
            cache=_empty_cache(twin, ids),
            cache_places=cache_places(twin, skeleton),
        )


def _empty_cache(twin: nn.Module, ids: Tensor) -> EmptyCache | None:
    """What the model makes when it is asked for a cache; its layers do not compute and leave it empty."""
    options = dict.fromkeys(switches(twin), False)
    if "use_cache" not in options:
        return None
    try:
        result = twin(**{ids_name(twin): ids, **options, "use_cache": True})
    except Exception:  # a model that has no cache may say so
        return None
    for name in ("past_key_values", "cache_params"):
        found: Any = getattr(result, name, None)
        if is_cache(found):
            found.reset()  # what is around the layers may have noted positions in it
            return EmptyCache(name, found)
    return None


def ids_name(model: nn.Module) -> str:
    """What the model calls its token ids: `input_ids`, or the first argument of its forward."""
    names = list(inspect.signature(model.forward).parameters)
    return "input_ids" if "input_ids" in names else names[0]


def model_output(result: Any) -> Tensor:
    """The logits in what a model returns.

    Raises:
        SplitError: There are none.
    """
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = result[0] if isinstance(result, (tuple, list)) else None
    if not isinstance(found, Tensor):
        raise SplitError(f"the model returns a {type(result).__name__} without logits")
    return found


def switches(model: nn.Module) -> tuple[str, ...]:
    """What a forward can be told not to do: by its own arguments, or by the configuration's if it takes any."""
    config, arguments = getattr(model, "config", None), inspect.signature(model.forward).parameters.values()
    names = {argument.name for argument in arguments}
    any_name = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
    return tuple(
        name for name in ("use_cache", "output_router_logits") if name in names or (any_name and hasattr(config, name))
    )


@final
class _WatchIds(TorchFunctionMode):
    """Notes whether a function of torch looks at values of the token ids outside of the units of the prologue."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Tensor] = {}
        self.inside, self.read = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follows views and copies of the ids; anything else that takes them reads them, but for their shape."""
        result = func(*args, **(kwargs or {}))
        if self.inside or not any(id(leaf) in self.known for leaf in tree_leaves((args, kwargs))):
            return result
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and (result._base is not None or name in _COPIES):
            self.known[id(result)] = result
        elif name not in _ONLY_SHAPE:
            gives_values = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) or name in _VALUES
            self.read = self.read or gives_values
        return result


_COPIES = {"to", "contiguous", "clone", "long", "int"}
_ONLY_SHAPE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
_VALUES = {"tolist", "item", "numpy", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__", "__array__",
           "__contains__"}  # fmt: skip


def _replace(twin: nn.Module, skeleton: Skeleton, seen: Findings, watch: _WatchIds) -> None:
    """Units report and give leaves; layers report and compute nothing; the rest gets values to compute with."""
    placed: set[int] = set()
    for unit in skeleton.units:
        module = twin.get_submodule(unit)
        weighty = next(module.parameters(), None) is not None
        if weighty:
            placed.update(map(id, module.modules()))
            vars(module)["forward"] = _unit_call(seen, unit, watch, module.forward)
        elif isinstance(module, nn.Dropout):
            vars(module)["forward"] = _dropout_call(seen, unit)
    for place in range(skeleton.num_layers):
        layer = twin.get_submodule(skeleton.layer(place))
        placed.update(map(id, layer.modules()))
        vars(layer)["forward"] = _layer_call(seen, skeleton, place, layer, watch)
    for module in twin.modules():
        if id(module) not in placed:
            _materialize(module)
        if hasattr(module, WARNING):
            vars(module)[WARNING] = nothing


def _materialize(module: nn.Module) -> None:
    """Zeros for what a module holds itself: rotary frequencies, masks. What they are made of does not matter here."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(
                torch.zeros_like(parameter, device="cpu"), requires_grad=parameter.requires_grad
            )
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.is_meta:
            vars(module)[name] = torch.zeros_like(value, device="cpu")


def _unit_call(seen: Findings, unit: str, watch: _WatchIds, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.calls.append(Call(unit, None, args, kwargs))
        watch.inside += 1
        output = forward(*on_meta(args), **on_meta(kwargs))
        watch.inside -= 1
        return _fresh(seen, unit, output)

    return call


def _dropout_call(seen: Findings, unit: str) -> Callable[..., Any]:
    def call(x: Tensor) -> Tensor:
        seen.calls.append(Call(unit, None, (x,), {}))
        return x

    return call


def _fresh(seen: Findings, name: str, output: Any) -> Any:
    """The same form, of new leaves; not the leaves themselves, which must not be changed in place."""

    def leaf(tensor: Tensor) -> Tensor:
        made = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            seen.leaves.append((name, made.requires_grad_()))
            made = made.clone()
        seen.made[id(made)] = name, made
        return made

    return tree_map_only(Tensor, leaf, output)


def _layer_call(
    seen: Findings, skeleton: Skeleton, place: int, layer: nn.Module, watch: _WatchIds
) -> Callable[..., Any]:
    forward, name = layer.forward, skeleton.layer(place)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.calls.append(Call(name, place, args, kwargs))
        watch.read = watch.read or any(id(leaf) in watch.known for leaf in tree_leaves((args, kwargs)))
        hidden = seen.calls[-1].hidden
        if place not in seen.returns:
            seen.returns[place] = _form(seen, layer, forward, args, kwargs, hidden)
        return _fresh(seen, name, filled(seen.returns[place], torch.zeros_like(hidden)))

    return call


def _form(seen: Findings, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, hidden: Tensor) -> Any:
    """What a layer returns, with HIDDEN in the place of the hidden state: seen, else by what its signature says."""
    args, kwargs = on_meta(args), on_meta({name: None if name in _CACHES else kwargs[name] for name in kwargs})
    mappings = {key: value for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, MutableMapping)}
    sizes = {key: len(value) for key, value in mappings.items()}
    try:
        with torch.no_grad():
            return form_of(forward(*args, **kwargs), hidden)
    except Exception:  # a choice of experts depends on values
        says = str(inspect.signature(type(layer).forward).return_annotation).lower()
        return (HIDDEN, None) if "tuple" in says.split("[")[0] else HIDDEN
    finally:
        seen.shared.update(key for key, value in mappings.items() if len(value) != sizes[key])
