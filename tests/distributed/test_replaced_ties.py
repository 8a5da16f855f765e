"""A tied parameter stays tied when something else is put into its place: by fully_shard, or tensor parallelism."""

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import fully_shards, start
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.functional import cross_entropy

from torchdistpackage import (
    ShardedEMA,
    SplitError,
    TorchDistError,
    apply_tensor_parallel,
    clip_grad_norm_,
    forward_backward,
    partition_chunks,
    partition_uniform,
    setup_distributed,
    tie_parameters,
    tpc,
)

TOKENS, LABELS = torch.arange(8), (torch.arange(8) + 1) % 12


def tied_model():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    head.weight = embedding.weight
    return [embedding.double(), nn.Tanh(), head.double()]


def plain_weight(steps=3):
    layers = nn.Sequential(*tied_model())
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(TOKENS.chunk(4), LABELS.chunk(4), strict=True):
            (cross_entropy(layers(x), y) / 4).backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 0.1)
        optimizer.step()
    return layers[0].weight.detach()


def check_training(stage):
    """Three steps of this rank's stage leave the plain loop's weight on both ends."""
    first = tpc.is_first_in_pipeline_group()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.05)

    def fwd_fn(x):
        return stage(x) if first else cross_entropy(stage(x[0]), x[1])

    for _ in range(3):
        forward_backward(optimizer, fwd_fn, None, TOKENS if first else [LABELS], num_microbatches=4)
        clip_grad_norm_(stage.parameters(), 0.1)
        optimizer.step()
    weight = next(stage.parameters()).detach()
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    assert torch.allclose(whole, plain_weight(), atol=1e-12)


def shard_vocabulary(stage, head=None):
    first = tpc.is_first_in_pipeline_group()
    embedding, head = RowwiseParallel(input_layouts=Replicate()), head or ColwiseParallel(output_layouts=Replicate())
    apply_tensor_parallel(stage, {"0": embedding} if first else {str(len(stage) - 1): head})


def sharded_afterwards(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", 2), ("data", world // 2)])
    stage = nn.Sequential(*partition_uniform(tied_model()))
    fully_shard(stage, mesh=tpc.mesh["data"])
    check_training(stage)


@fully_shards
@pytest.mark.parametrize("world", [2, 4])
def test_fully_shard_after_the_cut(world):
    run_distributed(sharded_afterwards, world)


def tensor_parallel(rank, world, by_hand):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", 2), ("tensor", 2)])
    layers = tied_model()
    stage = nn.Sequential(*(layers[:2] if tpc.is_first_in_pipeline_group() else layers[2:]))
    if not by_hand:
        stage = nn.Sequential(*partition_uniform(layers))
    shard_vocabulary(stage)
    if by_hand:
        tie_parameters("embedding", next(stage.parameters()))
    check_training(stage)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_sharded_vocabulary(by_hand):
    run_distributed(tensor_parallel, 4, by_hand)


def cut_differently(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", 2), ("tensor", 2)])
    stage = nn.Sequential(*partition_uniform(tied_model()))
    shard_vocabulary(stage, RowwiseParallel(input_layouts=Replicate()))
    with pytest.raises(SplitError, match="ranks have .*Shard"):
        tie_parameters("embedding", next(stage.parameters()))
    with pytest.raises(TorchDistError, match=r"in different ways: \(6, 8\) on rank 0, \(12, 4\) on rank 1"):
        check_training(stage)
    assert isinstance(next(stage.parameters()).placements[0], Shard)


def test_copies_that_are_cut_differently_are_refused():
    run_distributed(cut_differently, 4)


def torn(rank, world):
    start(1)
    stages = [nn.Sequential(*chunk) for chunk in partition_chunks(tied_model(), "zb-v").values()]
    for stage in stages:
        fully_shard(stage, mesh=tpc.mesh["data"])
    functions = [stages[0], lambda x: cross_entropy(stages[1](x[0]), x[1])]
    with pytest.raises(SplitError, match="are one parameter on two stages of this rank, and have become two"):
        forward_backward(None, functions, None, [TOKENS, LABELS], num_microbatches=2, schedule="zb-v")


def test_two_stages_of_one_rank_that_are_sharded_alone_are_refused():
    run_distributed(torn, 2)


def equal_at_once(rank, world):
    start(2)
    torch.manual_seed(rank)
    weight = nn.Linear(3, 5, bias=False).weight if rank < 2 else None
    before = [None] * 2
    torch.distributed.all_gather_object(before, None if weight is None else weight.tolist())
    tie_parameters("embedding", weight)
    assert weight.tolist() == before[0]
    assert ShardedEMA(nn.ParameterList([weight])).state_dict_cpu()["0"].tolist() == before[0]


def test_hand_tied_copies_are_equal_before_the_first_step():
    run_distributed(equal_at_once, 2)
