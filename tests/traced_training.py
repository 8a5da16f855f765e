"""Trains a traced model on loopback and compares it with the plain loop: loss, gradients and buffers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from loopback_pipeline import run_step
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchdistpackage.runtime.microbatch import microbatch_sizes, weighted_sum
from torchdistpackage.schedule import build, describe


def loss_of(output: Any) -> Tensor:
    """Something to differentiate, whatever a model returns."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum((leaf.abs() if leaf.is_complex() else leaf.double()).square().mean() for leaf in leaves)


def train_plain(model: nn.Module, inputs: list[Tensor], m: int) -> Tensor:
    """Micro-batch after micro-batch, each by its share."""
    rows = len(inputs[0])
    sizes = [size for size in microbatch_sizes(rows, m) if size]
    losses = []
    for arguments in zip(*(x.split(sizes) for x in inputs), strict=True):
        losses.append(loss_of(model(*arguments)))
        (losses[-1] * (len(arguments[0]) / rows)).backward()
    return weighted_sum(losses, [size / rows for size in sizes])


def train_stages(pipe: Any, schedule: str, inputs: list[Tensor], m: int) -> Tensor:
    """The same through the runtime, every rank a thread; raises what a rank raised."""
    count, chunks = pipe.num_stages, describe(schedule).chunks
    plan = build(schedule, count // chunks, m)
    stages = [pipe.get_stage_module(index) for index in range(count)]
    functions = [*stages[:-1], lambda received: loss_of(stages[-1](received))]
    results = run_step(plan, functions, [list(inputs), *[None] * (count - 1)])
    for result in results:
        if isinstance(result, Exception):
            raise result
    last = results[plan.placement.loss_rank]
    return weighted_sum(last.outputs, last.weights)


def assert_trains(
    model: nn.Module, reference: nn.Module, pipe: Any, schedule: str, inputs: list[Tensor], *, exact: bool = True
) -> None:
    """One step in four micro-batches equals the plain loop.

    What several stages share is summed in another order, and so is the gradient of a value with users on several stages
    (exact=False).
    """
    theirs = train_plain(reference, inputs, 4)
    mine = train_stages(pipe, schedule, copy.deepcopy(inputs), 4)
    assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs)
    held = [{id(p) for p in pipe.get_stage_module(index).parameters()} for index in range(pipe.num_stages)]
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        a, b = parameter.grad, wanted[name].grad
        assert (a is None) == (b is None), name
        shared = not exact or sum(id(parameter) in stage for stage in held) > 1
        assert a is None or (torch.allclose(a, b, rtol=1e-4, atol=1e-6) if shared else torch.equal(a, b)), name
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(a, b), name
