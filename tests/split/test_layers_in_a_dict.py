"""A decoder that keeps its layers in a ModuleDict, as Forgather's do, is cut by the manual splitter."""

from types import SimpleNamespace

import torch
from torch import nn

from torchdistpackage.split import create_manual_causal_lm_splitter


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x, scale):
        return x + self.up(x) * scale


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(3)})
        self.layer_norm = nn.LayerNorm(4)

    def forward(self, x):
        for name, layer in self.layers.items():
            x = layer(x, 1 + int(name))
        return self.layer_norm(x)


class Toy(nn.Module):
    config = SimpleNamespace(num_hidden_layers=3)

    def __init__(self):
        super().__init__()
        self.input_encoder, self.layer_stack = nn.Embedding(7, 4), Stack()
        self.output_decoder = nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.output_decoder(self.layer_stack(self.input_encoder(input_ids)))


def test_its_stages_in_turn_are_the_model():
    model, ids = Toy(), torch.tensor([[1, 5, 2]])
    parts, _, _, _ = create_manual_causal_lm_splitter()(model, (ids,), {}, [(0,), (1,)], True)
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    x = ids
    for part in parts:
        x = part(x)
    assert torch.equal(getattr(x, "logits", x), model(ids))
