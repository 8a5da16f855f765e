"""A decoder that transformers does not know, and its parts, written with the abstract methods alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchdistpackage.split.parts.core import BaseBottomModel, BaseTopModel, BaseTrunkModel

WIDTH, LAYERS, WORDS = 16, 4, 40


class OwnLayer(nn.Module):
    """Attention with one head, and a linear layer; takes no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        query, key, value = self.mix(x).chunk(3, -1)
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return (x + self.out(found).relu(),)


def causal(attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
    """(rows, tokens, tokens): what each token may look at, itself at least."""
    tokens = hidden.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(hidden.shape[0], -1, -1)
    if attention_mask is None:
        return seen
    return (seen & attention_mask[:, None].bool()) | torch.eye(tokens, dtype=torch.bool)


class OwnModel(nn.Module):
    """The whole."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.where = nn.Parameter(torch.randn(32, WIDTH) * 0.1)
        self.layers = nn.ModuleList(OwnLayer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(ids) + self.where[torch.arange(ids.shape[1])]
        for layer in self.layers:
            (hidden,) = layer(hidden, causal(attention_mask, hidden))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Own:
    """What the three parts have in common; layers keep their names in the whole model."""

    start_layer: int
    end_layer: int
    layers: nn.ModuleDict

    def _make_layers(self) -> None:
        self.layers = nn.ModuleDict({str(n): OwnLayer() for n in range(self.start_layer, self.end_layer)})

    def get_transformer_blocks(self) -> Any:
        return self.layers.values()

    def prepare_attention_mask(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        return causal(attention_mask, hidden_states)

    def get_layer_name_pattern(self) -> str:
        return r"layers\.[0-9]+"

    @classmethod
    def from_pretrained_split(cls, full_state_dict: Mapping[str, Tensor], config: Any, **kwargs: Any) -> Any:
        part: Any = cls(config, **kwargs)  # type: ignore[call-arg]
        part.load_state_dict({name: full_state_dict[name] for name in part.state_dict()})
        return part


class OwnBottom(_Own, BaseBottomModel):
    def __init__(self, config: Any, end_layer: int) -> None:
        super().__init__(config, end_layer)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.where = nn.Parameter(torch.empty(32, WIDTH))
        self._make_layers()

    def get_embeddings(self) -> nn.Module:
        return self.embed

    def apply_position_encoding(self, inputs_embeds: Tensor, position_ids: Tensor | None) -> Tensor:
        return inputs_embeds + self.where[position_ids]


class OwnTrunk(_Own, BaseTrunkModel):
    def __init__(self, config: Any, start_layer: int, end_layer: int) -> None:
        super().__init__(config, start_layer, end_layer)
        self._make_layers()


class OwnTop(_Own, BaseTopModel):
    def __init__(self, config: Any, start_layer: int) -> None:
        super().__init__(config, start_layer)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self._make_layers()

    def get_final_norm(self) -> nn.Module:
        return self.norm

    def get_lm_head(self) -> nn.Module:
        return self.head


def write_own(directory: Path, layers: int = LAYERS) -> OwnModel:
    """A whole model, and its files, written by hand."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = OwnModel(layers)
    save_file(model.state_dict(), directory / "model.safetensors")
    config = {"model_type": "own_decoder", "num_layers": layers, "secret": [1, {"two": 3}]}
    (directory / "config.json").write_text(json.dumps(config))
    return model
