"""Data x pipeline parallelism over gloo: torch's wrapper is reduced once a step, and equals the full batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, loss_step, make_layers, mse, own_inputs, start
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage import DDP, PipelineError, clip_grad_norm_, forward_backward, partition_uniform, tpc


def data_parallel_steps(rank, world, m, options):
    start(pipe=2)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = make_layers()
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=2, stage=tpc.get_pp_rank()))
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    wrapped = DDP(stage, **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    for _ in range(3):
        x, y = torch.randn(d, 5, 6).double(), torch.randn(d, 5, 6).double()
        reference.zero_grad()
        for j in range(d):
            (mse(reference(x[j]), y[j]) / d).backward()
        forward_backward(optimizer, loss_step(wrapped), None, own_inputs(x[r], y[r]), num_microbatches=m)
        assert close(stage.parameters(), part.parameters())
        norm = clip_grad_norm_(wrapped.parameters(), 0.1)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        assert close(stage.parameters(), part.parameters())
        out = forward_backward(None, wrapped, None, x[r] if tpc.is_first_in_pipeline_group() else [], 4, True)
        assert out is None or torch.allclose(out, reference(x[r]))
    assert wrapped.require_backward_grad_sync


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_ddp_is_reduced_once_and_equals_the_full_batch(m, options):
    run_distributed(data_parallel_steps, 4, m, options)


def count_reductions(rank, world):
    start(pipe=1)
    model = DistributedDataParallel(nn.Linear(4, 4), process_group=tpc.get_group("data"))
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    for _ in range(3):
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
    with model.no_sync():
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
    forward_backward(
        fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4, data_parallel=model
    )
    return len(calls)


def test_one_reduction_a_step_and_none_under_no_sync():
    assert run_distributed(count_reductions, 2) == [4, 4]


def unused_in_the_last_microbatch(rank, world):
    """A parameter that only some micro-batches use is reduced all the same."""
    start(pipe=1)
    net = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)]).double()
    reference = copy.deepcopy(net)

    class Chooser(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, which):
            return self.net[which](x).mean()

    model = DDP(Chooser(), find_unused_parameters=True)
    x = torch.randn(2, 8, 4).double()
    for _ in range(2):
        order = iter([0, 1, 1, 0])
        net.zero_grad()
        forward_backward(fwd_fn=lambda a, order=order: model(a, next(order)), inputs=x[rank], num_microbatches=4)
    for j in range(2):
        for part, which in zip(x[j].split(2), [0, 1, 1, 0], strict=True):
            (reference[which](part).mean() / 8).backward()
    assert close(net.parameters(), reference.parameters())


def test_find_unused_parameters_over_microbatches():
    run_distributed(unused_in_the_last_microbatch, 2)


def static_graph(rank, world):
    start(pipe=1)
    model = DDP(nn.Linear(4, 4), static_graph=True)
    forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=1)
    with pytest.raises(PipelineError, match="static_graph=True"):
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=2)
    assert model.require_backward_grad_sync


def test_static_graph_is_refused_in_words():
    run_distributed(static_graph, 2)


def stages_without_parameters(rank, world):
    start(pipe=2)
    linear = nn.Linear(4, 4)
    stage = DDP(linear if tpc.is_first_in_pipeline_group() else nn.ReLU())
    last = tpc.is_last_in_pipeline_group()
    x = torch.randn(2, 8, 4)
    forward_backward(
        fwd_fn=lambda a: stage(a).mean() if last else stage(a), inputs=None if last else x[tpc.get_dp_rank()]
    )
    norm = clip_grad_norm_(stage.parameters(), 1e9)
    reference = copy.deepcopy(linear)
    reference.zero_grad()
    reference(x.flatten(0, 1)).relu().mean().backward()
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1e9))


def test_a_stage_without_parameters_takes_part():
    run_distributed(stages_without_parameters, 4)


def one_replica(rank, world, options):
    start(pipe=2)
    reference = make_layers()
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=2, stage=tpc.get_pp_rank()))
    wrapped = DistributedDataParallel(stage, process_group=tpc.get_group("data"), **options)
    for _ in range(2):
        x, y = torch.randn(9, 6).double(), torch.randn(9, 6).double()
        reference.zero_grad()
        wrapped.zero_grad()
        mse(reference(x), y).backward()
        forward_backward(fwd_fn=loss_step(wrapped), inputs=own_inputs(x, y), num_microbatches=4)
        assert close(stage.parameters(), part.parameters())


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_a_wrapper_around_the_only_replica(options):
    run_distributed(one_replica, 2, options)


def eight_ranks(rank, world):
    start(pipe=4)
    reference = make_layers(5)
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=4, stage=tpc.get_pp_rank()))
    wrapped = DDP(stage)
    x, y = torch.randn(2, 7, 6).double(), torch.randn(2, 7, 6).double()
    for j in range(2):
        (mse(reference(x[j]), y[j]) / 2).backward()
    d = tpc.get_dp_rank()
    forward_backward(fwd_fn=loss_step(wrapped), inputs=own_inputs(x[d], y[d]), num_microbatches=5)
    assert close(stage.parameters(), part.parameters())
    assert torch.allclose(
        clip_grad_norm_(wrapped.parameters(), 1e9), nn.utils.get_total_norm(reference_grads(reference))
    )


def reference_grads(model):
    return [p.grad for p in model.parameters()]


def test_four_stages_and_two_replicas():
    run_distributed(eight_ranks, 8)
