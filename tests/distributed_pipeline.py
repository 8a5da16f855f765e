"""What the tests with real processes share: set-up, a small model, and the inputs and function of each stage."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage import setup_distributed, tpc

mse = nn.functional.mse_loss
FULLY_SHARD_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
fully_shards = pytest.mark.skipif(
    not FULLY_SHARD_ON_CPU, reason="fully_shard of this torch does not run on CPUs: torch.cpu.Stream records no events"
)


def start(pipe, **more):
    setup_distributed(backend="gloo")
    config = [("data", dist.get_world_size() // pipe), ("pipe", pipe)]
    tpc.setup_process_groups(more.get("config", config), same_host=more.get("same_host", True))
    torch.manual_seed(0)


def make_layers(count=4, width=6):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]).double()


def own_inputs(x, y):
    if tpc.get_pp_size() == 1:
        return [x, y]
    return x if tpc.is_first_in_pipeline_group() else [y] if tpc.is_last_in_pipeline_group() else None


def loss_step(stage):
    def fwd_fn(arguments):
        if tpc.is_last_in_pipeline_group():
            return mse(stage(arguments[0]), arguments[1])
        return stage(arguments)

    return fwd_fn


def close(parameters, others):
    return all(torch.allclose(p.grad, q.grad) for p, q in zip(parameters, others, strict=True))
