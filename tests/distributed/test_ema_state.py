"""Saving, resuming and lending a sharded average, and averages of models whose parameters are DTensors."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import make_layers, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchdistpackage import CheckpointError, forward_backward, tpc
from torchdistpackage.parallel.ema import ShardedEMA

FORWARD = torch.__version__ >= "2.7"  # before that, what fully_shard was applied to did not run on CPUs


class Net(nn.Module):
    def __init__(self, width=36):
        super().__init__()
        self.up, self.down = nn.Linear(width, 70), nn.Linear(70, width)
        self.norm = nn.BatchNorm1d(width)
        self.tied = nn.Linear(70, width)
        self.tied.weight = self.down.weight

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def trained(model, ema, seed, updates, average=None):
    """Random steps, the same on every rank and for every number of ranks; also of an unsharded average."""
    torch.manual_seed(seed)
    for _ in range(updates):
        with torch.no_grad():
            for tensor in [*model.parameters(), model.norm.running_mean]:
                tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype))
            for mean, parameter in zip(average.parameters() if average else [], model.parameters(), strict=False):
                mean.mul_(0.9).add_(parameter, alpha=0.1)
        ema.update(model, 0.9)


def fresh(seed=0):
    torch.manual_seed(seed)
    return Net()


def equal(state, other):
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in other)
    return True


def uninterrupted():
    model = fresh()
    ema = ShardedEMA(model)
    trained(model, ema, 1, 3)
    trained(model, ema, 2, 3)
    return ema.state_dict_cpu()


def first_half(rank, world):
    dist.init_process_group("gloo")
    model = fresh()
    ema = ShardedEMA(model)
    trained(model, ema, 1, 3)
    return ema.state_dict_cpu(), ema.state_dict_shard()


def second_half(rank, world, full, everywhere):
    dist.init_process_group("gloo")
    model = fresh()
    ema = ShardedEMA(model)
    trained(model, ShardedEMA(model), 1, 3)
    ema.load_state_dict(full if rank == 0 or everywhere else None, num_updates=3)
    trained(model, ema, 2, 3)
    assert ema.num_updates == 6
    return ema.state_dict_cpu()


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_another_number_of_ranks_goes_on_with_the_same_bits(world, everywhere):
    full = run_distributed(first_half, 2)[0][0]
    state, *others = run_distributed(second_half, world, full, everywhere)
    assert equal(state, uninterrupted())
    assert others == [{}] * (world - 1)


def changed(state, drop=(), **facts):
    """The same shard with other things said about it."""
    other = OrderedDict((name, shard) for name, shard in state.items() if name not in drop)
    other._metadata = state._metadata | facts
    return other


def shards_go_on(rank, world, saved):
    dist.init_process_group("gloo")
    file = io.BytesIO()
    torch.save(saved[rank][1], file)
    file.seek(0)
    mine = torch.load(file, weights_only=True)
    model = fresh()
    ema = ShardedEMA(model)
    trained(model, ema, 1, 3)
    before = ema.state_dict_cpu()
    cases = [
        (dict(mine), "_metadata lacks rank, size, num_updates, begins, buffers; pass the very object"),
        (saved[1 - rank][1], "shard is of rank 1 of 2 and this is rank 0 of 2; for another number of ranks save"),
        (changed(mine, drop=mine), "another model"),
        (changed(mine, begins=dict.fromkeys(mine, 1)), "another model"),
        (changed(mine, buffers={}), "another model"),
        (changed(mine, num_updates=3 + rank), r"different updates, \[3, 4\]"),
    ]
    for state, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ema.load_state_dict_shard(state)
    equal(ema.state_dict_cpu(), before)
    other = ShardedEMA(fresh(5))
    other.load_state_dict_shard(mine)
    trained(model, other, 2, 3)
    assert other.num_updates == 6
    return other.state_dict_cpu()


def test_shards_go_on_where_they_were():
    saved = run_distributed(first_half, 2)
    assert equal(run_distributed(shards_go_on, 2, saved)[0], uninterrupted())


def bad_states(rank, world):
    dist.init_process_group("gloo")
    model = fresh()
    ema, state = ShardedEMA(model), fresh(3).state_dict()
    ema.load_state_dict({f"other.{name}": tensor for name, tensor in state.items()} | state)
    ema.load_state_dict({name: tensor for name, tensor in state.items() if name != "down.weight"})  # it is tied.weight
    ema.verify_with_gt(fresh(3))
    ema.load_state_dict(fresh().state_dict())
    cases = [
        ({"up.weight": 1}, "not up.bias, down.weight"),
        (state | {"up.bias": torch.zeros(71)}, r"up.bias is \(71,\) in the state and \(70,\) in the model"),
        (state if rank == 1 else {}, r"ranks \[1\] of the 2 ranks of the group have a state"),
        (state if rank == 0 else {"x": 0}, "on rank 1 of the 2 ranks of the group: the state has 1 tensors"),
    ]
    for wrong, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ema.load_state_dict(wrong)
    ema.verify_with_gt(fresh())


def test_a_state_that_does_not_fit_changes_nothing():
    run_distributed(bad_states, 2)


def lent(rank, world, dtype):
    dist.init_process_group("gloo")
    model, average = fresh().to(dtype), fresh()
    ema = ShardedEMA(model, dtype=torch.float32)
    trained(model, ema, 1, 3, average if dtype is torch.float32 else None)
    average.norm.running_mean.copy_(model.norm.running_mean)
    own = copy.deepcopy(model.state_dict())

    def evaluate():
        state = ema.state_dict_cpu()
        if rank == 0:
            equal(model.state_dict(), {name: tensor.to(own[name].dtype) for name, tensor in state.items()})
        if dtype is torch.float32:
            equal(model.state_dict(), average.state_dict())
        model(torch.randn(5, 36).to(dtype))  # moves the statistics
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ema.applied_to(model):
        evaluate()
    return equal(model.state_dict(), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_borrows_the_average_and_has_its_own_weights_back(dtype):
    assert all(run_distributed(lent, 3, dtype))


def fully_sharded(model, mesh):
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def data_mesh(world):
    return init_device_mesh("cpu", (world,))


def hybrid_mesh(world):
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))


def sharded_parameters(rank, world, make_mesh):
    dist.init_process_group("gloo")
    reference, average = fresh(), fresh()
    del reference.tied, average.tied
    model = fully_sharded(copy.deepcopy(reference), make_mesh(world))
    ema, plain = ShardedEMA(model), ShardedEMA(reference)
    model.eval()
    for seed in range(3):
        trained(reference, plain, seed, 1, average)
        with torch.no_grad():
            for own, whole in zip(model.parameters(), reference.parameters(), strict=True):
                full = dist.tensor.distribute_tensor(whole.detach(), own.device_mesh, own.placements)
                own.to_local().copy_(full.to_local())
        model.norm.running_mean.copy_(reference.norm.running_mean)
        if FORWARD:
            model(torch.randn(4, 36))  # leaves gathered parameters behind
        ema.update(model, 0.9)
    state, wanted = ema.state_dict_cpu(), plain.state_dict_cpu()
    if rank == 0:
        equal(state, wanted)
    ema.verify_with_gt(average)
    own, x = [parameter.to_local().clone() for parameter in model.parameters()], torch.randn(4, 36)
    with ema.applied_to(model):
        with plain.applied_to(reference):
            assert not FORWARD or torch.equal(model(x), reference.eval()(x))
        ema.verify_with_gt(model)
    assert all(torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), own, strict=True))
    assert not FORWARD or torch.equal(model(x), reference(x))
    for everywhere in (True, False):
        other = ShardedEMA(model)
        other.load_state_dict(average.state_dict() if rank == 0 or everywhere else None)
        other.verify_with_gt(average)
    return ema.nbytes


@pytest.mark.parametrize(("world", "make_mesh"), [(2, data_mesh), (3, data_mesh), (4, hybrid_mesh)])
def test_fully_sharded_models_keep_their_own_parts(world, make_mesh):
    whole = 4 * (36 * 70 * 2 + 70 + 36 + 36 * 2)
    buffers = 4 * 36 * 2 + 8
    held = run_distributed(sharded_parameters, world, make_mesh)
    assert sum(held) - world * buffers == whole


def tensor_parallel(rank, world, two_dims):
    start(pipe=1, config=[("data", 2), ("tensor", 2)])
    reference, average = fresh(), fresh()
    for net in (reference, average):
        del net.tied
    model = copy.deepcopy(reference)
    mesh = tpc.mesh
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if two_dims:
        fully_sharded(model, mesh["data"])
    ema, plain = ShardedEMA(model), ShardedEMA(reference)
    for seed in range(3):
        trained(reference, plain, seed, 1, average)
        with torch.no_grad():
            for own, whole in zip(model.parameters(), reference.parameters(), strict=True):
                if hasattr(own, "to_local"):
                    chunk = own.__create_chunk_list__()[0]
                    slices = [slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
                    own.to_local().copy_(whole[tuple(slices)])
                else:
                    own.copy_(whole)
        ema.update(model, 0.9)
    wanted = average.state_dict()
    state = ema.state_dict_cpu()
    assert bool(state) == tpc.is_first_in_data_group()
    half = slice(35 * tpc.get_tp_rank(), 35 * tpc.get_tp_rank() + 35)
    if state:
        assert torch.equal(state["up.weight"], wanted["up.weight"][half])
        assert torch.equal(state["up.bias"], wanted["up.bias"][half])
        assert torch.equal(state["down.weight"], wanted["down.weight"][:, half])
        assert torch.equal(state["down.bias"], wanted["down.bias"])
    other = ShardedEMA(model)
    for resumed in (state, average.state_dict() if state else None):  # the group's blocks, or the whole
        other.load_state_dict(resumed)
        with other.applied_to(model):
            ema.verify_with_gt(model)
    return ema.nbytes


UNEVEN = pytest.mark.skipif(not FORWARD, reason="this torch cuts tensor-parallel blocks into equal parts only")


@pytest.mark.parametrize("two_dims", [False, pytest.param(True, marks=UNEVEN)])
def test_tensor_parallel_blocks_are_shared_by_their_replicas(two_dims):
    held = run_distributed(tensor_parallel, 4, two_dims)
    everything = 4 * (2 * 36 * 70 + 70 + 2 * (36 + 36 * 2)) + 4 * (4 * 36 * 2 + 8)
    assert sum(held) == everything
    assert max(held) - min(held) < everything / 20


def steps_with_an_average(rank, world):
    start(pipe=1)
    stage = make_layers()
    ema = ShardedEMA(stage)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        forward_backward(optimizer, lambda x: stage(x).pow(2).mean(), None, torch.ones(4, 6).double(), 2)
        optimizer.step()
        ema.update(stage, 0.5)
        with pytest.raises(CheckpointError, match="not the model"):  # on all ranks; the next step goes on
            ema.copy_to(stage[0])
        with ema.applied_to(stage):
            loss = forward_backward(None, lambda x: stage(x).pow(2).mean(), None, torch.ones(4, 6).double(), 2, True)
            losses.append(loss.item())
    return losses[0] > losses[1] > losses[2]


def test_between_the_steps_of_a_loop():
    assert run_distributed(steps_with_an_average, 2) == [True, True]
