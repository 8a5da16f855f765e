"""Decoders built in every way, small and by hand: what travels, and what is refused in words."""

import pytest
import torch
from torch import nn

from torchdistpackage import PipelineError, SplitError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.find import find_layout


class Layer(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, *others, **more):
        return x + self.linear(x).tanh()


class Decoder(nn.Module):
    def __init__(self, layer=Layer, count=4):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(layer() for _ in range(count))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def loop(self, x, ids):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, ids):
        return self.head(self.norm(self.loop(self.embed(ids), ids)))


IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))


def compare(model, count):
    """Loss and gradients of the stages against the whole model; returns the layout."""
    expected = model(IDS)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    x = IDS
    for part in split_causal_lm(model, count).values():
        x = part(x)
    x.square().sum().backward()
    assert torch.equal(x, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.get(name), rtol=1e-5, atol=1e-6)
    return find_layout(model)


class Enumerated(Decoder):
    def loop(self, x, ids):
        for index, layer in enumerate(self.layers[: len(self.layers)]):
            x = self.layers[index](x) if index % 2 else layer(x)
        return x


class ReturnsTuples(Decoder):
    class Layer(Layer):
        def forward(self, x, *others) -> tuple:
            return super().forward(x), None, torch.ones(1)

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        for layer in self.layers:
            x = layer(x, None)[0]
        return x


class AsksLayers(Decoder):
    def __init__(self):
        super().__init__()
        for index, layer in enumerate(self.layers):
            layer.kind = "odd" if index % 2 else "even"

    def loop(self, x, ids):
        for layer in self.layers:
            x = layer(x * (2 if layer.kind == "odd" else 1))
        return x


class LooksBack(Decoder):
    """Every layer sees the embeddings again: they travel."""

    class Layer(Layer):
        def forward(self, x, first):
            return super().forward(x) + first.square()

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        first = x
        for layer in self.layers:
            x = layer(x, first=first)
        return x


class HandsOn(Decoder):
    """A layer returns something for the next one only."""

    class Layer(Layer):
        def forward(self, x, bias=None):
            x = super().forward(x if bias is None else x + bias)
            return x, x.mean(1, keepdim=True)

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias=bias)
        return x


class LeavesNotes(Decoder):
    """Layers write into a dictionary, and later ones read it."""

    class Layer(Layer):
        def forward(self, x, notes):
            if len(notes) < 2:
                notes[f"key{len(notes)}"] = (x * 2, x + 1)
            else:
                x = x + notes["key0"][0] * notes["key1"][1]
            return super().forward(x)

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        notes = {}
        for layer in self.layers:
            x = layer(x, notes=notes)
        return x


class ReadsIds(Decoder):
    def loop(self, x, ids):
        mask = (ids != 0).unsqueeze(-1)
        for layer in self.layers:
            x = layer(x) * mask
        return x


class GivesIdsToLayers(Decoder):
    class Layer(Layer):
        def forward(self, x, ids):
            return super().forward(x) + (ids % 3).unsqueeze(-1)

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        for layer in self.layers:
            x = layer(x, ids)
        return x


class Streams(Decoder):
    """The hidden state has a dimension more, between those of the batch and the width."""

    def loop(self, x, ids):
        x = torch.stack([x, x * 2, x * 3], dim=2)
        for layer in self.layers:
            x = layer(x)
        return x.sum(2)


class SharedHead(Decoder):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


