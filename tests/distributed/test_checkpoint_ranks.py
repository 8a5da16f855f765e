"""What several ranks save: shards, masters, ties, averages, each rank's own state; and what they refuse together."""

import copy
import functools

import pytest
import torch
from checkpoint_layouts import Layout, Run, adamw, make_model, plain_losses
from distributed_harness import run_distributed
from torch import nn

from torchdistpackage import Bf16ZeroOptimizer, CheckpointError, partition_chunks, setup_distributed, tpc
from torchdistpackage.checkpoint import Checkpointer, ResumableSampler, TensorFiles
from torchdistpackage.parallel.ema import ShardedEMA


def four(rank, world, folder, steps):
    run = Run(Layout(2, "interleaved-1f1b", kind="zero"))
    with run.checkpointer(folder) as checkpointer:
        loaded = checkpointer.load()
        first = loaded.step if loaded else 0
        found = [run.step(first + number) for number in range(steps)]
        checkpointer.save(first + steps)
    return found


def test_from_one_process_to_four_and_back(tmp_path):
    expected = plain_losses(6)
    found = run_distributed(four, 4, str(tmp_path), 2, timeout=60)[0]
    model = make_model()
    optimizer = adamw(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    with Checkpointer(tmp_path, model, optimizer=optimizer, scheduler=scheduler) as checkpointer:
        assert checkpointer.load().step == 2
        from checkpoint_layouts import batch

        for step in (2, 3):
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            found.append(loss.item())
        checkpointer.save(4)
    found += run_distributed(four, 4, str(tmp_path), 2, timeout=60)[0]
    assert found == pytest.approx(expected, rel=1e-6)


def cut_by_hand(rank, world, folder):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", world)])
    with pytest.raises(CheckpointError, match=r"In modules that you cut by hand .* or pass \{stage: module\}"):
        Checkpointer(folder, nn.Linear(3, 3)).save(0)
    for way in (lambda layer: {rank: layer}, lambda layer: nn.ModuleDict({f"layer{rank}": layer})):
        saved, loaded = nn.Linear(3, 3), nn.Linear(3, 3)
        Checkpointer(folder, way(saved)).save(1)
        Checkpointer(folder, way(loaded)).load()
        assert torch.equal(loaded.weight, saved.weight)


def test_stages_that_are_cut_by_hand_are_told_how_to_be_named(tmp_path):
    run_distributed(cut_by_hand, 2, str(tmp_path))


def same(found, expected):
    return all(torch.equal(a, b) for one in zip(found, expected, strict=True) for a, b in zip(*one, strict=True))


def half_precision(rank, world, folder):
    """Masters go with the parameters they belong to, and are the parameters of a run in float32."""
    setup_distributed(backend="gloo")

    def make(dtype, zero):
        model = make_model(dtype)
        optimizer = adamw(model.parameters())
        return model, Bf16ZeroOptimizer(optimizer, bucket_size=50) if zero else optimizer

    def train(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (rank + 1))
        optimizer.step()
        optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer = make(torch.bfloat16, True)
    train(model, optimizer)
    Checkpointer(f"{folder}/half", model, optimizer=optimizer).save(1)
    expected = [train(model, optimizer) for _ in range(3)]
    again, other = make(torch.bfloat16, True)
    assert Checkpointer(f"{folder}/half", again, optimizer=other).load().same_layout
    found = [train(again, other) for _ in range(3)]
    assert same(found, expected)
    single, plain = make(torch.float32, False)
    Checkpointer(f"{folder}/half", single, optimizer=plain).load()
    key = TensorFiles(f"{folder}/half/step-00000001").read_whole
    assert torch.equal(single[1].up.weight, key("optimizer.1.up.weight.master_weights"))
    assert plain.state[single[1].up.weight]["exp_avg"].dtype == torch.float32
    Checkpointer(f"{folder}/single", single, optimizer=plain).save(1)
    back, masters = make(torch.bfloat16, True)
    Checkpointer(f"{folder}/single", back, optimizer=masters).load()
    found = [train(back, masters) for _ in range(3)]
    assert same(found, expected)


def test_half_precision_with_masters(tmp_path):
    run_distributed(half_precision, 2, str(tmp_path), timeout=60)


def placements(rank, world, folder):
    """DTensors of every placement are saved as the whole tensor, and loaded by others."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    setup_distributed(backend="gloo")
    from torch.distributed.device_mesh import init_device_mesh

    mesh, row = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), init_device_mesh("cpu", (4,))
    whole = torch.arange(6.0 * 12).view(6, 12)
    strided = functools.partial(_StridedShard, split_factor=3)
    kinds = [
        (row, [Shard(0)]),
        (row, [Shard(1)]),
        (row, [Replicate()]),
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Shard(1), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh, [Replicate(), strided(1)]),
    ]
    for number, (where, how) in enumerate(kinds):
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(whole, where, how))
        module.bias = nn.Parameter(distribute_tensor(whole[0], where, [Replicate() for _ in how]))
        Checkpointer(f"{folder}/{number}", module).save(1)
        files = TensorFiles(f"{folder}/{number}/step-00000001")
        assert torch.equal(files.read_whole("model.weight"), whole)
    for at, (where, how) in enumerate(kinds):
        for number in {at, (at + 1) % len(kinds), (at + 3) % len(kinds)}:
            module = nn.Module()
            empty = distribute_tensor(torch.zeros(6, 12), where, how)
            module.weight, module.bias = nn.Parameter(empty), nn.Parameter(torch.zeros(12))
            Checkpointer(f"{folder}/{number}", module).load()
            expected = distribute_tensor(whole, where, how).to_local()
            assert torch.equal(module.weight.to_local(), expected)
    module.weight = nn.Parameter(DTensor.from_local(torch.zeros(6, 12), row, [Partial()]))
    with pytest.raises(CheckpointError, match="its rows cannot be told"):
        Checkpointer(folder, module)

    unknown = nn.Module()
    unknown.weight = nn.Parameter(DTensor.from_local(torch.zeros(6, 3), mesh, [Shard(1), strided(1)]))
    with pytest.raises(CheckpointError, match="its rows cannot be told"):
        Checkpointer(folder, unknown)
    for rows in (8, 6, 5, 3) if torch.__version__ >= "2.8" else (8, 4):  # older ones shard evenly, or not at all
        model = nn.Linear(4, rows, bias=False)
        model.weight = nn.Parameter(distribute_tensor(whole.view(18, 4)[:rows], mesh["b"], [Shard(0)]))
        fully_shard(model, mesh=mesh["a"])
        Checkpointer(f"{folder}/{rows}-rows", model).save(1)
        found = TensorFiles(f"{folder}/{rows}-rows/step-00000001").read_whole("model.weight")
        assert torch.equal(found, whole.view(18, 4)[:rows])


def test_dtensors_of_every_placement(tmp_path):
    run_distributed(placements, 4, str(tmp_path), timeout=100)


def sharded_twice(rank, world, folder):
    """Tensor-parallel parameters whose state is sharded again over replicas: whole names, whole tensors."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2), ("tensor", 2)])
    mesh = tpc.mesh["tensor"]
    torch.manual_seed(0)
    whole, gradient = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7)).double(), torch.randn(6, 5).double()

    def make():
        model = copy.deepcopy(whole)
        model[0].weight = nn.Parameter(
            distribute_tensor(whole[0].weight.detach(), mesh, [_StridedShard(0, split_factor=3)])
        )
        model[1].weight = nn.Parameter(distribute_tensor(whole[1].weight.detach(), mesh, [Shard(1)]))
        return model, Bf16ZeroOptimizer(adamw(model.parameters()), bucket_size=20), ShardedEMA(model)

    def train(model, optimizer):
        for index, parameter in enumerate(model.parameters()):
            like = torch.ones(parameter.shape, dtype=torch.float64) * (index + 1)
            like = gradient if index == 0 else like
            sharded = isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(like, mesh, parameter.placements) if sharded else like.clone()
        optimizer.step()
        optimizer.zero_grad()

    plain, start = adamw(whole.parameters()), whole[0].weight.detach().clone()
    model, optimizer, ema = make()
    train(model, optimizer)
    train(whole, plain)
    Checkpointer(f"{folder}/a", model, optimizer=optimizer, ema=ema).save(1)
    average = TensorFiles(f"{folder}/a/step-00000001").read_whole("ema.0.weight")
    assert torch.equal(average, start)
    loaded = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7)).double()
    other = adamw(loaded.parameters())
    Checkpointer(f"{folder}/a", loaded, optimizer=other).load()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))
    for parameter, twin in zip(loaded.parameters(), whole.parameters(), strict=True):
        assert all(torch.equal(value, plain.state[twin][key]) for key, value in other.state[parameter].items())
    Checkpointer(f"{folder}/b", whole, optimizer=plain).save(1)
    model, optimizer, _ = make()
    Checkpointer(f"{folder}/b", model, optimizer=optimizer).load()
    train(model, optimizer)
    train(whole, plain)
    for parameter, twin in zip(model.parameters(), whole.parameters(), strict=True):
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(full, twin)


