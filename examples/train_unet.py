"""A U-Net, cut by measurement: its long skips go from the way down straight to the way up, past the stages between.

torchrun --standalone --nproc-per-node 2 examples/train_unet.py
torchrun --standalone --nproc-per-node 2 examples/train_unet.py --schedule zb-v      # two stages on each process
python examples/train_unet.py                                                        # one process: the same numbers
"""

import argparse
from itertools import pairwise

import torch
from digits import Digits
from torch import nn
from torch.utils.data import DataLoader

from torchdistpackage import clip_grad_norm_, forward_backward, local_stages, setup_distributed, split_model, tpc
from torchdistpackage.schedule import describe


class UNet(nn.Module):
    """Denoises images; nothing in it knows of pipelines."""

    def __init__(self, widths=(16, 32, 48)):
        super().__init__()
        steps = list(pairwise([widths[0], *widths]))
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList([block(a, b) for a, b in steps])
        self.middle = block(widths[-1], widths[-1])
        self.up = nn.ModuleList([block(2 * b, a) for a, b in reversed(steps)])
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x):
        skips, image = [], x
        x = self.stem(x)
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for layer in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, skips.pop()], dim=1))
        return image + self.head(x)


def block(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--schedule", default="1f1b")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()

torch.set_num_threads(1)  # on CPU the same number of threads gives the same bits
_, world_size, *_ = setup_distributed()
tpc.setup_process_groups([("pipe", world_size)])

torch.manual_seed(0)  # every rank builds the same model and keeps its own part
count = world_size * describe(args.schedule).chunks
pipe = split_model(UNet(), torch.zeros(32, 3, 32, 32), num_stages=count)
stages = local_stages(pipe, args.schedule)  # {index: module}, one entry or several
parameters = [parameter for stage in stages.values() for parameter in stage.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=2e-3)
has_loss = count - 1 in stages
if 0 in stages:
    print(pipe.report, f"values past stages: {list(pipe.skips)}", sep="\n", flush=True)


def fwd_fn(index, stage):
    if index < count - 1:
        return stage
    return lambda x: nn.functional.mse_loss(stage(x[:-1]), x[-1])  # what came from the stages before, and the target


def own_inputs(noisy, clean):
    """For each stage of this rank: noisy images enter on the first one, clean images on the last."""
    return [[*([noisy] if s == 0 else []), *([clean] if s == count - 1 else [])] or None for s in stages]


functions = [fwd_fn(index, stage) for index, stage in stages.items()]
images = DataLoader(Digits(train=True), batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(0))
for epoch in range(args.epochs):
    noise = torch.Generator().manual_seed(epoch)
    for clean, _ in images:
        noisy = clean + 0.5 * torch.randn(clean.shape, generator=noise)
        inputs = own_inputs(noisy, clean)
        loss = forward_backward(optimizer, functions, None, inputs, num_microbatches=4, schedule=args.schedule)
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    if has_loss:  # the rank of the last stage owns the loss
        print(f"epoch {epoch}: loss {loss.item():.6f}", flush=True)
