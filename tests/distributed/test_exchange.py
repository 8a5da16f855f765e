import torch
import torch.distributed as dist
from distributed_harness import run_distributed

from torchdistpackage import TopologyError
from torchdistpackage.topology.exchange import broadcast_json, gather_json


def exchange(rank, world):
    dist.init_process_group("gloo")
    values = [None, "ü" * 1000, {"1": [0.1, float("inf")]}]
    return gather_json(values[rank], dist.group.WORLD), broadcast_json(
        values[2] if rank == 0 else None, dist.group.WORLD
    )


def test_values_of_any_length_arrive_as_they_were():
    expected = [None, "ü" * 1000, {"1": [0.1, float("inf")]}]
    assert run_distributed(exchange, 3) == [(expected, expected[2])] * 3


def receive_noise(rank, world):
    dist.init_process_group("gloo")
    if rank == 0:  # as a peer that does not use this code
        dist.broadcast(torch.tensor([5]), src=0)
        dist.broadcast(torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8), src=0)
        return None
    try:
        return broadcast_json(None, dist.group.WORLD)
    except TopologyError as error:
        return str(error)


def test_what_is_not_json_is_refused():
    assert "5 bytes that are not JSON" in run_distributed(receive_noise, 2)[1]
