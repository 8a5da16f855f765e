"""Rows of layers and their slices; the concatenation of all stages is the model, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.sequential import (
    CallableModule,
    balanced_partition,
    flatten_model,
    flatten_sequence,
    uniform_partition,
)

RESNET: list[Any] = [
    *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"),
    lambda x: torch.flatten(x, 1),
    "fc",
]


class AddPositions(nn.Module):
    """What a ViT does between its patches and its blocks, with the two parameters that it needs."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


def vit_layers(vit: Any) -> list[Any]:
    blocks = [f"blocks.{index}" for index in range(12)]
    return ["patch_embed", AddPositions(vit), blocks, "norm", lambda x: x[:, 0], "fc_norm", "head_drop", "head"]


def sizes(row: list[nn.Module], num_stages: int, **kwargs: Any) -> list[int]:
    return [len(uniform_partition(row, num_stages, stage, **kwargs)) for stage in range(num_stages)]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


@pytest.mark.parametrize("num_stages", range(1, 6))
def test_resnet_stages_in_a_row_are_the_model(resnet: nn.Module, num_stages: int) -> None:
    resnet.eval()
    x = torch.randn(2, 3, 32, 32)
    row = flatten_model(resnet, RESNET, return_list=True)
    for cut in (uniform_partition, balanced_partition):
        value = x
        for stage in range(num_stages):
            value = nn.Sequential(*cut(row, num_stages, stage))(value)
        assert torch.equal(value, resnet(x))


def test_vit_by_dotted_names_is_the_model() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    row = flatten_model(vit, vit_layers(vit), return_list=True)
    value = x
    for stage in range(4):
        value = nn.Sequential(*balanced_partition(row, 4, stage, costs="flops", example_input=x))(value)
    assert torch.equal(value, vit(x))


def test_densenet_keeps_containers_that_have_their_own_forward() -> None:
    model = torchvision.models.densenet121(num_classes=3).eval()
    tail = [torch.relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), "classifier"]
    x = torch.randn(1, 3, 32, 32)
    for levels in (1, 2, None):
        assert torch.equal(flatten_model(model, ["features", *tail], levels=levels)(x), model(x))


def test_bug_18_uniform_leaves_no_stage_empty_and_spreads_the_rest() -> None:
    row = [nn.Linear(2, 2) for _ in range(7)]
    assert sizes(row, 4) == [2, 2, 2, 1]
    with pytest.raises(SplitError, match=r"2 layers cannot fill 4 stages"):
        sizes(row[:2], 4)
    for extra_len in range(-20, 20):
        stages = [uniform_partition(row, 4, stage, extra_len) for stage in range(4)]
        assert [layer for stage in stages for layer in stage] == row
        assert all(stages)


def test_bug_20_nested_containers_dotted_names_and_coverage() -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ModuleList([nn.Linear(2, 2)])[0])
    model.head = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)})
    assert len(flatten_model(model, ["body", "head"])) == 4
    assert len(flatten_model(model, ["body", "head"], levels=2)) == 5
    assert len(flatten_model(model, ["body", "head"], levels=None)) == 5
    assert flatten_model(model, ["body.0.0", "body.1", "head"], return_list=True)[0] is model.body[0][0]
    with pytest.raises(SplitError, match=r"leaves out body \(4 tensors\), head.b \(2 tensors\) of Module"):
        flatten_model(model, ["head.a"])
    assert len(flatten_model(model, ["head.a"], allow_missing=True)) == 1


def test_what_the_list_leaves_out_is_named(resnet: nn.Module) -> None:
    layer3 = ["layer3.0.conv1", "layer3.0.bn1", "layer3.0.conv2", "layer3.0.bn2", "layer3.1"]
    with pytest.raises(SplitError, match=r"leaves out bn1 \(5 tensors\), layer3.0.downsample \(6 tensors\) of ResNet"):
        flatten_model(resnet, ["conv1", "layer1", "layer2", layer3, "layer4", "fc"])
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with pytest.raises(SplitError, match=r"leaves out cls_token, pos_embed of .*a small nn.Module that holds them"):
        flatten_model(vit, ["patch_embed", "_pos_embed", "blocks", "norm", vit.pool, "head"])


def test_a_typo_gets_a_guess_and_the_names_there_are(resnet: nn.Module) -> None:
    with pytest.raises(SplitError, match=r"layer_list\[1\]: there is no 'layer5'; did you mean 'layer.'\? ResNet has"):
        flatten_model(resnet, ["conv1", "layer5"])
    with pytest.raises(SplitError, match=r"layer_list\[0\]\[1\].*mean 'layer1.0.conv2'\? layer1.0 \(BasicBlock\)"):
        flatten_model(resnet, [["conv1", "layer1.0.conv22"]])
    with pytest.raises(SplitError, match=r"there is no 'q'. ResNet has"):
        flatten_model(resnet, ["q"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, r"layer_list\[1\] is 3 \(int\)"),
        (None, r"layer_list\[1\] is None"),
        (nn.ReLU, r"the class ReLU; a layer is an object: ReLU\(...\)"),
        ("weight", "'weight' is a Parameter of the model, not a layer"),
    ],
)
def test_an_entry_that_is_no_layer(entry: Any, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        flatten_model(nn.Linear(2, 2), [nn.ReLU(), entry])


def test_a_module_list_needs_a_level() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])
    with pytest.raises(SplitError, match=r"layer_list\[0\].0 is a ModuleList, which cannot be called.*raise levels"):
        flatten_model(model, ["blocks"])
    assert len(flatten_model(model, ["blocks"], levels=2)) == 1


def test_a_layer_may_come_twice_and_need_not_be_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    row = flatten_model(model, ["0", nn.ReLU(), model[0], "forward"], return_list=True)
    assert row[0] is row[2]
    assert isinstance(row[1], nn.ReLU)
    assert isinstance(row[3], CallableModule)


def test_flatten_sequence_levels() -> None:
    inner = nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU())
    outer = nn.Sequential(inner, nn.Linear(1, 1))
    assert [len(flatten_sequence(outer, level)) for level in range(4)] == [2, 3, 4, 4]
    assert [len(flatten_sequence(list(outer), level)) for level in range(3)] == [2, 3, 4]
    assert len(flatten_sequence(nn.ModuleList([outer, outer]), 1)) == 4


def test_functions_in_a_row_become_modules() -> None:
    row = [nn.Linear(4, 4), lambda x: x * 2, torch.relu]
    stage = nn.Sequential(*uniform_partition(row, 1, 0))
    assert stage(torch.ones(1, 4)).shape == (1, 4)
    assert "relu" in repr(stage)
    assert not list(CallableModule(torch.relu).state_dict())


@pytest.mark.parametrize("sequence", [nn.Linear(2, 2), 3, None])
def test_a_sequence_that_is_none(sequence: Any) -> None:
    with pytest.raises(SplitError, match=r"not a sequence of layers"):
        flatten_sequence(sequence)


def test_partition_errors() -> None:
    row = [nn.Linear(2, 2) for _ in range(4)]
    with pytest.raises(SplitError, match=r"there is no stage 2: 2 stages are numbered from 0 to 1"):
        uniform_partition(row, 2, 2)
    with pytest.raises(SplitError, match=r"only flatten_model"):
        flatten_sequence(["fc"])  # type: ignore[list-item]
