"""Key-value caches of a stage: how long the sequence is has to be right for layers that are elsewhere, too.

A decoder asks its cache for the length of what came before, and asks the first layer of a kind, whichever stage holds
that. So a layer that is elsewhere leaves keys of one head of width one, a byte a token, in its place, and the cache's
own rules (windows that slide, beams that are reordered) do the rest.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from torchdistpackage.errors import PipelineError

if TYPE_CHECKING:
    from torchdistpackage.split.decoder.layout import Skeleton

__all__ = ["EmptyCache", "cache_in", "cache_places", "is_cache", "mark_length"]

_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@final
@dataclass(frozen=True, eq=False)
class EmptyCache:
    """The cache that a model made before any token.

    Attributes:
        name: What the model's forward calls it.
        value: To be copied for each stage and sequence.
    """

    name: str
    value: Any

    def fresh(self) -> Any:
        """A cache of its own."""
        return copy.deepcopy(self.value)


def is_cache(value: Any) -> bool:
    """Whether something is a transformers `Cache`, or a pair of them for self- and cross-attention."""
    of = getattr(value, "self_attention_cache", value)
    return hasattr(of, "update") and hasattr(of, "layers")


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache of self-attention among the arguments of a layer's call, or None."""
    found = [value for name in _NAMES if (value := kwargs.get(name)) is not None]
    found += [value for value in args if value is not None and not isinstance(value, torch.Tensor)]
    cache = next((value for value in found if is_cache(value)), None)
    return getattr(cache, "self_attention_cache", cache)


def cache_places(twin: nn.Module, skeleton: Skeleton) -> tuple[tuple[int, ...], ...]:
    """For each layer its places in a cache: a layer with two attentions has two.

    Args:
        twin: The model without weights; attentions know their place as `layer_idx`.
        skeleton: Its tree.
    """
    places = []
    for layer in range(skeleton.num_layers):
        module = twin.get_submodule(skeleton.layer(layer))
        inner = {getattr(child, "layer_idx", None) for child in module.modules() if child is not module}
        places.append(tuple(sorted(place for place in inner if isinstance(place, int))) or (layer,))
    return tuple(places)


def mark_length(cache: Any, places: tuple[int, ...], rows: int, tokens: int, device: torch.device) -> None:
    """Notes that a layer which is elsewhere has seen the tokens of this forward.

    Args:
        cache: A transformers `Cache`.
        places: Places of the layer in the cache.
        rows: Rows of the batch.
        tokens: Tokens of this forward.
        device: Where the cache is.

    Raises:
        PipelineError: The cache is that of another stage.
    """
    for place in places:
        layer = cache.layers[place] if place < len(cache.layers) else None
        state = getattr(layer, "has_previous_state", None)
        if isinstance(state, dict):  # of a recurrent layer, where there is no length
            for key in state:
                state[key] = True
        keys = getattr(layer, "keys", None)
        if isinstance(keys, torch.Tensor) and keys.numel() and keys.dtype != torch.int8:
            raise PipelineError(
                f"the cache holds keys of layer {place}, which another stage computes: each stage needs a cache of its "
                "own, the one that it returned or new_cache(part)"
            )
        if layer is None or (hasattr(layer, "get_seq_length") and hasattr(layer, "keys")):
            mark = torch.zeros(rows, 1, tokens, 1, dtype=torch.int8, device=device)
            cache.update(mark, mark, place)
