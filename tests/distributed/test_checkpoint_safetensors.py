"""Safetensors of running stages: from any layout into any other, plain, sharded and tied; and what fails, on all."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchdistpackage import CheckpointError, flatten_sequence, partition_chunks, whole_model_state_dict
from torchdistpackage.checkpoint import Checkpointer, export_safetensors, load_safetensors, save_safetensors

pytest.importorskip("safetensors")


class Tied(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


def model(seed):
    torch.manual_seed(seed)
    embed = nn.Linear(5, 7, bias=False)
    body = [nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 5))]
    return nn.Sequential(embed, *body, Tied(embed.weight))


def stages(net, schedule="1f1b"):
    return partition_chunks(flatten_sequence(net), schedule)


def shard(parts, mesh):
    """Every weight in rows over the mesh, uneven; as tensor parallelism and fully_shard have it."""
    for module in [module for part in parts.values() for module in part.modules()]:
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                shared = nn.Parameter(distribute_tensor(tensor.data, mesh, [Shard(0)]))
                module.register_parameter(name, shared)
    return parts


def same(net, parts):
    whole = net.state_dict()
    found = {name: tensor for part in parts.values() for name, tensor in whole_model_state_dict(part).items()}
    whole_of = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in found.items()}
    return bool(found) and all(torch.equal(tensor, whole[name]) for name, tensor in whole_of.items())


def to_and_from(rank, world, folder):
    results = {}
    start(2)  # two replicas of two stages
    parts = stages(model(0))
    report = save_safetensors(parts, folder / "pipe", config={"kind": "tiny"})
    results["files"] = (sorted(report.files), report.num_tensors)
    others = stages(model(1))
    results["missed"] = load_safetensors(folder / "pipe", others)
    results["same layout"] = same(model(0), others)
    sharded = shard(stages(model(0)), data_mesh())
    save_safetensors(sharded, folder / "sharded")
    again = shard(stages(model(2)), data_mesh())
    load_safetensors(folder / "pipe", again)
    results["into shards"] = same(model(0), again)
    chunks = stages(model(3), "zb-v")
    load_safetensors(folder / "sharded", chunks)
    results["from shards into a v"] = same(model(0), chunks)
    results["fully sharded"] = fully_sharded(folder)
    with Checkpointer(folder / "run", parts) as saver:
        saver.save(1)
    return results


def fully_sharded(folder):
    """FSDP2 runs on CPU tensors in the newer versions of torch; of the older ones the DTensors above are all."""
    if torch.__version__ < "2.10":
        return True
    from torch.distributed.fsdp import fully_shard

    nets = [stages(model(seed)) for seed in (0, 5)]
    for part in [part for net in nets for part in net.values()]:
        fully_shard(part, mesh=data_mesh())
    save_safetensors(nets[0], folder / "fsdp")
    load_safetensors(folder / "fsdp", nets[1])
    return same(model(0), nets[0]) and same(model(0), nets[1])


def data_mesh():
    """Over the replicas of this rank's stage."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))["data"]


def test_from_any_layout_into_any_other(tmp_path: Path) -> None:
    for result in run_distributed(to_and_from, 4, tmp_path, timeout=60):
        files, count = result.pop("files")
        assert files == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
        assert count == len(model(0).state_dict()) - 1  # the tie is written once
        missed = result.pop("missed")
        assert (missed.missing, missed.unused) == ((), ())
        assert all(result.values()), result
    plain = model(4)
    load_safetensors(tmp_path / "pipe", plain)  # one process, without process groups
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model(0).state_dict().values(), strict=True)
    )
    with Checkpointer(tmp_path / "plain", model(0)) as saver:
        saver.save(2)
    export_safetensors(tmp_path / "plain", tmp_path / "one")
    export_safetensors(tmp_path / "run", tmp_path / "two")  # the same files, whoever saved
    for file in ("one/model.safetensors", "two/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "pipe").iterdir() if path.suffix == ".json") == [
        "config.json",
        "export.json",
        "model.safetensors.index.json",
    ]


def wrong_on_one_rank(rank, world, folder):
    start(2)
    told = []

    def attempt(work, *arguments, **options):
        try:
            work(*arguments, **options)
        except CheckpointError as error:
            told.append(str(error))
        dist.barrier()

    parts = stages(model(0))
    attempt(save_safetensors, parts, folder / "taken")
    save_safetensors(parts, folder / "good")
    longer = stages(nn.Sequential(*model(1), nn.Linear(5, 5)))
    parameters = [p for part in longer.values() for p in part.parameters()]
    before = [p.clone() for p in parameters]
    attempt(load_safetensors, folder / "good", longer)
    told.append(all(torch.equal(a, p) for a, p in zip(before, parameters, strict=True)))
    attempt(save_safetensors, [nn.Linear(2, 2)], folder / "unnamed")
    (folder / "good" / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    dist.barrier()
    attempt(load_safetensors, folder / "good", parts)
    return told


def full_disk_on_one_rank(rank, world, folder):
    """Rank 1 cannot write its file, and still takes part in gathering what rank 0 writes."""
    start(1)
    mesh = init_device_mesh("cpu", (world,))
    parts = shard({0: nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40), nn.Linear(40, 40))}, mesh)
    save_safetensors(parts, folder / "out")
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save_safetensors(parts, folder / "out", dtype="float64")
    except CheckpointError as error:
        return str(error)


def test_a_disk_that_is_full_for_one_rank(tmp_path: Path) -> None:
    for told in run_distributed(full_disk_on_one_rank, 2, tmp_path, timeout=60):
        assert "on rank 1: " in told
        assert "cannot be written: File too large" in told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = nn.ModuleDict({"0": nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40), nn.Linear(40, 40))})
    assert load_safetensors(tmp_path / "out", again).unused == ()


def test_what_is_wrong_on_one_rank_is_said_on_all(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("x")
    for taken, longer, untouched, unnamed, lost in run_distributed(wrong_on_one_rank, 2, tmp_path, timeout=60):
        assert "thesis.txt" in taken
        assert "on rank 1" in longer
        assert "not 6.bias, 6.weight" in longer
        assert untouched
        assert "no tie of the two is known" in unnamed
        assert "model-00002-of-00002.safetensors cannot be read" in lost
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "good"}
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
