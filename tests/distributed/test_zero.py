"""Sharded optimizers over gloo: they train what the plain optimizer trains, with 1/d of its state on each rank."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import mse, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage import PipelineError, TopologyError, setup_distributed, setup_node_groups, tpc
from torchdistpackage.parallel.zero import Bf16ZeroOptimizer

adamw = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
rmsprop = functools.partial(torch.optim.RMSprop, lr=0.01)
adafactor = functools.partial(torch.optim.Adafactor, lr=0.01) if hasattr(torch.optim, "Adafactor") else None


class Net(nn.Module):
    """Odd sizes, a scalar, an empty, a frozen and two unused parameters, and one that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.turned = nn.Parameter(torch.randn(3, 5).t())

    def forward(self, x):
        return self.frozen(self.second(self.first(x).tanh())) @ self.turned * self.scale


def data(d, rows=4, steps=1):
    return [(torch.randn(d, rows, 6), torch.randn(d, rows, 3)) for _ in range(steps)]


def plain_gradients(model, batches, d):
    """What data parallelism averages: each replica's sum over its backwards, scaled, then added."""
    replicas = []
    for r in range(d):
        model.zero_grad()
        for x, y in batches:
            mse(model(x[r]).float(), y[r]).backward()
        replicas.append([p.grad for p in model.parameters()])
    for p, *grads in zip(model.parameters(), *replicas, strict=True):
        there = [g * (1 / d) for g in grads if g is not None]
        p.grad = sum(there[1:], start=there[0]) if there else None


def own_gradients(model, optimizer, batches, r):
    optimizer.zero_grad()
    for x, y in batches:
        mse(model(x[r]).float(), y[r]).backward()


def same_weights(model, reference, exactly):
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    equal = torch.equal if exactly else functools.partial(torch.allclose, rtol=1e-4, atol=1e-6)
    return all(equal(p, q) for p, q in pairs)


def training(rank, world, make, options, backwards):
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = Net()
    model = copy.deepcopy(reference)
    plain, optimizer = make(reference.parameters()), Bf16ZeroOptimizer(make(model.parameters()), **options)
    exactly = world <= 2 and not (options.get("overlap_comm") and backwards > 1)
    for step in range(5):
        batches = data(world, steps=backwards)
        plain_gradients(reference, batches, world)
        own_gradients(model, optimizer, batches, rank)
        if step % 2:
            optimizer.reduce_gradients()
        kept = [p.grad is not None for p in model.parameters()]
        assert not any(kept[:4]) if options.get("stage") != 1 and step % 2 else kept[0] or options.get("overlap_comm")
        assert optimizer.step() is None
        plain.step()
        assert same_weights(model, reference, exactly)
    if options.get("stage") == 1:
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad is q.grad is None or torch.allclose(p.grad, q.grad)
    return optimizer.memory_report()


@pytest.mark.parametrize(
    ("world", "make", "options", "backwards"),
    [
        pytest.param(2, adamw, {}, 1, id="stage-2"),
        pytest.param(2, adamw, {"stage": 1}, 3, id="stage-1-accumulated"),
        pytest.param(2, momentum, {"bucket_size": 10}, 3, id="cut-parameters-accumulated"),
        pytest.param(2, rmsprop, {"bucketize": False}, 1, id="one-parameter-a-bucket"),
        pytest.param(2, adamw, {"overlap_comm": True, "bucket_size": 20}, 1, id="overlapped"),
        pytest.param(2, momentum, {"overlap_comm": True, "bucket_size": 20}, 3, id="overlapped-accumulated"),
        pytest.param(2, momentum, {"overlap_comm": True, "bucket_size": 20, "stage": 1}, 2, id="overlapped-stage-1"),
        pytest.param(2, adamw, {"partition": "parameters", "bucket_size": 40}, 2, id="whole-parameters"),
        pytest.param(2, adafactor, {"partition": "parameters"}, 1, id="adafactor"),
        pytest.param(3, momentum, {"bucket_size": 30}, 2, id="three-ranks"),
        pytest.param(
            3, adamw, {"partition": "parameters", "overlap_comm": True, "bucket_size": 9}, 1, id="three-whole"
        ),
        pytest.param(1, adamw, {}, 2, id="one-rank"),
    ],
)
def test_trains_as_the_plain_optimizer(world, make, options, backwards):
    if make is None:
        pytest.skip("this torch has no Adafactor")
    run_distributed(training, world, make, options, backwards)


