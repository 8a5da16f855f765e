"""Whole-model names survive cutting, wrapping, copying; ties across stages are known."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.names import whole_model_names
from torchdistpackage.split.sequential import balanced_partition, flatten_model, flatten_sequence, uniform_partition
from torchdistpackage.split.ties import shared_parameters, ties_in, ties_of
from torchdistpackage.split.whole_state import load_whole_model_state_dict, whole_model_state_dict

RESNET: list[Any] = [
    *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"),
    lambda x: torch.flatten(x, 1),
    "fc",
]


class Tied(nn.Module):
    """A small language model: a buffer that is not saved, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.blocks[0].register_buffer("mask", torch.ones(2), persistent=False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


class Scale(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.factor, self.shift = scale, nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.shift


def resnet_stages(num_stages: int, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=10)
    row = flatten_model(model, RESNET, return_list=True)
    return model, [nn.Sequential(*uniform_partition(row, num_stages, stage)) for stage in range(num_stages)]


def tied_row(model: Tied) -> list[nn.Module]:
    return flatten_model(model, ["embed", Scale(model.scale), list(model.blocks), "head"], True, levels=0)


def merged(stages: list[nn.Module]) -> dict[str, torch.Tensor]:
    return {name: tensor for stage in stages for name, tensor in whole_model_state_dict(stage).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_every_parameter_and_buffer_has_its_name(num_stages: int) -> None:
    model, stages = resnet_stages(num_stages, 0)
    for stage in stages:
        local = dict(stage.named_parameters()) | dict(stage.named_buffers())
        names = whole_model_names(stage)
        assert set(names) == set(local)
        assert all(model.get_parameter(names[key]) is value for key, value in stage.named_parameters())
    assert_same(merged(stages), model.state_dict())


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_checkpoint_of_two_stages_loads_into_another_number(num_stages: int) -> None:
    model, two = resnet_stages(2, 0)
    other, stages = resnet_stages(num_stages, 1)
    for stage in stages:
        load_whole_model_state_dict(stage, merged(two))
    assert_same(other.state_dict(), model.state_dict())
    torchvision.models.resnet18(num_classes=10).load_state_dict(merged(stages))


def test_neither_state_dict_nor_repr_of_the_users_modules_changes() -> None:
    plain = torchvision.models.resnet18(num_classes=10)
    model, _ = resnet_stages(3, 0)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_names_survive_wrappers(tmp_path: Path) -> None:
    _, stages = resnet_stages(2, 0)
    names, state = whole_model_names(stages[1]), whole_model_state_dict(stages[1])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(DistributedDataParallel(stages[1]))
        assert set(whole_model_names(wrapped).values()) == set(names.values())
        assert set(whole_model_names(wrapped)) == {name for name, _ in wrapped.named_parameters()} | {
            name for name, _ in wrapped.named_buffers()
        }
        assert_same(whole_model_state_dict(wrapped), state)
        load_whole_model_state_dict(wrapped, state)
    finally:
        dist.destroy_process_group()
    stages[1][0] = torch.compile(stages[1][0])  # a wrapper inside
    assert_same(whole_model_state_dict(stages[1]), state)


def test_names_survive_copies_pickles_and_later_modules() -> None:
    _, stages = resnet_stages(2, 0)
    stage = nn.Sequential(*(layer for layer in stages[1] if not hasattr(layer, "fn")))  # a lambda cannot be pickled
    names = whole_model_names(stage)
    file = io.BytesIO()
    torch.save(stage, file)
    file.seek(0)
    for other in (copy.deepcopy(stage), torch.load(file, weights_only=False)):
        assert whole_model_names(other) == names
    stage[-1].adapter = nn.Linear(2, 2, bias=False)
    assert "fc.adapter.weight" in whole_model_names(stage).values()


def test_borrowed_and_added_tensors() -> None:
    model = Tied()
    row = tied_row(model)
    stages = [nn.Sequential(*uniform_partition(row, 2, stage)) for stage in range(2)]
    added = {"added_layers.1.shift"}
    assert set(merged(stages)) == set(model.state_dict()) | added
    assert "scale" in whole_model_names(stages[0]).values()
    assert "blocks.0.mask" in whole_model_names(stages[0]).values()  # named, though it is not saved


def test_a_layer_with_two_names_is_saved_under_both() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(2, 2)
    row = flatten_model(model, ["first", nn.ReLU(), "second"], return_list=True)
    stages = [nn.Sequential(*uniform_partition(row, 2, stage)) for stage in range(2)]
    assert_same(merged(stages), model.state_dict())
    only_first = {"first.weight": torch.ones(2, 2), "first.bias": torch.ones(2)}
    load_whole_model_state_dict(stages[1], only_first)
    assert_same(model.state_dict(), only_first | {"second.weight": torch.ones(2, 2), "second.bias": torch.ones(2)})


def test_flatten_sequence_names_layers_but_does_not_rename_them() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    assert set(whole_model_names(nn.Sequential(*flatten_sequence(model))).values()) == set(model.state_dict())
    flat = flatten_model(torchvision.models.resnet18(), RESNET)
    assert "fc.weight" in whole_model_names(nn.Sequential(*uniform_partition(flat, 2, 1))).values()


def test_loading_is_strict_and_all_or_nothing() -> None:
    model, stages = resnet_stages(2, 0)
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    before = copy.deepcopy(stages[1].state_dict())
    cases = ((None, "121 keys, but not fc.bias;"), (torch.zeros(3), r"fc.bias is \(3,\) in the state and \(10,\)"))
    for damage, message in cases:
        broken = {name: tensor for name, tensor in state.items() if name != "fc.bias"}
        broken |= {} if damage is None else {"fc.bias": damage}
        with pytest.raises(CheckpointError, match=message):
            load_whole_model_state_dict(stages[1], broken)
        assert_same(stages[1].state_dict(), before)
    with pytest.raises(CheckpointError, match=r"not layer3.0.conv1.weight, .* and 54 more; merge the parts"):
        load_whole_model_state_dict(stages[1], whole_model_state_dict(stages[0]))


def test_loading_onto_meta_says_what_to_do() -> None:
    with torch.device("meta"):
        stage = nn.Sequential(*flatten_sequence(nn.Sequential(nn.Linear(2, 2))))
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"to_empty"):
        load_whole_model_state_dict(stage, state)
    load_whole_model_state_dict(stage.to_empty(device="cpu"), state)
    assert stage[0].weight.sum() == 4


def test_unknown_layers_and_copies_within_a_stage() -> None:
    with pytest.raises(SplitError, match=r"0.weight \(Linear\) has no whole-model name; .*flatten_model"):
        whole_model_names(nn.Sequential(nn.Linear(2, 2)))
    layer = flatten_sequence(nn.Sequential(nn.Linear(2, 2)))[0]
    with pytest.raises(SplitError, match=r"0.weight and 1.weight are both 0.weight of the model"):
        whole_model_names(nn.Sequential(layer, copy.deepcopy(layer)))
    assert len(whole_model_names(nn.Sequential(layer, layer))) == 4


@pytest.mark.parametrize("cut", [uniform_partition, balanced_partition])
def test_a_tied_weight_is_known_on_every_stage(cut: Any) -> None:
    model = Tied()
    row = tied_row(model)
    stages = [nn.Sequential(*cut(row, 3, stage)) for stage in range(3)]
    tie = ties_of(model.head.weight)
    assert tie is not None
    assert tie.parameter is model.embed.weight
    assert (tie.name, tie.names, tie.stages) == ("embed.weight", ("embed.weight", "head.weight"), (0, 2))
    assert ties_of(model.scale) is None
    assert [list(ties_in(stage).values()) for stage in stages] == [[tie], [], [tie]]
    assert list(ties_in(copy.deepcopy(stages[0]))) == ["0.weight"]
    uniform_partition(row, 1, 0)  # now the two are on one stage
    assert ties_of(model.head.weight) is None
    assert ties_in(stages[0]) == {}


def test_a_tie_outlives_the_meta_device() -> None:
    with torch.device("meta"):
        row = tied_row(Tied())
    stage = nn.Sequential(*uniform_partition(row, 2, 1)).to_empty(device="cpu")
    head = stage[-1].weight
    assert ties_of(head) is None  # another object took the parameter's place
    assert [(tie.names, tie.parameter is head) for tie in ties_in(stage).values()] == [
        (("embed.weight", "head.weight"), True)
    ]


def test_a_tied_weight_loads_by_either_name() -> None:
    model = Tied()
    row = tied_row(model)
    stage = nn.Sequential(*uniform_partition(row, 2, 1))
    state = {name: tensor for name, tensor in whole_model_state_dict(stage).items() if name != "head.weight"}
    load_whole_model_state_dict(stage, state | {"embed.weight": torch.full((10, 4), 7.0)})
    assert (model.head.weight == 7).all()


def test_shared_parameters_of_layers_without_names() -> None:
    layer, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    (tied,) = shared_parameters([layer, other, layer, layer], (0, 1, 3, 4))
    assert (tied.name, tied.names, tied.stages) == ("0.weight", ("0.weight", "2.weight", "3.weight"), (0, 1, 2))
    assert shared_parameters([layer, layer, other], (0, 2, 3)) == ()
    with pytest.raises(SplitError, match=r"boundaries \(0, 2\) do not run from 0 to the number of layers, 3"):
        shared_parameters([layer, layer, other], (0, 2))


def test_noting_ties_keeps_nothing_alive() -> None:
    row = tied_row(Tied())
    uniform_partition(row, 2, 0)
    weight = weakref.ref(row[0].weight)
    assert ties_of(row[0].weight) is not None
    del row
    gc.collect()
    assert weight() is None
