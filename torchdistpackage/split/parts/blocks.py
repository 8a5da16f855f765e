"""A row of layers, of whatever class, run one after the other: what each of them takes is in its signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.split.decoder.cache import is_cache

__all__ = ["cache_for", "claim_cache", "positions", "through_blocks"]

_OWNER = "_torchdistpackage_layers"  # in a cache: the layers of the part that writes to it
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def through_blocks(blocks: Iterable[nn.Module], hidden: Tensor, cache: Any, offered: Mapping[str, Any]) -> Tensor:
    """Calls layers one after the other.

    Args:
        blocks: They take the hidden state first, and return it, alone or in front of a tuple.
        hidden: (rows, tokens, width).
        cache: A cache of transformers, or None.
        offered: Keyword arguments; a layer gets those that its forward knows.

    Raises:
        PipelineError: A layer would see padding, or take no notice of the cache.
    """
    for block in blocks:
        arguments = _accepted(block, {**offered, **dict.fromkeys(_CACHES, cache)})
        if offered.get("attention_mask") is not None and "attention_mask" not in arguments:
            raise PipelineError(
                f"{type(block).__name__}.forward has no argument attention_mask, so that padding would be seen; put "
                "the layer into a module whose forward takes one, or let prepare_attention_mask return None"
            )
        _check_transformers_layer(block, arguments)
        if cache is not None and not {*_CACHES} & arguments.keys():
            raise PipelineError(f"{type(block).__name__}.forward takes no past_key_values; call without a cache")
        output = block(hidden, **arguments)
        hidden = output if isinstance(output, Tensor) else output[0]
    return hidden


def _check_transformers_layer(block: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Says what layers of transformers want of a family: they end in errors that do not tell."""
    name, mask = type(block).__name__, arguments.get("attention_mask")
    if not type(block).__module__.startswith("transformers."):
        return
    attends = {child for child, _ in block.named_children()} & {"self_attn", "attn", "attention", "self_attention"}
    if isinstance(mask, Tensor) and mask.dim() == 2 and attends:
        raise PipelineError(
            f"prepare_attention_mask returned the padding mask as it is, {tuple(mask.shape)}; {name} takes one of "
            "(rows, 1, tokens, tokens seen): return transformers.masking_utils.create_causal_mask(config=self.config, "
            "inputs_embeds=hidden_states, attention_mask=attention_mask, past_key_values=None)"
        )
    wanted = inspect.signature(block.forward).parameters
    if "position_embeddings" in wanted and arguments.get("position_embeddings") is None:
        raise PipelineError(
            f"{name} takes position_embeddings: let block_arguments(hidden_states, position_ids) return "
            "{'position_embeddings': rotary(hidden_states, position_ids)}, with the model's rotary embedding"
        )


def _accepted(block: nn.Module, offered: Mapping[str, Any]) -> dict[str, Any]:
    """What of the offered arguments a forward takes; the cache under the first name that it knows."""
    parameters = inspect.signature(block.forward).parameters
    named = [name for name in offered if name in parameters]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        named = [*named, *(name for name in offered if name not in named and name not in _CACHES[1:])]
    caches = [name for name in _CACHES if name in named]
    return {name: offered[name] for name in named if name not in caches[1:]}


def cache_for(past_key_values: Any, use_cache: bool | None, layers: tuple[int, int]) -> Any:
    """The cache that a part writes to: the given one, a new one if one is wanted, or None.

    Args:
        past_key_values: What was given.
        use_cache: Whether one is wanted.
        layers: Of the part: the first, and the one after the last.

    Raises:
        PipelineError: What is given is no cache of transformers, or that of another part.
    """
    if past_key_values is None and use_cache:
        from transformers import DynamicCache

        past_key_values = DynamicCache()
    if past_key_values is not None:
        claim_cache(past_key_values, layers)
    return past_key_values


def claim_cache(cache: Any, layers: tuple[int, int]) -> None:
    """Notes whose cache it is: lengths are counted in it, so that two parts cannot share one.

    Args:
        cache: What was given as `past_key_values`.
        layers: Of the part that is going to write to it.

    Raises:
        PipelineError: It is no cache of transformers, or another part, or the whole model, has written to it.
    """
    if not is_cache(cache):
        raise PipelineError(
            f"past_key_values is a {type(cache).__name__}; pass the cache that this part returned, or leave it out and "
            "say use_cache=True to get a new one"
        )
    owner = vars(cache).get(_OWNER)
    if owner != layers and (owner is not None or _has_tokens(cache)):
        whose = "the whole model or something else" if owner is None else f"the part with layers {_shown(owner)}"
        raise PipelineError(
            f"past_key_values was written by {whose}; the part with layers {_shown(layers)} needs a cache of its own: "
            "pass the one that it returned, or leave it out and say use_cache=True to get a new one"
        )
    vars(cache)[_OWNER] = layers


def _has_tokens(cache: Any) -> bool:
    within = getattr(cache, "self_attention_cache", cache).layers
    return any(getattr(layer, "is_initialized", False) and _length(layer) for layer in within)


def _length(layer: Any) -> int:
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0  # a recurrent layer has none


def _shown(layers: tuple[int, int]) -> str:
    return f"{layers[0]}..{layers[1] - 1}"


def positions(shape: torch.Size, device: torch.device, cache: Any) -> Tensor:
    """(rows, tokens): counted on from what the cache has, whichever of its places the layers write to.

    Args:
        shape: Begins with rows, tokens.
        device: Where to.
        cache: A cache of transformers, or None.
    """
    layers = 0 if cache is None else len(cache.layers)
    past = max((cache.get_seq_length(layer) for layer in range(layers)), default=0)
    return torch.arange(past, past + shape[1], device=device).expand(shape[0], -1)