def test_tensor_parallel_and_sharded_state(tmp_path):
    run_distributed(sharded_twice, 4, str(tmp_path), timeout=60)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight


def tied(rank, world, folder):
    from torchdistpackage import flatten_model

    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    torch.manual_seed(0)
    model = Tied()
    stages = partition_chunks(flatten_model(copy.deepcopy(model), ["embed", "body", "head"]), "1f1b")
    (stage,) = stages.values()
    optimizer = adamw(stage.parameters())
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    Checkpointer(folder, stages, optimizer=optimizer).save(1)
    plain = Tied()
    other = adamw(plain.parameters())
    Checkpointer(folder, plain, optimizer=other).load()
    assert plain.head.weight is plain.embed.weight
    assert len(other.state) == 3
    tpc.setup_process_groups([("data", 4), ("pipe", 1)])
    Checkpointer(f"{folder}/plain", plain, optimizer=other).save(1)
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    with torch.no_grad():
        before = [p.clone() for p in stage.parameters()]
        for parameter in stage.parameters():
            parameter.zero_()
    Checkpointer(f"{folder}/plain", stages, optimizer=optimizer).load()
    assert all(torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
    twins = Checkpointer(folder, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"model.weight is a parameter of rank 0 .* and of rank 1"):
        twins.save(3)


def test_ties_over_stages_and_untied_twins(tmp_path):
    run_distributed(tied, 4, str(tmp_path), timeout=60)


class Place:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def own_state(rank, world, folder, values, expected):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", world), ("pipe", 1)])
    model, sampler = nn.Linear(2, 2), ResumableSampler(range(100), world, rank)
    ema = ShardedEMA(model)
    if values is not None:
        sampler.advance(8)
        ema.update(model, decay=0.5)
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(model, decay=0.5)
        data = Place(values[rank])
        Checkpointer(folder, model, ema=ema, data=data, objects={"sampler": sampler}).save(1)
        return ema.state_dict_cpu()
    data = Place(None)
    checkpointer = Checkpointer(folder, model, ema=ema, data=data, objects={"sampler": sampler})
    if expected is CheckpointError:
        with pytest.raises(CheckpointError, match="ResumableSampler"):
            checkpointer.load()
        return None
    checkpointer.load()
    assert (data.value, sampler.rows, ema.num_updates) == (expected, 8, 2)
    return ema.state_dict_cpu()


def test_each_ranks_own_state_and_averages(tmp_path):
    average = run_distributed(own_state, 2, str(tmp_path / "alike"), [5, 5], None, timeout=60)[0]
    for world in (1, 3):
        found = run_distributed(own_state, world, str(tmp_path / "alike"), None, 5, timeout=60)[0]
        assert all(torch.equal(found[name], value) for name, value in average.items())
    run_distributed(own_state, 2, str(tmp_path / "unlike"), [5, 6], None, timeout=60)
    run_distributed(own_state, 3, str(tmp_path / "unlike"), None, CheckpointError, timeout=60)


def experts(rank, world, folder):
    """Experts of one name on several ranks are not replicas."""
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2), ("pipe", 1)])
    tpc.build_moe_groups(moe_ep_size=2)
    model = nn.ModuleDict({"own": nn.Linear(2, 2), "all": nn.Linear(2, 2)})
    model._ddp_params_and_buffers_to_ignore = ["own.weight", "own.bias"]
    with pytest.raises(CheckpointError, match="own.weight is a parameter of rank 0 .* Name experts by their number"):
        Checkpointer(folder, model).save(1)
    named = nn.ModuleDict({f"own{rank}": nn.Linear(2, 2), "all": nn.Linear(2, 2)})
    named._ddp_params_and_buffers_to_ignore = [f"own{rank}.weight", f"own{rank}.bias"]
    Checkpointer(folder, named).save(1)
    saved = TensorFiles(f"{folder}/step-00000001").read_whole(f"model.own{rank}.bias")
    assert torch.equal(saved, named[f"own{rank}"].bias)


