"""What a configuration says about layers, and which of them a part has."""

from __future__ import annotations

from typing import Any

from torchdistpackage.errors import SplitError

__all__ = ["layers_of", "need_layers", "num_layers_of", "settle_attention"]

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def num_layers_of(config: Any) -> int:
    """The number of layers that a configuration says.

    Raises:
        SplitError: It says none.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _LAYERS:
        if isinstance(count := getattr(text, name, None), int):
            return count
    raise SplitError(f"{type(config).__name__} has no number of layers: set config.num_hidden_layers")


def layers_of(component: str, start: int, end: int) -> dict[str, int]:
    """The arguments that say to `from_pretrained_split` and to the class which layers a part has.

    Example:
        >>> layers_of("top", 10, 12)
        {'start_layer': 10}
    """
    layers = {"start_layer": start, "end_layer": end}
    return {name: layers[name] for name in {"bottom": ("end_layer",), "top": ("start_layer",)}.get(component, layers)}


def settle_attention(config: Any) -> None:
    """Chooses an implementation of attention where the configuration leaves it open.

    Models of transformers do that when they are made. Layers that are made alone take the one that needs a mask to be
    causal, and see the future without.

    Args:
        config: For a family of the user's own; read from a file, so that nobody else has it.
    """
    if getattr(config, "_attn_implementation", "") is None:
        config._attn_implementation = "sdpa"


def need_layers(holder: str, start: int, end: int, total: int) -> None:
    """Raises unless start .. end-1 are layers of a model that has `total`.

    Raises:
        SplitError: They are not, or there would be none.
    """
    if not 0 <= start < end <= total:
        raise SplitError(
            f"{holder} would hold the layers from {start} up to {end}; it needs at least one, and the model has "
            f"{total}: 0..{total - 1}"
        )
