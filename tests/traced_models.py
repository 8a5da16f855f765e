"""Models with what real ones do in their forward, small enough to split a hundred times."""

from dataclasses import dataclass

import torch
from torch import nn

from torchdistpackage.split import pipe_split


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Blocks(nn.Module):
    """An embedding, blocks in a ModuleList, a head."""

    def __init__(self, count=4, width=6):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(count)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class UNet(nn.Module):
    """Long skips: what goes down is used again on the way up."""

    def __init__(self, depth=4, width=6):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.middle = Block(width)
        self.up = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(depth)])

    def forward(self, x):
        skips = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            skips.append(x)
        x = self.middle(x)
        for layer in self.up:
            x = torch.tanh(layer(torch.cat([x, skips.pop()], dim=-1)))
        return x


class TwoTowers(nn.Module):
    """Images and texts meet at the end."""

    def __init__(self, width=6):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self.embedding = nn.Embedding(11, width)
        self.text = nn.Sequential(Block(width), Block(width))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, tokens):
        image = self.image(images)
        text = self.text(self.embedding(tokens)).mean(1)
        return self.scale * (image * text)


class TiedHead(nn.Module):
    """The embedding is also the head."""

    def __init__(self, width=6, count=3):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(count)])
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


class Experts(nn.Module):
    """A mixture of experts: a router, and experts that see the rows that chose them."""

    def __init__(self, width=6, count=3):
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()  # depends on the numbers
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        return x + out


class MixtureOfExperts(nn.Module):
    def __init__(self, width=6, count=3):
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList([Experts(width) for _ in range(count)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: list
    loss: object = None


class Structured(Blocks):
    """Keyword arguments in, a dataclass out."""

    def forward(self, x, *, mask=None, scale=1.0):
        hidden = []
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            if mask is not None:
                x = x * mask
            hidden.append(x)
        return Answer(logits=self.head(x) * scale, hidden=hidden)


class Marked(nn.Module):
    """Marks at two depths."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.a(x)
            pipe_split()
            return self.b(x)

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), self.Inner(), nn.Linear(6, 6)

    def forward(self, x):
        x = self.inner(self.first(x))
        pipe_split()
        return self.last(x)


class InPlace(nn.Module):
    """What is kept for later is changed in place on the way."""

    def __init__(self, width=6):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        kept = x * 1
        y = self.b(self.relu(kept))
        y = y + kept  # after the ReLU, which changed it
        z = self.c(y)
        z += kept
        return z + kept