def test_experts(tmp_path):
    run_distributed(experts, 2, str(tmp_path), timeout=60)


def together(rank, world, folder):
    setup_distributed(backend="gloo")
    model = nn.Linear(2, 2 + rank)
    checkpointer = Checkpointer(folder, model)
    with pytest.raises(CheckpointError, match=r"is float32 \(2, 2\) on rank 0 and float32 \(3, 2\) on rank 1"):
        checkpointer.save(1)
    checkpointer = Checkpointer(folder, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="save different steps, .0, 1"):
        checkpointer.save(rank)
    with pytest.raises(CheckpointError, match=r"on rank 1.*extra is a Linear"):
        checkpointer.save(1, extra=model if rank == 1 else None)
    checkpointer.save(1)
    wrong = Checkpointer(folder, nn.ModuleDict({"nothing": nn.Linear(2, 2)}) if rank == 1 else nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"on rank 1.*has no nothing.weight"):
        wrong.load()
    with pytest.raises(CheckpointError, match="keep must be"):
        Checkpointer(folder, model, keep=rank)


def test_all_ranks_raise_what_one_has_met(tmp_path):
    run_distributed(together, 2, str(tmp_path), timeout=60)


def unlike_calls(rank, world, folder):
    setup_distributed(backend="gloo")
    with Checkpointer(folder, nn.Linear(2, 2)) as checkpointer:
        checkpointer.save(1)
        for options in ({"which": rank}, {"strict": rank == 0}, {"verify": rank == 0}):
            with pytest.raises(CheckpointError, match="the ranks call load differently"):
                checkpointer.load(**options)
        assert checkpointer.load().step == 1


