"""The data of the examples: 1,797 handwritten digits, real ones, that come with scikit-learn. No download.

    python examples/digits.py          # prints the sizes and draws one training image, plain and augmented

An 8x8 grey image becomes 3x32x32 with zero mean and unit variance, so that image models take it. The split into 1,437
training and 360 test images has the same share of every digit in both and never changes.

The training images of an epoch are drawn at once by `set_epoch`: each is turned, scaled and moved a little, by amounts
that depend on (seed, epoch, index) only. The ranks of a pipeline that load the same rows therefore see the same images,
however many ranks there are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

NUM_CLASSES = 10
TURN = math.radians(12)  # at most, either way
SCALE = 0.12  # 0.88 to 1.12 times the size
MOVE = 0.16  # of half the width: 2.5 pixels of 32


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Pairs (image of shape [3, size, size], label).

    Args:
        train: the training or the test part.
        size: pixels a side.
        augment: whether `set_epoch` turns, scales and moves the images.
        seed: of the augmentation; the split has its own.
    """

    def __init__(self, train: bool, *, size: int = 32, augment: bool = False, seed: int = 0) -> None:
        pixels, labels = load_digits(return_X_y=True)
        part = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)[0 if train else 1]
        small = torch.tensor(pixels[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16  # 0 is background, 1 is ink
        self.grey = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
        self.labels = torch.tensor(labels[part])
        self.augment, self.seed = augment, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's images; call it on every rank before the epoch's first batch."""
        grey = (
            _jitter(self.grey, torch.Generator().manual_seed(1000 * self.seed + epoch)) if self.augment else self.grey
        )
        self.images = (grey - 0.305) / 0.324  # mean and deviation of the training part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].expand(3, -1, -1), self.labels[index]


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """A small random rotation, scale and shift of each image; what comes in from outside is background."""
    turn, scale, move_x, move_y = (torch.rand(4, len(images), generator=generator) * 2 - 1).unbind()
    cos, sin = (f(turn * TURN) * (1 + scale * SCALE) for f in (torch.cos, torch.sin))
    affine = torch.stack([cos, -sin, move_x * MOVE, sin, cos, move_y * MOVE], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


if __name__ == "__main__":
    data, test = Digits(train=True, augment=True), Digits(train=False)
    print(f"{len(data)} training images, {len(test)} test images; the first one is a {data.labels[0]}:\n")
    plain, drawn = (F.avg_pool2d(images[:1], 2)[0, 0] for images in (data.grey, data.images * 0.324 + 0.305))
    for left, right in zip(plain, drawn, strict=True):
        print("   ".join("".join(" .:-=+*#%@"[int(x * 9.99)] * 2 for x in row.clamp(0, 1)) for row in (left, right)))
