"""Experts that ranks share out: every one is in the norm, on all ranks, and nothing mixes different ones."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import mse, own_inputs, start
from mixture_of_experts import EXPERTS, WIDTH, Model, batch, plain_step, spread
from torch import nn

from torchdistpackage import (
    DDP,
    Bf16ZeroOptimizer,
    Checkpointer,
    CheckpointError,
    MoEDP,
    NaiveDDP,
    PipelineError,
    ShardedEMA,
    clip_grad_norm_,
    create_moe_dp_hooks,
    forward_backward,
    tpc,
)


def pipelined(rank, world, expert_ranks, sharded):
    """The norm of a pipelined step, and the weights after three, against the plain loop."""
    start(2)
    tpc.build_moe_groups(moe_ep_size=expert_ranks)
    mine, replicas = tpc.get_dp_rank(), tpc.get_dp_size()
    torch.manual_seed(0)
    layers = nn.Sequential(Model(), Model()).double()
    model = spread(layers[tpc.get_pp_rank()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if sharded:  # gradients of all parameters are equal on the ranks that hold the same experts
        optimizer = Bf16ZeroOptimizer(optimizer, dp_group=tpc.get_group("moe_dp"))
    plain = torch.optim.AdamW(layers.parameters(), lr=0.01)
    for iteration, norm_type in enumerate((2.0, 1.0, math.inf)):
        x = batch(iteration, replicas)
        y = x.flip(2)
        plain.zero_grad()
        plain_step(layers, x, y, 4)

        def fwd_fn(a):
            return mse(model(a[0]), a[1]) / replicas if tpc.is_last_in_pipeline_group() else model(a)

        forward_backward(optimizer, fwd_fn, None, own_inputs(x[mine], y[mine]), num_microbatches=4)
        norm = clip_grad_norm_(model.parameters(), 0.01, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(layers.parameters(), 0.01, norm_type)
        assert torch.allclose(norm, expected, rtol=1e-12)
        optimizer.step()
        plain.step()
    first = tpc.get_group_rank("moe_ep") * EXPERTS // expert_ranks
    for name, p in model.module.named_parameters():
        words = name.split(".")
        if "experts" in words:
            words[2] = str(first + int(words[2]))
        assert torch.allclose(p, layers[tpc.get_pp_rank()].get_parameter(".".join(words)), atol=1e-12), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("world", "expert_ranks"), [(4, 1), (4, 2), (8, 2)])
def test_a_clipped_step_is_that_of_the_plain_model(world, expert_ranks, sharded):
    run_distributed(pipelined, world, expert_ranks, sharded)


def refused(rank, world):
    start(1)
    tpc.build_moe_groups(moe_ep_size=2)
    experts = nn.Linear(WIDTH, WIDTH)
    early = Bf16ZeroOptimizer(torch.optim.SGD(experts.parameters(), lr=1.0))
    with pytest.raises(PipelineError, match=r"(?s)Bf16ZeroOptimizer holds experts: parameter 0.*moe_dp"):
        create_moe_dp_hooks(experts.parameters())
    del early
    create_moe_dp_hooks(experts.parameters())
    alike = tpc.get_ranks_in_group("moe_dp")
    with pytest.raises(PipelineError, match=rf"shape \(6, 6\), is of experts that ranks \[{alike[0]}, {alike[1]}\]"):
        Bf16ZeroOptimizer(torch.optim.SGD(experts.parameters(), lr=1.0))
    with pytest.raises(CheckpointError, match=r"(?s)ShardedEMA: parameter 0.*ranks \[0, 1, 2, 3\] would be taken"):
        ShardedEMA(experts)
    assert ShardedEMA(experts, group=tpc.get_group("moe_dp")).num_updates == 0
    MoEDP(experts.parameters(), process_group=dist.group.WORLD)  # everybody has the same ones after all
    assert ShardedEMA(experts).num_updates == 0


def test_different_experts_are_not_shared_out():
    run_distributed(refused, 4)


def run_once(wrapper, experts_first):
    model = nn.Linear(WIDTH, WIDTH)
    if experts_first:
        create_moe_dp_hooks(model.named_parameters())
        before = model.weight.tolist()
        try:
            wrapper(model)
        finally:
            assert model.weight.tolist() == before  # nothing is lost
        pytest.fail("the wrapper took them")
    around = wrapper(model)
    create_moe_dp_hooks(model.named_parameters())
    forward_backward(None, lambda x: around(x).sum(), None, torch.ones(2, WIDTH), num_microbatches=2)


def wrapped(rank, world):
    """No wrapper averages experts that nobody has taken out of it, whichever comes first."""
    start(1)
    for size in (2, 4):  # with 4, experts have no replica: nothing of theirs is reduced anywhere
        tpc.build_moe_groups(moe_ep_size=size)
        for wrapper in (DDP, NaiveDDP):
            for experts_first in (False, True):
                with pytest.raises(PipelineError, match="_ddp_params_and_buffers_to_ignore before it is wrapped"):
                    run_once(wrapper, experts_first)


def test_no_wrapper_averages_different_experts():
    run_distributed(wrapped, 4)


def numbered_by_rank(rank, world, folder):
    """Experts that nobody is told to leave alone, since only the layers around them are wrapped."""
    start(1)
    tpc.build_moe_groups(moe_ep_size=2)
    model = nn.ModuleDict({"gate": nn.Linear(WIDTH, 2), "experts": nn.ModuleList([nn.Linear(WIDTH, WIDTH)])})
    model["gate"] = NaiveDDP(model["gate"])
    create_moe_dp_hooks(model["experts"].named_parameters())
    with pytest.raises(CheckpointError, match="Name experts by their number in the whole model"):
        Checkpointer(folder, model).save(1)


def test_a_checkpoint_knows_the_experts_of_hooks(tmp_path):
    run_distributed(numbered_by_rank, 4, str(tmp_path))


def some_without(rank, world):
    """Three experts on four ranks: the last one has none, and has part in the norm."""
    start(1)
    tpc.build_moe_groups(moe_ep_size=world)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.full((1, 1), 1.0)
    parameters = [layer.weight]
    if rank < 3:
        experts = nn.Linear(1, 1, bias=False)
        create_moe_dp_hooks(experts.parameters())
        experts.weight.grad = torch.full((1, 1), 1.0)
        parameters += experts.parameters()
    assert clip_grad_norm_(parameters, 10.0).item() == 2.0


def test_a_rank_without_experts_takes_part_in_the_norm():
    run_distributed(some_without, 4)


def alone(rank, world):
    """Every rank has experts of its own: nothing to reduce, all the more to add up."""
    start(1)
    tpc.build_moe_groups(moe_ep_size=world)
    experts = nn.Linear(1, 1, bias=False)
    create_moe_dp_hooks(experts.parameters())
    experts.weight.grad = torch.full((1, 1), 3.0 + rank)
    assert clip_grad_norm_(experts.parameters(), 10.0).item() == 5.0
    assert clip_grad_norm_(experts.parameters(), 10.0, math.inf).item() == 4.0
    tpc.reset()
    tpc.setup_process_groups([("data", world)])
    assert clip_grad_norm_([nn.Parameter(torch.ones(1)), *experts.parameters()], 10.0).item() == 5.0


def test_experts_without_a_replica_count():
    run_distributed(alone, 2)