def test_unlike_calls_of_load_are_told(tmp_path):
    run_distributed(unlike_calls, 2, str(tmp_path), timeout=60)


def rates_of_stages(rank, world, folder, step):
    """Each layer has its learning rate, the first one two groups; stages have other groups than one process."""
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 1), ("pipe", world)])
    layers = nn.ModuleDict({str(at): nn.Linear(2, 2) for at in range(4)[4 // world * rank : 4 // world * (rank + 1)]})
    groups = [{"params": [one], "lr": 0.1} for one in layers["0"].parameters()] if rank == 0 else []
    groups += [{"params": [*one.parameters()], "lr": 0.1 / (int(at) + 1)} for at, one in layers.items() if at != "0"]
    expected = [group["lr"] / 5 for group in groups]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (steps + 1))
    with Checkpointer(folder, layers, optimizer=optimizer, scheduler=scheduler) as checkpointer:
        for _ in range(3 - step):
            optimizer.step()
            scheduler.step()
        if step:
            assert checkpointer.load().step == step
            assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        else:
            checkpointer.save(3)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_every_stage_keeps_the_learning_rates_of_its_groups(tmp_path):
    for saver, loaders in ((2, (2, 1, 4)), (1, (2,))):
        run_distributed(rates_of_stages, saver, str(tmp_path / str(saver)), 0, timeout=60)
        for world in loaders:
            run_distributed(rates_of_stages, world, str(tmp_path / str(saver)), 3, timeout=60)
