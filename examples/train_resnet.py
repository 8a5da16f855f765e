"""Data x pipeline parallelism: a ResNet cut by a list of its layers, wrapped in DDP, trained on real digits.

torchrun --standalone --nproc-per-node 2 examples/train_resnet.py              # 1 replica x 2 stages
torchrun --standalone --nproc-per-node 4 examples/train_resnet.py              # 2 replicas x 2 stages
torchrun --standalone --nproc-per-node 2 examples/train_resnet.py --pp 1       # 2 replicas, plain data parallelism
"""

import argparse

import torch
import torch.distributed as dist
import torchvision
from digits import NUM_CLASSES, Digits
from timm.utils import accuracy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from torchdistpackage import DDP, clip_grad_norm_, forward_backward, setup_distributed, tpc
from torchdistpackage.parallel import flatten_model, partition_balanced

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pp", type=int, default=2, help="stages")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=64, help="rows of each replica")
parser.add_argument("--microbatches", type=int, default=4)
parser.add_argument("--steps", type=int, default=0, help="stop each epoch after this many steps")
args = parser.parse_args()

rank, world_size, *_ = setup_distributed()
tpc.setup_process_groups([("data", world_size // args.pp), ("pipe", args.pp)])
first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()
device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

# --- the model: every rank builds the same one, names its layers in order, and keeps its part ------------------------

torch.manual_seed(0)
resnet = torchvision.models.resnet18(num_classes=NUM_CLASSES)
layer_list = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
flat_model = flatten_model(resnet, [*layer_list, lambda x: torch.flatten(x, 1), "fc"], return_list=True)
model = nn.Sequential(*partition_balanced(flat_model, costs="flops", example_input=torch.zeros(1, 3, 32, 32)))
model = DDP(model.to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()

# --- the data: each replica has its own rows; the first rank of a pipeline hands them to the others ------------------

train_set, test_set = Digits(train=True), Digits(train=False)
sampler = DistributedSampler(train_set, tpc.get_dp_size(), tpc.get_dp_rank(), seed=0)
train_loader = DataLoader(train_set, args.batch_size, sampler=sampler)
test_loader = DataLoader(test_set, args.batch_size)


def to_this_pipeline(*tensors):
    """The batch of the pipeline's first rank, on all of its ranks."""
    moved = [tensor.to(device).contiguous() for tensor in tensors]
    if tpc.get_pp_size() > 1:
        for tensor in moved:
            dist.broadcast(tensor, tpc.get_ranks_in_group("pipe")[0], tpc.get_group("pipe"))
    return moved


# --- one step ---------------------------------------------------------------------------------------------------------


def fwd_fn(inputs):
    if last:
        out = model(inputs[0])
        return criterion(out, inputs[1])
    return model(inputs)


def train_one_step(samples, targets):
    inputs = ([samples] if first else []) + ([targets] if last else [])
    loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=args.microbatches)
    total_norm = clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss, total_norm


def evaluate():
    """Top-1 and top-5 on the ranks that own the last stage."""
    model.eval()
    seen = top1 = top5 = 0.0
    for images, target in test_loader:
        images, target = to_this_pipeline(images, target)
        output = forward_backward(None, model, None, images if first else [], args.microbatches, forward_only=True)
        if last:
            acc1, acc5 = accuracy(output, target, topk=(1, 5))
            seen, top1, top5 = seen + len(target), top1 + acc1.item() * len(target), top5 + acc5.item() * len(target)
    model.train()
    return top1 / max(seen, 1), top5 / max(seen, 1)


for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for step, (samples, targets) in enumerate(train_loader):
        if args.steps and step == args.steps:
            break
        loss, total_norm = train_one_step(*to_this_pipeline(samples, targets))
        if last and tpc.is_first_in_data_group() and step % 5 == 0:
            print(f"epoch {epoch} step {step}: loss {loss.item():.4f}, norm {total_norm.item():.2f}", flush=True)
    top1, top5 = evaluate()
    if last and tpc.is_first_in_data_group():
        print(f"epoch {epoch}: top-1 {top1:.1f} %, top-5 {top5:.1f} %", flush=True)
dist.destroy_process_group()
