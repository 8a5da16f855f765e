"""A small network and its batches, for tests of replicas that are compared bit by bit."""

import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage import setup_distributed

SMALL = 2e-4  # MiB: about 50 numbers of 4 bytes


def world(seed=0):
    setup_distributed(backend="gloo")
    torch.manual_seed(seed)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def batch(iteration, rank):
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    return torch.randn(5, 6, generator=generator)


def backward(model, x):
    model(x).square().mean().backward()


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def equal(ours, theirs):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def everywhere(module):
    """Whether all ranks hold the same bits."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, grads(module))
    return all(equal(found[0], other) for other in found)