class Body(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.words, self.blocks = decoder.embed, decoder.layers

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Deep(nn.Module):
    """The row is further down, and the embeddings are beside it."""

    def __init__(self):
        super().__init__()
        decoder = Decoder()
        self.body = nn.Sequential()
        self.body.core = Body(decoder)
        self.out = nn.Sequential(decoder.norm, decoder.head)

    def forward(self, ids):
        return self.out(self.body(ids))


ODD = [Decoder, Enumerated, ReturnsTuples, AsksLayers, LooksBack, HandsOn, LeavesNotes, ReadsIds, GivesIdsToLayers]


@pytest.mark.parametrize("build", [*ODD, Streams, SharedHead, Deep])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_stages_compute_what_the_model_computes(build, count):
    compare(build(), count)


def test_what_travels():
    assert compare(LooksBack(), 2).carried == dict.fromkeys(range(4), ("first",))
    assert compare(HandsOn(), 2).chained == dict.fromkeys(range(1, 4), ("bias",))
    assert compare(LeavesNotes(), 2).shared == ("notes",)
    assert compare(ReadsIds(), 2).reads_ids
    assert compare(GivesIdsToLayers(), 2).reads_ids
    assert not compare(Decoder(), 2).reads_ids


@pytest.mark.parametrize("read", [torch.Tensor.tolist, lambda x: x.to(torch.int32) % 3, lambda x: x.unbind(0)[0] % 3,
                                  lambda x: (x.view(-1) % 3)[:5], lambda x: x.max(1).values])  # fmt: skip
def test_ids_travel_however_they_are_read(read):
    class Reads(Decoder):
        def loop(self, x, ids):
            scale = torch.as_tensor(read(ids)).float().mean()
            for layer in self.layers:
                x = layer(x) * scale
            return x

    assert compare(Reads(), 3).reads_ids


def test_a_hidden_state_alone_is_sent_as_a_tensor_and_anything_once():
    assert isinstance(split_causal_lm(Decoder(), 2)[0](IDS), torch.Tensor)
    message = split_causal_lm(LooksBack(), 2)[0](IDS)
    assert len(message["values"]) == 1
    assert set(message["names"]) == {"2.first.0", "3.first.0"}


class Twice(Decoder):
    def loop(self, x, ids):
        return super().loop(super().loop(x, ids), ids)


class Between(Decoder):
    def loop(self, x, ids):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


class Skips(Decoder):
    def loop(self, x, ids):
        return super().loop(x, ids) + x


class Collects(Decoder):
    def loop(self, x, ids):
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return torch.stack(seen).sum(0)


class Grows(Decoder):
    class Layer(Layer):
        def forward(self, x, seen):
            return super().forward(x) + seen.sum(0)

    def __init__(self):
        super().__init__(self.Layer)

    def loop(self, x, ids):
        seen = x[None]
        for layer in self.layers:
            x = layer(x, seen)
            seen = torch.cat([seen, x[None]])
        return x


class Mixes(Decoder):
    def loop(self, x, ids):
        first = x
        for layer in self.layers:
            x = layer(x + first)
        return x


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Twice, r"once each and in order, but as \[0, 1, 2, 3, 0"),
        (Between, "calls norm between its layers"),
        (Skips, "from layers.3 to norm also takes what embed returned"),
        (Collects, "also takes what layers.0, layers.1"),
        (Grows, "argument 1 of layers.1 of Grows is made of what"),
        (Mixes, "from layers.0 to layers.1 also takes what embed returned"),
    ],
)
def test_what_cannot_be_sent_from_stage_to_stage_is_refused(build, says):
    with pytest.raises(SplitError, match=says):
        split_causal_lm(build(), 2)


class DropsLayers(Decoder):
    def loop(self, x, ids):
        for index, layer in enumerate(self.layers):
            if not self.training or index < 2:
                x = layer(x)
        return x


def test_layers_that_are_left_out_are_noticed():
    parts = split_causal_lm(DropsLayers(), 2)
    with pytest.raises(PipelineError, match="without calling number 2"):
        parts[0](IDS)


def test_a_stage_says_what_it_takes():
    parts = split_causal_lm(Decoder(), 2)
    with pytest.raises(PipelineError, match=r"token ids, integers \(rows, tokens\); got \(3, 5\) torch.float32"):
        parts[0](IDS.float())
    with pytest.raises(PipelineError, match=r"begins with layers.2 takes the hidden state .* got \(3, 5\) torch.int64"):
        parts[1](IDS)


class Unwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(5, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 5)


def test_a_model_without_a_forward_can_be_cut_and_not_run():
    parts = split_causal_lm(Unwritten(), 2)
    assert parts[0].head is None
    assert list(parts[1].layers) == ["2"]
    with pytest.raises(PipelineError, match="Unwritten has no forward"):
        parts[0](IDS)


def test_a_model_whose_forward_was_replaced_in_the_object_is_refused():
    model = Decoder()
    model.forward = model.forward
    with pytest.raises(SplitError, match="the forward of the model was replaced in the object itself"):
        split_causal_lm(model, 2)


def test_after_an_error_the_stage_is_as_before():
    parts = split_causal_lm(Decoder(), 2)
    with pytest.raises(RuntimeError):
        parts[1](torch.zeros(3, 5, 7))
    assert "layers" not in vars(parts[1])
    assert parts[1](parts[0](IDS)).shape == (3, 5, 11)
