"""Tensor-parallel layers: what they refuse, and gradients that can be copied."""

import copy
import io

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import start

from torchdistpackage import SplitError, TopologyError
from torchdistpackage.parallel import (
    Attention,
    Block,
    ColParallelLinear,
    ParallelBlock,
    TpAttention,
    Transformer,
    maybe_split_into_sequence_parallel,
)


def sequence_parallel_gradients(rank, world):
    """Gradients have memory of their own: they can be copied and saved."""
    start(1, config=[("tensor", world)])
    block = ParallelBlock(16, num_heads=4, sequence_parallel=True)
    block(maybe_split_into_sequence_parallel(torch.randn(2, 6, 16))).sum().backward()
    torch.save(block.ln_1.bias.grad, io.BytesIO())
    return copy.deepcopy(block).ln_1.bias.shape


def test_a_block_can_be_copied_after_a_backward():
    assert run_distributed(sequence_parallel_gradients, 2) == [(16,), (16,)]


def other_sizes(rank, world):
    start(1, config=[("tensor", world)])
    with pytest.raises(SplitError, match="the dense attention has 2 heads, this one 4"):
        TpAttention(8, 4).init_from_full(Attention(8, 2))
    with pytest.raises(SplitError, match=r"the weight of the norm has shape \(8,\); the dense one has shape \(16,\)"):
        ParallelBlock(8, 4, 2).init_from_full(Block(16, 4, 2))
    with pytest.raises(SplitError, match=r"a positive whole number of outputs \(fout\), got 0"):
        ColParallelLinear(4, 0)
    with pytest.raises(SplitError, match=r"the layer has 4 inputs, on every rank, and got shape \(2, 5\)"):
        ColParallelLinear(4, 4)(torch.zeros(2, 5))
    with pytest.raises(TopologyError, match="the tensor group is a str"):
        ColParallelLinear(4, 4, tp_group="tensor")
    with pytest.raises(SplitError, match="got depth=-1"):
        Transformer(8, num_heads=2, depth=-1)


def test_other_sizes_are_refused():
    run_distributed(other_sizes, 2)