def master_weights(rank, world, dtype, overlap):
    """bfloat16 with float32 masters, beside a loop that keeps them by hand."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = Net().to(dtype)
    model = copy.deepcopy(reference)
    masters = [p.detach().float().requires_grad_() for p in reference.parameters()]
    plain = adamw(masters)
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), overlap_comm=overlap, bucket_size=25)
    for _ in range(6):
        batches = [(x.to(dtype), y) for x, y in data(world)]
        plain_gradients(reference, batches, world)
        for master, p in zip(masters, reference.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        plain.step()
        for master, p in zip(masters, reference.parameters(), strict=True):
            p.data.copy_(master)
        own_gradients(model, optimizer, batches, rank)
        optimizer.step()
        assert same_weights(model, reference, exactly=True)
    whole = optimizer.state_dict(to="all")["master_weights"]
    assert all(torch.equal(whole[number], masters[number]) for number in whole)
    return optimizer.memory_report()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_master_weights_equal_a_loop_by_hand(dtype, overlap):
    run_distributed(master_weights, 2, dtype, overlap)


def written_by_others(rank, world):
    """Weights that are loaded after the optimizer was made are what it trains; memory that is replaced, too."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    model, other = nn.Linear(5, 3).bfloat16(), nn.Linear(5, 3).bfloat16()
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    model.load_state_dict(other.state_dict())
    model(torch.ones(1, 5).bfloat16()).sum().backward()
    optimizer.step()
    assert same_weights(model, other, exactly=True)
    single, fresh = nn.Linear(5, 3), nn.Linear(5, 3)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(single.parameters(), lr=1.0))
    for p, q in zip(single.parameters(), fresh.parameters(), strict=True):
        p.data = q.data.clone()
    for module in (single, fresh):
        module(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    torch.optim.SGD(fresh.parameters(), lr=1.0).step()
    assert same_weights(single, fresh, exactly=True)


def test_what_others_write_is_taken_over():
    run_distributed(written_by_others, 2)


def some_ranks_only(rank, world, options):
    """A gradient that one rank has counts as the average with zeros; one that nobody has is none: no decay."""
    setup_distributed(backend="gloo")
    layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    for p in layers.parameters():
        p.data.fill_(1.0)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layers.parameters(), lr=1.0, weight_decay=0.5), **options)
    for _ in range(2):
        optimizer.zero_grad()
        (layers[0](torch.ones(2)).sum() + (layers[1](torch.ones(2)).sum() if rank else 0.0)).backward()
        optimizer.step()
    found = [layer.bias[0].item() for layer in layers]
    assert found == [1.0 - 1.5 - 0.75, 1.0 - 1.0 - 0.5, 1.0]
    optimizer.zero_grad()
    assert optimizer.step() is None  # nobody has any
    assert [layer.bias[0].item() for layer in layers] == found


@pytest.mark.parametrize("options", [{}, {"stage": 1}, {"overlap_comm": True, "bucket_size": 4}, {"bucketize": False}])
def test_parameters_that_some_ranks_do_not_use(options):
    run_distributed(some_ranks_only, 2, options)


def frozen_for_a_while(rank, world, options):
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model = copy.deepcopy(reference)
    plain = adamw([*reference[0].parameters()])
    optimizer = Bf16ZeroOptimizer(adamw([*model[0].parameters()]), **options)
    plain.add_param_group({"params": list(reference[1].parameters()), "lr": 0.1})
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.1})
    for step in range(6):
        for one in (reference, model):
            one[0].weight.requires_grad_(step % 3 > 0)
        batches = data(world)
        plain_gradients(reference, batches, world)
        own_gradients(model, optimizer, batches, rank)
        plain.step()
        optimizer.step()
        assert same_weights(model, reference, exactly=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]


@pytest.mark.parametrize("options", [{}, {"overlap_comm": True}, {"stage": 1, "bucket_size": 7}])
def test_parameters_and_groups_that_come_later(options):
    run_distributed(frozen_for_a_while, 2, options)


def middle_of_the_world(rank, world):
    """Ranks 2 and 3 share; their indices in the group are not their global ranks."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    group = setup_node_groups(2)
    reference = Net()
    for partition in ("elements", "parameters"):
        model, plain_model = copy.deepcopy(reference), copy.deepcopy(reference)
        plain = adamw(plain_model.parameters())
        optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), group, partition=partition, bucket_size=30)
        for _ in range(3):
            batches = data(world)
            pair = [(x[rank // 2 * 2 :][:2], y[rank // 2 * 2 :][:2]) for x, y in batches]
            plain_gradients(plain_model, pair, 2)
            own_gradients(model, optimizer, batches, rank)
            plain.step()
            optimizer.step()
            assert same_weights(model, plain_model, exactly=True)
        assert ("state" in optimizer.state_dict()) == (rank % 2 == 0)
    other = dist.new_group([2, 3])
    if rank < 2:
        with pytest.raises(TopologyError, match=f"global rank {rank} is not in the dp_group"):
            Bf16ZeroOptimizer(adamw(reference.parameters()), other)


def test_a_group_in_the_middle_of_the_world():
    run_distributed(middle_of_the_world, 4)


def replicas_of_shards(rank, world):
    """Shards inside of a node, gradients over all: the same as over the whole data group."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = Net()
    model = copy.deepcopy(reference)
    plain = adamw(reference.parameters())
    across = [dist.new_group([i, i + 2]) for i in range(2)][rank % 2]
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), setup_node_groups(2), replica_group=across)
    for _ in range(3):
        batches = data(world)
        plain_gradients(reference, batches, world)
        own_gradients(model, optimizer, batches, rank)
        norm = optimizer.clip_grad_norm_(0.1)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        plain.step()
        optimizer.step()
        assert same_weights(model, reference, exactly=False)


