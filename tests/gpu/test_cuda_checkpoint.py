"""Checkpoints of a model on a CUDA device: the same bits there, to the CPU and back, steps that stay on the device."""

import pytest
import torch
from torch import nn

from torchdistpackage.checkpoint import Checkpointer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def training(device, seed, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, **options)


def step(model, optimizer, device):
    optimizer.zero_grad()
    loss = model(torch.ones(4, 8, device=device)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_same_bits_on_the_device(tmp_path, options, asynchronous):
    model, optimizer = training("cuda", 0, **options)
    with Checkpointer(tmp_path, model, optimizer=optimizer, asynchronous=asynchronous) as checkpointer:
        for number in (1, 2):  # the second one uses the pinned memory of the first again
            step(model, optimizer, "cuda")
            checkpointer.save(number)
        expected = [step(model, optimizer, "cuda") for _ in range(3)]
    model, optimizer = training("cuda", 1, **options)
    Checkpointer(tmp_path, model, optimizer=optimizer).load()
    assert [step(model, optimizer, "cuda") for _ in range(3)] == expected


def test_from_the_device_to_the_cpu_and_back(tmp_path):
    model, optimizer = training("cuda", 0, capturable=True)
    step(model, optimizer, "cuda")
    Checkpointer(tmp_path, model, optimizer=optimizer).save(1)
    plain, other = training("cpu", 1)
    Checkpointer(tmp_path, plain, optimizer=other).load()
    assert other.state[plain[0].weight]["step"].device.type == "cpu"
    assert torch.equal(plain[0].weight, model[0].weight.cpu())
    step(plain, other, "cpu")
    Checkpointer(tmp_path, plain, optimizer=other).save(2)
    Checkpointer(tmp_path, model, optimizer=optimizer).load()
    assert optimizer.state[model[0].weight]["step"].device.type == "cuda"
    step(model, optimizer, "cuda")
