"""The sharded average is, bit by bit, the unsharded one: for any number of ranks, dtype, wrapper and way to shard."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import make_layers, start
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage import (
    DDP,
    CheckpointError,
    PipelineError,
    TopologyError,
    flatten_model,
    load_whole_model_state_dict,
    partition_uniform,
    tpc,
    whole_model_state_dict,
)
from torchdistpackage.parallel.ema import ShardedEMA
from torchdistpackage.parallel.ema_exchange import Exchange, Stream
from torchdistpackage.parallel.ema_layout import Entry, Layout


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class SmallResNet(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.body = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@torch.no_grad()
def random_step(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


@torch.no_grad()
def plain_update(ema, model, decay):
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.mul_(decay).add_(parameter, alpha=1 - decay)


def same_bits(state, other):
    assert list(state) == list(other)
    for name, tensor in other.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
        assert state[name].stride() == tensor.stride(), name


def hundred_updates(rank, world):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = SmallResNet()
    average = copy.deepcopy(model)
    ema = ShardedEMA(model)
    first = ema.state_dict_cpu()  # has the buffers already
    if rank == 0:
        same_bits(first, model.state_dict())
    for _ in range(100):
        random_step(model)
        model(torch.randn(2, 3, 8, 8))  # moves the statistics
        plain_update(average, model, 0.999)
        ema.update(model, decay=0.999)
    ema.verify_with_gt(average if rank == 0 else model)
    average.load_state_dict(dict(model.named_buffers()), strict=False)
    for _ in range(2):
        state = ema.state_dict_cpu()
        if rank == 0:
            same_bits(state, average.state_dict())
        else:
            assert state == {}
    return ema.num_updates


@pytest.mark.parametrize("world", [1, 2, 4])
def test_100_updates_of_a_resnet_are_those_of_the_unsharded_average(world):
    assert run_distributed(hundred_updates, world) == [100] * world


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def every_dtype(rank, world):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    shapes = [(1001,), (37, 53), (1,), (), (0, 3), (64, 33)]
    model = nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes for dtype in DTYPES])
    model.append(nn.Parameter(torch.randn(8, 6, 5, 5).bfloat16().to(memory_format=torch.channels_last)))
    model.append(nn.Parameter(torch.randn(40, 30).half().T))
    model.append(nn.Parameter(torch.randn(7, 1).expand(7, 9)))
    average, wide = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in wide.parameters():
        parameter.data = parameter.float() if parameter.is_floating_point() else parameter.data
    ema, wide_ema = ShardedEMA(model), ShardedEMA(model, dtype=torch.float32)
    for _ in range(20):
        for parameter in list(model)[:-1]:
            parameter.data.add_(torch.randn_like(parameter))
        plain_update(average, model, 0.9)
        plain_update(wide, model, 0.9)
        ema.update(model, 0.9)
        wide_ema.update(model, 0.9)
    ema.verify_with_gt(average)
    wide_ema.verify_with_gt(wide)
    target = copy.deepcopy(model)
    ema.copy_to(target)
    same_bits(dict(target.named_parameters()), dict(average.named_parameters()))
    wide_ema.copy_to(target)
    assert all(torch.equal(p, q.to(p.dtype)) for p, q in zip(target, wide, strict=True))


@pytest.mark.parametrize("world", [1, 3])
def test_every_dtype_and_order_in_memory(world):
    run_distributed(every_dtype, world)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 3))
def test_every_element_has_one_owner_and_shares_are_equal(sizes, ranks, wide):
    dtypes = [torch.float64 if number < wide else torch.float32 for number in range(len(sizes))]
    entries = [Entry((str(n),), (k,), d, (0,), True) for n, (k, d) in enumerate(zip(sizes, dtypes, strict=True))]
    layout = Layout(entries, ranks, {})
    owned = [[0] * size for size in sizes]
    for one in [one for rank in range(ranks) for one in layout.segments(rank)]:
        assert one.begin % 64 == 0
        for at in range(one.begin, one.end):
            owned[one.entry][at] += 1
    assert all(times == 1 for entry in owned for times in entry)
    total = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    assert all(abs(layout.nbytes(rank) - total / ranks) <= (64 + 1) * (4 + 8) for rank in range(ranks))


def streams_in_rounds(rank, world):
    dist.init_process_group("gloo")
    exchange = Exchange(None, staging=3 * 5)  # bytes: many rounds, which end inside of elements
    lengths = [0, 40, 22]
    parts = [torch.arange(5) + rank, torch.zeros(0), torch.arange(22 if rank == 2 else 0, dtype=torch.uint8)]
    mine = [[], parts[:1], parts[1:]][rank]
    found = [[torch.empty_like(part) for part in own] for own in ([], [parts[0]], [torch.empty(22).byte()])]
    exchange.gather(Stream.of(mine), lengths, lambda other: Stream.of(found[other]), everyone=True)
    assert found[1][0].tolist() == [1, 2, 3, 4, 5]
    assert found[2][0].tolist() == list(range(22))
    back = [torch.zeros_like(part) for part in mine]
    streams = [Stream.of([part + 1 for part in own]) for own in found] if rank == 0 else []
    exchange.scatter(streams, lengths, Stream.of(back))
    return all(torch.equal(part, own + 1) for part, own in zip(back, mine, strict=True))


def test_streams_move_in_rounds_of_a_bounded_size():
    assert all(run_distributed(streams_in_rounds, 3))


def bytes_held(rank, world):
    dist.init_process_group("gloo")
    model = nn.Sequential(nn.Embedding(1001, 64), nn.Linear(64, 32), nn.Linear(32, 10).bfloat16())
    ema = ShardedEMA(model)
    shards = ema.state_dict_shard().values()
    assert sum(shard.untyped_storage().nbytes() for shard in shards) == ema.nbytes
    return ema.nbytes


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_a_rank_with_one_dominating_embedding(world):
    total = (1001 * 64 + 65 * 32) * 4 + 33 * 10 * 2
    held = run_distributed(bytes_held, world)
    assert sum(held) == total
    assert all(abs(one - total / world) <= 64 * (4 + 2) for one in held), held


def wrapped_models(rank, world):
    start(pipe=1)
    plain = SmallResNet()
    names = list(plain.state_dict())
    inner = copy.deepcopy(plain)
    inner.body = torch.compile(inner.body)

    class NaiveDDP(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrappers = [DDP, DistributedDataParallel, torch.compile, NaiveDDP, lambda model: DDP(torch.compile(model))]
    for model in [wrap(copy.deepcopy(plain)) for wrap in wrappers] + [DDP(inner)]:
        ema, average = ShardedEMA(model), copy.deepcopy(plain)
        for _ in range(2):
            random_step(model)
            plain_update(average, model, 0.5)
            ema.update(model, 0.5)
        ema.verify_with_gt(average)
        state = ema.state_dict_cpu()
        assert list(state) == (names if rank == 0 else [])


def test_what_wrappers_put_into_names_is_left_out():
    run_distributed(wrapped_models, 2)


def groups(rank, world):
    dist.init_process_group("gloo")
    halves = [dist.new_group(ranks) for ranks in ([3, 1], [0, 2])]
    mine, other = (halves[0], halves[1]) if rank % 2 else (halves[1], halves[0])
    torch.manual_seed(rank % 2)
    model = nn.Linear(50, 40)
    average, ema = copy.deepcopy(model), ShardedEMA(model, mine)
    random_step(model)
    plain_update(average, model, 0.9)
    ema.update(model, 0.9)
    with pytest.raises(TopologyError, match="this rank is not in"):
        ShardedEMA(model, other)
    if rank % 2 == 0:
        return None  # nobody waits for the other group
    state = ema.state_dict_cpu()
    if state:
        same_bits(state, average.state_dict())
    return len(state)


def test_a_group_works_by_itself_and_need_not_begin_with_rank_0():
    assert run_distributed(groups, 4) in ([None, 2, None, 0], [None, 0, None, 2])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.layer.bias.requires_grad_(False)
        self.codes = nn.Parameter(torch.arange(100, dtype=torch.int8), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("steps", torch.tensor(0))


def tied_frozen_integer(rank, world):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Tied()
    average, ema = copy.deepcopy(model), ShardedEMA(model)
    frozen = model.layer.bias.detach().clone()
    assert len(model.state_dict()) == 7
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
            average.embedding.weight.mul_(0.5).add_(model.embedding.weight, alpha=0.5)
            average.layer.weight.mul_(0.5).add_(model.layer.weight, alpha=0.5)
            model.steps.fill_(step)
            model.mask.logical_not_()
        ema.update(model, 0.5)
    average.steps.fill_(2)
    average.mask.logical_not_()
    state = ema.state_dict_cpu()
    if rank == 0:
        same_bits(state, average.state_dict())
        assert state["head.weight"] is state["embedding.weight"]
        average.load_state_dict(state)
    ema.update(model, 0.5, only_trainable=False)
    state = ema.state_dict_cpu()
    if rank == 0:
        assert torch.equal(state["layer.bias"], (frozen * 0.5).add(model.layer.bias, alpha=0.5))
        assert torch.equal(state["codes"], model.codes)


def test_tied_frozen_and_integer_tensors():
    run_distributed(tied_frozen_integer, 2)


def a_grid(rank, world):
    start(pipe=2)
    whole = SmallResNet().double()
    reference = copy.deepcopy(whole)
    layers = flatten_model(whole, ["stem", "body", lambda x: x.mean((2, 3)), "head"])
    stage = DDP(nn.Sequential(*partition_uniform(layers)))
    ema, average = ShardedEMA(stage), copy.deepcopy(whole)
    for _ in range(5):
        random_step(whole)  # the stage's layers are some of its
        plain_update(average, whole, 0.9)
        ema.update(stage, 0.9)
    wanted = average.state_dict()
    with ema.applied_to(stage):
        own = whole_model_state_dict(stage)
        same_bits(own, {name: wanted[name] for name in own})
    state = ema.state_dict_cpu()
    assert bool(state) == tpc.is_first_in_data_group()
    states = [None] * world
    dist.all_gather_object(states, state)
    union = {name: tensor for one in states for name, tensor in one.items()}
    assert sum(map(len, states)) == len(union)
    reference.load_state_dict(union)
    same_bits(reference.state_dict(), wanted)
    random_step(average)  # resume from the file of another split, or of the whole model
    ema.load_state_dict(average.state_dict() if state else None, num_updates=7)
    load_whole_model_state_dict(stage, average.state_dict())
    ema.verify_with_gt(stage)
    return ema.num_updates


def test_stages_on_a_grid_together_are_the_whole_model():
    assert run_distributed(a_grid, 4) == [7] * 4


def one_killed(rank, world):
    start(pipe=2)
    ema = ShardedEMA(nn.Sequential(*partition_uniform(list(make_layers()))))
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank != 1:
        return len(ema.state_dict_cpu())
    with pytest.raises(PipelineError, match="ShardedEMA.state_dict_cpu") as caught:
        ema.state_dict_cpu()
    return caught.value.global_rank


def test_a_rank_that_is_gone_is_named():
    assert run_distributed(one_killed, 4, may_die=[3], timeout=30) == [4, 3, 0, None]


def mistakes(rank, world):
    start(pipe=1)
    model = SmallResNet()
    ema = ShardedEMA(model)
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="decay must be between 0 and 1"):
            ema.update(model, decay)
    with pytest.raises(ValueError, match="floating dtype"):
        ShardedEMA(model, dtype=torch.int32)
    with pytest.raises(TopologyError, match="group is a str"):
        ShardedEMA(model, "data")
    with pytest.raises(CheckpointError, match=r"weight has no values yet"):
        ShardedEMA(nn.Linear(3, 3, device="meta" if rank else "cpu"))
    with pytest.raises(CheckpointError, match=r"rank 0 alone has weight \(3, 3\)"):
        ShardedEMA(nn.Linear(3, 3 + rank))
    grown = copy.deepcopy(model)
    grown.head, grown.more, grown.stem = nn.Linear(12, 11), nn.Linear(2, 2), nn.Sequential(model.stem[0])
    message = (
        r"lacks stem.1.bias, .*it has more.weight, more.bias as well; head.weight is \(11, 12\) and was \(10, 12\)"
    )
    for action in (ema.update, ema.copy_to):
        with pytest.raises(CheckpointError, match=message):
            action(grown)
    with pytest.raises(CheckpointError, match=r"copy_to: on rank 1 of the 2 ranks of the group: this is not the model"):
        ema.copy_to(grown if rank else model)
    with pytest.raises(CheckpointError, match="lacks"), ema.applied_to(grown):
        raise AssertionError("not reached")
    with ema.applied_to(model), pytest.raises(PipelineError, match="would average the average"):
        ema.update(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[3, 4] += 0.5
        other.head.bias[2:] += 1
    message = r"2 of 14 parameters differ: head.weight: 1 of 120 elements, at most 0.5 apart; head.bias: 8 of 10"
    with pytest.raises(CheckpointError, match=message):
        ema.verify_with_gt(other)
    with pytest.raises(CheckpointError, match=r"more.bias is not in the average; stem.1.weight is in the average only"):
        ema.verify_with_gt(grown)
    with pytest.raises(CheckpointError, match="ShardedEMA: verify_with_gt: on rank 0 .*AttributeError: "):
        ema.verify_with_gt(None)


def test_mistakes_are_errors_on_every_rank():
    run_distributed(mistakes, 2)
