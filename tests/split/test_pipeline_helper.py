"""The stage of this rank: explicit stages without processes, and three ranks that must agree."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.pipeline_helper import (
    flat_and_partition,
    flatten_model,
    partition_balanced,
    partition_chunks,
    partition_uniform,
)
from torchdistpackage.split.names import whole_model_names
from torchdistpackage.topology import tpc


def test_bug_19_balanced_works_with_and_without_sequence() -> None:
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 800)]
    kwargs: dict[str, Any] = {"num_stages": 2, "stage": 1}
    assert partition_balanced(layers, **kwargs) == partition_balanced(layers, nn.Sequential(*layers), **kwargs)
    assert flat_and_partition(nn.Sequential(*layers), partition_policy="balanced", **kwargs) == [layers[3]]
    assert flat_and_partition([layers[:2], layers[2:]], **kwargs) == layers[2:]
    # one heavy layer and fewer "full" blocks than stages: where the name was missing
    assert len(partition_balanced([nn.Linear(99, 99), *layers[:3]], num_stages=4, stage=3)) == 1


def test_weights_of_the_caller() -> None:
    row = [nn.ReLU() for _ in range(4)]
    assert len(partition_balanced(row, weights=[1, 1, 1, 3], num_stages=2, stage=0)) == 3


def test_arguments_that_contradict() -> None:
    row = [nn.Linear(2, 2) for _ in range(4)]
    with pytest.raises(SplitError, match=r"give both, or neither"):
        partition_uniform(row, num_stages=2)
    with pytest.raises(SplitError, match=r"pass one of them"):
        partition_balanced(row, weights=[1] * 4, costs="flops", num_stages=2, stage=0)
    with pytest.raises(SplitError, match=r"unknown partition_policy 'best'; use 'uniform' or 'balanced'"):
        flat_and_partition(row, partition_policy="best")


def cut_on_every_rank(rank: int, world_size: int) -> list[int]:
    """Sizes of this rank's stages; each rank finds another layer slow, so that on its own each would cut elsewhere."""
    dist.init_process_group("gloo")
    tpc.setup_process_groups([("pipe", world_size)])
    row = [lambda x, seconds=0.2 * (index == 2 * rank): (time.sleep(seconds), x)[1] for index in range(6)]
    cuts: list[list[nn.Module]] = [
        partition_uniform(row),
        partition_balanced(row, weights=[1, 1, 1, 1, 1, 9]),
        flat_and_partition(row, partition_policy="balanced", costs="time", example_input=torch.zeros(1)),
    ]
    with pytest.raises(SplitError, match=r"first rank of the pipeline could not measure.*pass example_input"):
        partition_balanced(row, costs="time")
    return [len(cut) for cut in cuts]


def test_every_rank_keeps_its_own_stage_and_all_cut_alike() -> None:
    uniform, weighted, timed = zip(*run_distributed(cut_on_every_rank, 3), strict=True)
    assert uniform == (2, 2, 2)
    assert weighted == (2, 3, 1)
    assert sum(timed) == 6
    assert timed[0] == 1


def replicas_cut(rank: int, world_size: int) -> tuple[int, dict[int, int]]:
    """Every rank would find another layer slow; the stages of replicas must fit together."""
    dist.init_process_group("gloo")
    tpc.setup_process_groups([("data", 2), ("pipe", world_size // 2)])
    row = [lambda x, seconds=0.1 * (index == 2 * rank): (time.sleep(seconds), x)[1] for index in range(8)]
    example: dict[str, Any] = {"costs": "time", "example_input": torch.zeros(1)}
    chunks = partition_chunks(row, "interleaved-1f1b", 2, policy="balanced", **example)
    return len(partition_balanced(row, **example)), {index: len(stage) for index, stage in chunks.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_cut_alike_whatever_each_measures(world: int) -> None:
    cuts = run_distributed(replicas_cut, world)
    first, second = cuts[: world // 2], cuts[world // 2 :]
    assert first == second
    assert sum(size for _, chunks in first for size in chunks.values()) == 8
    assert first[0][1][0] == 1  # the layer that the very first rank finds slow


def names_of_the_example(rank: int, world_size: int) -> list[str]:
    import torchvision

    dist.init_process_group("gloo")
    tpc.setup_process_groups([("pipe", world_size)])
    layer_list: list[Any] = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    layer_list += [lambda x: torch.flatten(x, 1), "fc"]
    flat_model = flatten_model(torchvision.models.resnet18(), layer_list, return_list=True)
    md_list = partition_uniform(flat_model)
    return list(whole_model_names(torch.nn.Sequential(*md_list)).values())


def test_the_resnet_example_on_two_ranks() -> None:
    import torchvision

    first, second = run_distributed(names_of_the_example, 2)
    assert sorted([*first, *second]) == sorted(torchvision.models.resnet18().state_dict())
