"""Sharded optimizers around pipelines: data x pipe equals the plain loop, with clipping, ties and loss scaling."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import loss_step, make_layers, mse, own_inputs, start
from test_chunks import Chunks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchdistpackage import (
    DDP,
    PipelineError,
    PipelineGradScaler,
    clip_grad_norm_,
    flatten_sequence,
    forward_backward,
    partition_uniform,
    setup_distributed,
    setup_node_groups,
    tpc,
)
from torchdistpackage.parallel.zero import Bf16ZeroOptimizer

adamw = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def tied_layers():
    """Eight layers; the first and the last share a weight, the third is frozen."""
    layers = make_layers(8)
    layers[7][0].weight = layers[0][0].weight
    layers[2].requires_grad_(False)
    return layers


def plain_loop(reference, batches, d):
    """The mean over the replicas of what each accumulates."""
    for x, y in batches:
        for j in range(d):
            (mse(reference(x[j]), y[j]) / d).backward()


def schedules(rank, world, names, options, own_clip):
    start(pipe=2)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    for schedule in names:
        layers = tied_layers()
        reference = copy.deepcopy(layers)
        partner = {id(p): q for p, q in zip(layers.parameters(), reference.parameters(), strict=True)}
        chunks = Chunks(flatten_sequence(layers, 0), schedule)
        own = list(dict.fromkeys(chunks.parameters()))
        plain, optimizer = adamw(reference.parameters()), Bf16ZeroOptimizer(adamw(own), **options)
        for _ in range(3):
            optimizer.zero_grad()
            plain.zero_grad()
            batches = [(torch.randn(d, 5, 6).double(), torch.randn(d, 5, 6).double()) for _ in range(2)]
            for x, y in batches:
                chunks.step(x[r], y[r], 4)
            plain_loop(reference, batches, d)
            norm = optimizer.clip_grad_norm_(0.1) if own_clip else clip_grad_norm_(own, 0.1)
            assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1)), schedule
            if options.get("stage") == 1:
                assert all(p.grad is None or torch.allclose(p.grad, partner[id(p)].grad) for p in own)
            optimizer.step()
            plain.step()
            assert all(torch.allclose(p, partner[id(p)]) for p in own), schedule


@pytest.mark.parametrize(
    ("options", "own_clip"),
    [({}, True), ({"stage": 1}, False), ({"overlap_comm": True, "bucket_size": 50}, False)],
    ids=str,
)
def test_every_schedule_equals_the_plain_loop(options, own_clip):
    run_distributed(schedules, 4, ["1f1b", "interleaved-1f1b", "zb-v"], options, own_clip, timeout=120)


def reductions(rank, world, options):
    start(pipe=1)
    stage = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Bf16ZeroOptimizer(momentum(stage.parameters()), **options)
    with torch.profiler.profile() as profile:
        for _ in range(2):
            forward_backward(None, lambda x: stage(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
        clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
    return sum(event.name == "c10d::_reduce_scatter_base_" for event in profile.events())


@pytest.mark.parametrize("options", [{}, {"overlap_comm": True}], ids=str)
def test_one_reduction_a_step(options):
    assert run_distributed(reductions, 2, options) == [1, 1]


def norms(rank, world):
    """Beside a parameter that nobody shards; a part of the parameters; other orders; not finite."""
    start(pipe=2)
    torch.manual_seed(tpc.get_pp_rank())
    stage, extra = nn.Linear(3, 3), nn.Linear(3, 3)
    reference = copy.deepcopy([stage, extra])
    optimizer = Bf16ZeroOptimizer(momentum(stage.parameters()))
    parameters = [*stage.parameters(), *extra.parameters()]
    plain = [p for module in reference for p in module.parameters()]
    for order in (2.0, 1.0, 3.0, float("inf")):
        for p, q in zip(parameters, plain, strict=True):
            p.grad = torch.full_like(p, 2.0)
            q.grad = p.grad.clone()
        mine = nn.utils.get_total_norm([q.grad for q in plain], order)
        expected = mine if order == float("inf") else mine * 2 ** (1 / order)  # two stages
        assert torch.allclose(clip_grad_norm_(parameters, 1.0, order), expected)
        left = clip_grad_norm_(parameters, 1e9, order)
        assert torch.allclose(left, torch.ones(()), atol=1e-5)
        bias = clip_grad_norm_([stage.bias], 1e9, float("inf"))
        assert torch.allclose(bias, extra.bias.grad.amax())
        optimizer.zero_grad()
    if rank == 3:
        stage.weight.grad = torch.full_like(stage.weight, float("nan"))
    with pytest.raises(RuntimeError, match="on every rank"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    del optimizer  # then the gradients are in the parameters again
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert torch.allclose(clip_grad_norm_(parameters, 1e9), torch.tensor(48.0).sqrt())


def test_norms():
    run_distributed(norms, 4)


def scaled(rank, world, dtype, set_up):
    """One rank overflows in the second step: all skip it, and train what a plain loop with torch's scaler does."""
    if set_up:
        start(pipe=1)
    else:
        setup_distributed(backend="gloo")
        torch.manual_seed(0)
    reference = nn.Linear(5, 3, bias=False).to(dtype)
    model = copy.deepcopy(reference)
    master = reference.weight.detach().float().requires_grad_()
    plain, optimizer = momentum([master]), Bf16ZeroOptimizer(momentum(model.parameters()))
    scaler, plain_scaler = PipelineGradScaler("cpu", init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        x = torch.randn(world, 4, 5).to(dtype)
        if step == 1:
            x[-1] = float("inf")
        for one in (reference, model):
            one.zero_grad()
        optimizer.zero_grad()
        for j in range(world):
            (plain_scaler.scale(reference(x[j]).float().mean()) / world).backward()
        scaler.scale(model(x[rank]).float().mean()).backward()
        master.grad = reference.weight.grad.float()
        plain_scaler.unscale_(plain)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([master], 0.1)
        optimizer.clip_grad_norm_(0.1)
        for one, by in ((scaler, optimizer), (plain_scaler, plain)):
            one.step(by)
            one.update()
        reference.weight.data.copy_(master)
        assert torch.allclose(model.weight, reference.weight, atol=1e-3 if dtype is torch.float16 else 1e-6)
        assert scaler.state_dict() == plain_scaler.state_dict()


@pytest.mark.parametrize("set_up", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_loss_scaling(dtype, set_up):
    run_distributed(scaled, 2, dtype, set_up)


def wrapped(rank, world):
    """Averaged over the whole data group by DistributedDataParallel, sharded over a node."""
    start(pipe=1)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = make_layers()
    stage = copy.deepcopy(reference)
    model = DDP(stage)
    plain, optimizer = adamw(reference.parameters()), Bf16ZeroOptimizer(adamw(stage.parameters()), setup_node_groups(2))
    for _ in range(3):
        x, y = torch.randn(d, 5, 6).double(), torch.randn(d, 5, 6).double()
        plain.zero_grad()
        plain_loop(reference, [(x, y)], d)
        forward_backward(optimizer, loss_step(model), None, own_inputs(x[r], y[r]), num_microbatches=2)
        optimizer.step()
        plain.step()
        assert all(map(torch.allclose, stage.parameters(), reference.parameters()))


def test_around_data_parallel_wrappers():
    run_distributed(wrapped, 4)


def tensor_parallel(rank, world):
    """DTensors over the tensor group, sharded over the data group."""
    start(pipe=1, config=[("data", 2), ("tensor", 2)])
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    model = parallelize_module(
        copy.deepcopy(reference), tpc.mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    plain, optimizer = momentum(reference.parameters()), Bf16ZeroOptimizer(momentum(model.parameters()))
    for _ in range(3):
        x = torch.randn(d, 4, 6)
        plain.zero_grad()
        optimizer.zero_grad()
        for j in range(d):
            (reference(x[j]).square().mean() / d).backward()
        model(x[r]).square().mean().backward()
        norm = optimizer.clip_grad_norm_(0.1)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        optimizer.step()
        plain.step()
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        assert all(torch.allclose(p.full_tensor(), q, atol=1e-6) for p, q in pairs)
    fully = fully_shard(nn.Linear(4, 4), mesh=tpc.mesh["data"])
    with pytest.raises(PipelineError, match="sharded already"):
        Bf16ZeroOptimizer(adamw(fully.parameters()))


def test_tensor_parallel_parameters():
    run_distributed(tensor_parallel, 4)


def failing(rank, world):
    """A rank that fails in a collective of the optimizer is named on the others, and nobody hangs."""
    start(pipe=1)
    model = nn.Linear(4, 4)
    optimizer = Bf16ZeroOptimizer(momentum(model.parameters()))
    model(torch.ones(4)).sum().backward()
    if rank == 1:
        optimizer.optim.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises((ZeroDivisionError, PipelineError), match="division by zero"):
        optimizer.step()
    assert dist.get_rank() == rank


def test_a_failure_is_known_to_all():
    run_distributed(failing, 2)


def stale(rank, world, options):
    start(pipe=1)
    model = nn.Linear(4, 4)
    optimizer = Bf16ZeroOptimizer(momentum(model.parameters()), **options)

    def step():
        model.zero_grad()
        model(torch.ones(4)).sum().backward()
        optimizer.step()

    step()
    if options.get("stage") == 1:
        return step()
    with pytest.raises(PipelineError, match="without optimizer.zero_grad"):
        step()


@pytest.mark.parametrize("options", [{}, {"overlap_comm": True}, {"stage": 1}], ids=str)
def test_the_models_zero_grad_is_not_enough_for_shards(options):
    run_distributed(stale, 2, options)


def half_of_a_stage(rank, world):
    """A stage without parameters has an optimizer without parameters."""
    start(pipe=2)
    reference = make_layers(2)
    stage = nn.Sequential(*partition_uniform(list(reference))) if tpc.is_first_in_pipeline_group() else nn.Tanh()
    parameters = list(stage.parameters())
    optimizer = Bf16ZeroOptimizer(momentum(parameters or [{"params": []}]))
    x, y = torch.randn(2, 4, 6).double(), torch.randn(2, 4, 6).double()
    j = tpc.get_dp_rank()
    forward_backward(optimizer, loss_step(stage), None, own_inputs(x[j], y[j]), num_microbatches=2)
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert ("state" in optimizer.state_dict()) == (j == 0)
    return norm.item()


def test_stages_without_parameters():
    found = run_distributed(half_of_a_stage, 4)
    assert found[0] > 0
    assert found == pytest.approx([found[0]] * 4)
