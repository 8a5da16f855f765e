"""`fully_shard` inside of a pipeline: gradients are reduced once a step, and are those of the full batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from distributed_harness import run_distributed
from distributed_pipeline import FULLY_SHARD_ON_CPU, fully_shards, loss_step, make_layers, mse, own_inputs, start
from torch import nn
from torch.distributed.fsdp import fully_shard

from torchdistpackage import PipelineError, clip_grad_norm_, forward_backward, partition_uniform, tpc


def sharded_stage(reference):
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    for layer in stage:
        fully_shard(layer, mesh=tpc.mesh["data"])
    return fully_shard(stage, mesh=tpc.mesh["data"])


def full_batch(reference, x, y):
    reference.zero_grad()
    for j in range(len(x)):
        (mse(reference(x[j]), y[j]) / len(x)).backward()


def same(stage, part, times=1):
    pairs = zip(stage.parameters(), part.parameters(), strict=True)
    return all(torch.allclose(p.grad.full_tensor(), times * q.grad) for p, q in pairs)


def sharded_steps(rank, world, pipe, schedule):
    start(pipe=pipe)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = make_layers()
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=pipe, stage=tpc.get_pp_rank()))
    stage = sharded_stage(reference)
    for m in (1, 3, 8):
        x, y = torch.randn(d, 5, 6).double(), torch.randn(d, 5, 6).double()
        full_batch(reference, x, y)
        stage.zero_grad()
        forward_backward(None, loss_step(stage), None, own_inputs(x[r], y[r]), num_microbatches=m, schedule=schedule)
        assert same(stage, part)
        forward_backward(None, loss_step(stage), None, own_inputs(x[r], y[r]), num_microbatches=m, schedule=schedule)
        assert same(stage, part, times=2)
        norm = clip_grad_norm_(stage.parameters(), 1e9)
        assert torch.allclose(norm, 2 * nn.utils.get_total_norm([p.grad for p in reference.parameters()]))


@fully_shards
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("world", "pipe"), [(4, 2), (2, 1)])
def test_a_fully_sharded_stage_equals_the_full_batch(world, pipe, schedule):
    run_distributed(sharded_steps, world, pipe, schedule)


@fully_shards
@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "set_manual_backward_finalization"),
    reason="this torch cannot be told when a split backward is over",
)
def test_a_fully_sharded_stage_under_a_split_backward():
    run_distributed(sharded_steps, 4, 2, "zb-h1")


def reductions(rank, world):
    start(pipe=1)
    stage = fully_shard(nn.Linear(4, 4), mesh=tpc.mesh["data"])
    with torch.profiler.profile() as profile:
        forward_backward(fwd_fn=lambda x: stage(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
    return sum(event.name == "c10d::_reduce_scatter_base_" for event in profile.events())


@fully_shards
def test_one_reduction_a_step():
    assert run_distributed(reductions, 2) == [1, 1]


def failing(rank, world):
    start(pipe=2)
    reference = make_layers()
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=2, stage=tpc.get_pp_rank()))
    stage = sharded_stage(reference)
    x, y = torch.randn(2, 6, 6).double(), torch.randn(2, 6, 6).double()
    inputs = own_inputs(x[tpc.get_dp_rank()], y[tpc.get_dp_rank()])
    step, calls = loss_step(stage), []

    def fwd_fn(arguments):
        calls.append(1)
        if tpc.is_last_in_pipeline_group() and len(calls) == 3:
            raise ValueError("in the third micro-batch, on both replicas")
        return step(arguments)

    with pytest.raises((ValueError, PipelineError), match="in the third micro-batch"):
        forward_backward(None, fwd_fn, None, inputs, num_microbatches=6)
    stage.zero_grad()
    full_batch(reference, x, y)
    forward_backward(None, step, None, inputs, num_microbatches=6)
    assert same(stage, part)


@fully_shards
@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "reset_iter_state"),
    reason="this torch cannot forget a step that has failed",
)
def test_a_step_after_a_failure():
    run_distributed(failing, 4)


def one_module_for_two_chunks(rank, world):
    start(pipe=1)
    stage = fully_shard(nn.Linear(4, 4), mesh=tpc.mesh["data"])
    functions = [stage, lambda x: stage(x).mean()]
    with pytest.raises(PipelineError, match="runs several stages of this rank"):
        forward_backward(
            fwd_fn=functions, inputs=[torch.randn(4, 4), None], num_microbatches=2, schedule="interleaved-1f1b"
        )
    assert dist.get_world_size() == world


@fully_shards
def test_a_module_belongs_to_one_stage():
    run_distributed(one_module_for_two_chunks, 2)


def refused(rank, world, microbatches):
    start(pipe=1)
    stage = fully_shard(nn.Linear(4, 4), mesh=tpc.mesh["data"])
    with pytest.raises(PipelineError, match=r"fully_shard of torch .* does not run on CPUs; install a newer torch"):
        forward_backward(fwd_fn=lambda x: stage(x).mean(), inputs=torch.randn(4, 4), num_microbatches=microbatches)


@pytest.mark.skipif(FULLY_SHARD_ON_CPU, reason="fully_shard of this torch runs on CPUs")
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_torch_that_cannot_is_named(microbatches):
    run_distributed(refused, 2, microbatches)
