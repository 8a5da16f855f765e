"""The models that are timed, as rows of layers with their data.

Every layer's output is contiguous and no layer overwrites its input, wherever the cut is: not every runtime can send
other tensors, or protect what it has received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdistpackage import flatten_model

MODELS = ("mlp", "resnet18", "resnet50", "vit-tiny")
CLASSES, WIDTH = 10, 1024


@dataclass(frozen=True)
class Task:
    """A model and what it trains on.

    Attributes:
        layers: The model, in order.
        loss: Of an output and its targets.
        rows: Of a micro-batch.
        batch: Inputs and targets of that many rows, the same on every rank.
        costs: What the cut balances: measured times, but the operations of layers that are all alike.
    """

    layers: list[nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    rows: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    costs: str


class Tokens(nn.Module):
    """What a vision transformer of timm does before its blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


def task(name: str, size: int) -> Task:
    """The task of a name, with the same weights on every rank; images have `size` pixels a side."""
    torch.manual_seed(0)
    if name == "mlp":
        row = [layer for _ in range(16) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
        return Task(row, nn.functional.mse_loss, 8, lambda n: (torch.randn(n, WIDTH), torch.randn(n, WIDTH)), "flops")

    def images(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 3, size, size), torch.randint(CLASSES, (n,))

    return Task(_vit(size) if name == "vit-tiny" else _resnet(name), nn.functional.cross_entropy, 4, images, "time")


def _resnet(name: str) -> list[nn.Module]:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=CLASSES)
    model.relu.inplace = False
    parts = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    return flatten_model(model, [*parts, lambda x: torch.flatten(x, 1), "fc"], return_list=True)


def _vit(size: int) -> list[nn.Module]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=CLASSES)
    parts = [Tokens(model), "blocks", "norm", lambda x: x[:, 0].contiguous(), "head"]
    return flatten_model(model, parts, return_list=True)
