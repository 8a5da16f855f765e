"""CUDA over NCCL: replicas that reduce by themselves, sharded optimizers and averages, tensor parallelism, tools."""

import copy

import pytest
import torch
from distributed_harness import run_distributed
from torch import nn

from torchdistpackage import (
    Bf16ZeroOptimizer,
    NaiveDDP,
    ShardedEMA,
    apply_tensor_parallel,
    clip_grad_norm_,
    forward_backward,
    get_model_profile,
    setup_distributed,
    tpc,
)
from torchdistpackage.parallel import TpMlp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RANKS = min(2, torch.cuda.device_count())


def start(mode, world):
    setup_distributed(backend="nccl")
    tpc.setup_process_groups([(mode, world)])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
    return model, torch.randn(world, 8, 16, device="cuda")


def loss_of(model, x):
    return model(x).square().mean()


def replicas(rank, world):
    model, x = start("data", world)
    reference = copy.deepcopy(model)
    ddp, zero, average = NaiveDDP(copy.deepcopy(model)), copy.deepcopy(model), None
    optimizers = {
        ddp: torch.optim.AdamW(ddp.parameters()),
        zero: Bf16ZeroOptimizer(torch.optim.AdamW(zero.parameters())),
        reference: torch.optim.AdamW(reference.parameters()),
    }
    average = ShardedEMA(zero)
    for _ in range(2):
        for each in (ddp, zero):
            forward_backward(optimizers[each], lambda batch, of=each: loss_of(of, batch), None, x[rank], 2)
            clip_grad_norm_(each.parameters(), 0.1)
        optimizers[reference].zero_grad()
        loss_of(reference, x.flatten(0, 1)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        for optimizer in optimizers.values():
            optimizer.step()
        average.update(zero, decay=0.5)
    for each in (ddp.module, zero):
        for mine, wanted in zip(each.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted)
    return list(average.state_dict_cpu())


def test_replicas_over_nccl():
    assert len(run_distributed(replicas, RANKS, timeout=120)[0]) == 4


def tensor_parallel(rank, world):
    model, x = start("tensor", world)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    sharded = apply_tensor_parallel(copy.deepcopy(model), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for each in (sharded, model):
        loss_of(each, x[0]).backward()
    norms = clip_grad_norm_(sharded.parameters(), 1.0), nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(*norms)
    layer = TpMlp(16, 32).cuda()
    loss_of(layer, x[0]).backward()
    return layer.fc1.linear.weight.grad.full_tensor().shape


def test_tensor_parallelism_over_nccl():
    assert run_distributed(tensor_parallel, RANKS, timeout=120)[0] == (16, 32)


def test_a_profile_of_a_device(tmp_path, capsys):
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU()).cuda(), torch.randn(8, 16, device="cuda")
    found = get_model_profile(model, x, backward=True, min_mem=0, trace=tmp_path / "trace.json", operations=True)
    assert "GELU" in capsys.readouterr().out
    assert found["1"].kept == 8 * 32 * 4
    assert (tmp_path / "trace.json").stat().st_size > 0