def test_shards_in_nodes_and_replicas_across():
    run_distributed(replicas_of_shards, 4)


def counted(rank, world, options):
    setup_distributed(backend="gloo")
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30)).to(torch.bfloat16)
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), **options)
    mse(model(torch.randn(3, 50).bfloat16()), torch.zeros(3, 30).bfloat16()).backward()
    optimizer.step()
    report = optimizer.memory_report()
    assert "MiB" in str(report)
    assert report.total == report.parameters + report.gradients + report.master + report.state
    return report


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_fall_with_the_number_of_ranks(world):
    numel, padding = 50 * 40 + 40 + 40 * 30 + 30, 4 * 8
    for report in run_distributed(counted, world, {}):
        assert report.parameters == 2 * numel
        for found, size in ((report.gradients, 4), (report.master, 4), (report.state, 8)):
            assert abs(found - size * numel / world) <= padding * size
    report = run_distributed(counted, world, {"bf16_master_weights": True, "stage": 1})[0]
    assert report.master == 0
    assert abs(report.gradients - 2 * numel - 2 * numel / world) <= padding * 2


class Mixed(nn.Module):
    """Two dtypes in one group, and a layer that is computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7).bfloat16(), nn.Linear(7, 7)
        self.last, self.reentrant = nn.Linear(7, 3), reentrant

    def forward(self, x):
        hidden = self.first(x.bfloat16()).float()
        if self.reentrant:
            hidden = checkpoint(self.second, hidden, use_reentrant=True)
        else:
            hidden = self.second(hidden)
        return self.last(self.second(hidden))


def mixed(rank, world, options, set_to_none):
    """Against the same with stage 1 on one rank, which has seen both batches."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = Mixed(reentrant=False)
    model = copy.deepcopy(reference)
    model.reentrant = options.get("overlap_comm", False)
    alone = dist.new_group([rank], use_local_synchronization=True)
    plain = Bf16ZeroOptimizer(momentum(reference.parameters()), alone, stage=1)
    optimizer = Bf16ZeroOptimizer(momentum(model.parameters()), **options)
    for step in range(4):
        plain.zero_grad(set_to_none)
        optimizer.zero_grad(set_to_none)
        if step != 2:  # then there is no gradient, or one that is zero
            for number in range(2):
                x, y = data(world)[0]
                for j in range(world):
                    (mse(reference(x[j]), y[j]) / world).backward()
                with optimizer.no_sync() if number == 0 else contextlib.nullcontext():
                    mse(model(x[rank]), y[rank]).backward()
        optimizer.step()
        plain.step()
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        assert all(torch.allclose(p.float(), q.float(), atol=1e-2, rtol=1e-2) for p, q in pairs), step


@pytest.mark.parametrize("options", [{}, {"overlap_comm": True, "bucket_size": 40}, {"reduce_dtype": torch.float32}])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_mixed_dtypes(options, set_to_none):
    run_distributed(mixed, 2, options, set_to_none)


def tiny(rank, world):
    """One parameter of three elements for eight ranks."""
    start(pipe=1)
    model = nn.Linear(3, 1, bias=False)
    optimizer = Bf16ZeroOptimizer(momentum(model.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: (model(torch.ones(3)).sum() * (rank + 1)).backward() or 7.0)
        scheduler.step()
        assert loss == 7.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert tpc.get_dp_size() == world
    return model.weight.tolist()


def test_fewer_elements_than_ranks():
    found = run_distributed(tiny, 8)
    assert all(one == found[0] for one in found)


def unlike_ranks(rank, world):
    dist.init_process_group("gloo")
    torch.manual_seed(rank)
    model, later = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer.add_param_group({"params": list(later.parameters())})
    of_this_rank = later.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    later(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(later.weight, of_this_rank)  # no mixture of what the ranks had
    with pytest.raises(PipelineError, match="replicas of a Bf16ZeroOptimizer have different trainable parameters"):
        Bf16ZeroOptimizer(torch.optim.SGD(nn.Linear(4, 4 + rank).parameters(), lr=0.1))
    with pytest.raises(PipelineError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(PipelineError, match="is on the meta device"):
        Bf16ZeroOptimizer(torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters(), lr=0.1))
    with pytest.raises(TopologyError, match="dp_group is a str"):
        Bf16ZeroOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "data")
    return model.weight.detach(), later.weight.detach()


def test_ranks_start_alike():
    first, second = run_distributed(unlike_ranks, 2)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
