"""The first example: a plain loop over real images, pipelined over as many processes as you start.

torchrun --standalone --nproc-per-node 2 examples/train_mlp.py
python examples/train_mlp.py                                     # one process: the same numbers
"""

import torch
from digits import Digits
from torch import nn
from torch.utils.data import DataLoader

from torchdistpackage import clip_grad_norm_, forward_backward, partition_uniform, setup_distributed, tpc

torch.set_num_threads(1)  # on CPU the same number of threads gives the same bits
_, world_size, *_ = setup_distributed()
tpc.setup_process_groups([("pipe", world_size)])
first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

torch.manual_seed(0)  # every rank builds the same model and keeps its own part
hidden = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), *hidden, nn.Linear(256, 10)]
stage = nn.Sequential(*partition_uniform(layers))
optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()


def fwd_fn(x):
    return criterion(stage(x[0]), x[1]) if last else stage(x)


def own_inputs(images, labels):
    """Images enter on the first stage, labels on the last, which is the same rank if there is only one."""
    return ([images] if first else []) + ([labels] if last else [])


train = DataLoader(Digits(train=True), batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(0))
test = DataLoader(Digits(train=False), batch_size=120)

for epoch in range(10):
    for images, labels in train:
        loss = forward_backward(optimizer, fwd_fn, None, own_inputs(images, labels), num_microbatches=4)
        clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
    correct = 0
    for images, labels in test:
        logits = forward_backward(None, stage, None, images if first else None, num_microbatches=4, forward_only=True)
        if last:
            correct += (logits.argmax(1) == labels).sum().item()
    if last:  # the rank of the last stage owns the loss
        print(f"epoch {epoch}: loss {loss.item():.4f}, test accuracy {correct / len(test.dataset):.1%}", flush=True)
