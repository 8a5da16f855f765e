"""Experts that are spread over ranks: their gradients are those of a plain model that holds all of them."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import mse, own_inputs, start
from mixture_of_experts import EXPERTS, WIDTH, Model, batch, plain_step, spread
from torch import nn

from torchdistpackage import PipelineError, TopologyError, forward_backward, setup_distributed, tpc
from torchdistpackage.parallel.moe_data_parallel import MoEDP, _in_order, create_moe_dp_hooks, moe_dp_iter_step
from torchdistpackage.parallel.naive_ddp import NaiveDDP


def check(model, plain, factor=1.0):
    """Gradients are the plain model's; those of experts times a factor."""
    first = tpc.get_group_rank("moe_ep") * EXPERTS // tpc.get_group_size("moe_ep")
    for name, p in model.named_parameters():
        words = name.split(".")
        if "experts" in words:
            words[2] = str(first + int(words[2]))
        expected = plain.get_parameter(".".join(words)).grad
        assert (p.grad is None) == (expected is None), name
        scale = factor if "experts" in words else 1.0
        assert p.grad is None or torch.allclose(p.grad, scale * expected), (name, p.grad / expected)
    found = [None] * tpc.get_group_size("moe_dp")
    mine = [None if p.grad is None else p.grad.tolist() for p in model.mixture.experts.parameters()]
    dist.all_gather_object(found, mine, group=tpc.get_group("moe_dp"))
    assert found == [mine] * len(found)


def mixture(rank, world):
    start(1)
    tpc.build_moe_groups(moe_ep_size=2)
    torch.manual_seed(0)
    plain = Model().double()
    cases = [{}, {"overlap_comm": False}, {"sync": True}, {"num_grad_acc_iter": 2}, {"op": "avg"}]
    for case in cases:
        model = spread(plain, **case)
        means = case.get("op") == "avg"
        for iteration in range(4):
            model.zero_grad()
            plain.zero_grad()
            for half in range(2):
                x = batch(iteration + 10 * half, world)
                y = x.flip(2)
                (mse(model(x[rank]), y[rank]) / (1 if means else world)).backward()
                plain_step(plain, x, y)
            model.reduce_gradients()
            moe_dp_iter_step()
            check(model.module, plain, 2.0 if means else 1.0)
            moe_dp_iter_step()
            check(model.module, plain, 2.0 if means else 1.0)
        del model
    return len(_in_order())


def test_experts_over_four_ranks_have_the_plain_models_gradients():
    assert run_distributed(mixture, 4) == [0] * 4


def pipelined(rank, world, expert_ranks):
    start(2)
    tpc.build_moe_groups(moe_ep_size=expert_ranks)
    mine, replicas = tpc.get_dp_rank(), tpc.get_dp_size()
    torch.manual_seed(0)
    layers = nn.Sequential(Model(), Model()).double()
    plain = layers[tpc.get_pp_rank()]
    for schedule in ("1f1b", "zb-h1"):
        model = spread(plain, op="avg")
        for iteration, m in enumerate((4, 1, 3)):
            x = batch(iteration, replicas)
            y = x.flip(2)
            layers.zero_grad()
            model.zero_grad()

            def fwd_fn(a, model=model):
                return mse(model(a[0]), a[1]) if tpc.is_last_in_pipeline_group() else model(a)

            inputs = own_inputs(x[mine], y[mine])
            with torch.profiler.profile() as profile:
                forward_backward(fwd_fn=fwd_fn, inputs=inputs, num_microbatches=m, schedule=schedule)
                moe_dp_iter_step()
                model.reduce_gradients()
            plain_step(layers, x, y, m)
            check(model.module, plain, float(expert_ranks))
            assert sum(event.name == "c10d::allreduce_" for event in profile.events()) == 2
        del model
        gc.collect()


@pytest.mark.parametrize(("world", "expert_ranks"), [(4, 1), (8, 2)])
def test_a_pipelined_step_reduces_experts_once(world, expert_ranks):
    run_distributed(pipelined, world, expert_ranks)


class Shares(nn.Module):
    """Both chunks of a rank hold the same expert."""

    def __init__(self, expert):
        super().__init__()
        self.own, self.expert = nn.Linear(WIDTH, WIDTH), expert

    def forward(self, x):
        return self.expert(self.own(x))


def chunks(rank, world):
    start(1)
    tpc.build_moe_groups(moe_ep_size=1)
    torch.manual_seed(0)
    expert = nn.Linear(WIDTH, WIDTH)
    stages = [Shares(expert), Shares(expert)]
    plain = copy.deepcopy(nn.ModuleList(stages))
    for stage in stages:
        stage._ddp_params_and_buffers_to_ignore = ["expert.weight", "expert.bias"]
    wrapped = [NaiveDDP(stage) for stage in stages]
    hooks = MoEDP(expert.parameters(), gradient_as_bucket_view=True)
    x = torch.randn(2, 6, WIDTH)
    for schedule in ("interleaved-1f1b", "zb-v"):
        for owner in (plain, expert, *stages):
            owner.zero_grad()
        functions = [wrapped[0], lambda a: wrapped[1](a).square().mean()]
        with hooks.no_sync():
            forward_backward(fwd_fn=functions, inputs=[x[rank], None], num_microbatches=3, schedule=schedule)
        forward_backward(fwd_fn=functions, inputs=[x[rank], None], num_microbatches=3, schedule=schedule)
        (2 * plain[1](plain[0](x)).square().mean()).backward()
        for p, q in zip(nn.ModuleList(stages).parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_an_expert_of_two_chunks():
    run_distributed(chunks, 2)


def lives(rank, world):
    setup_distributed(backend="gloo")
    experts = nn.Linear(3, 3)
    with pytest.raises(TopologyError, match="set up"):
        create_moe_dp_hooks(experts.parameters())
    tpc.setup_process_groups([("data", 2)])
    with pytest.raises(TopologyError, match="build_moe_groups"):
        create_moe_dp_hooks(experts.parameters())
    tpc.build_moe_groups(moe_dp_size=2)
    experts.weight.data.fill_(rank)
    create_moe_dp_hooks(experts.named_parameters(), moe_dp_rank0=1)
    assert experts.weight[0, 0] == 1
    kept = weakref.ref(_in_order()[0])
    created = create_moe_dp_hooks(list(experts.parameters()))
    assert _in_order() == [created]
    assert list(created.expert_params) == ["0", "1"]
    assert kept() is None
    experts(torch.full((2, 3), float(rank))).sum().backward()
    moe_dp_iter_step()
    assert experts.weight.grad.tolist() == [[1.0] * 3] * 3
    with pytest.raises(PipelineError, match="must be nn.Parameters, got a Tensor"):
        create_moe_dp_hooks([torch.ones(2)])
    with pytest.raises(PipelineError, match="a single tensor"):
        create_moe_dp_hooks(experts.weight)
    with pytest.raises(PipelineError, match="there are no parameters"):
        create_moe_dp_hooks({})
    del created
    assert len(_in_order()) == 1  # its parameters live
    del experts
    assert _in_order() == []


def test_they_live_as_long_as_their_parameters():
    run_distributed(lives, 2)
