"""Models that people train, one of each kind, cut and compared with the whole model; benchmarks/zoo has all."""

from contextlib import contextmanager

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure

from torchdistpackage.split import split


def torchvision_model(name, **options):
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def timm_model(name, **options):
    return lambda: timm.create_model(name, num_classes=10, **options)


def detector_backbone():
    return torchvision.models.detection.backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_small", weights=None, fpn=True, norm_layer=nn.BatchNorm2d, trainable_layers=6
    )


IMAGE = (3, 64, 64)
ZOO = {
    "densenet121: concatenations": (torchvision_model("densenet121"), IMAGE),
    "googlenet: losses on the side": (torchvision_model("googlenet", init_weights=False), IMAGE),
    "mobilenet_v3_small: squeeze and excitation": (torchvision_model("mobilenet_v3_small"), IMAGE),
    "swin_t: windows": (timm_model("swin_tiny_patch4_window7_224", img_size=64), IMAGE),
    "lraspp: a dictionary of maps": (torchvision_model("lraspp_mobilenet_v3_large", weights_backbone=None), IMAGE),
    "r2plus1d_18: clips": (torchvision_model("r2plus1d_18"), (3, 4, 32, 32)),
    "feature pyramid": (detector_backbone, IMAGE),
    "vit_tiny: tokens": (timm_model("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.2), IMAGE),
    "coat_tiny: parallel branches": (timm_model("coat_tiny", img_size=64), IMAGE),
    "dla46x_c: trees": (timm_model("dla46x_c"), IMAGE),
    "levit_128s: distilled": (timm_model("levit_128s", img_size=64), IMAGE),
    "xcit_nano: class attention": (timm_model("xcit_nano_12_p16_224", img_size=64), IMAGE),
}


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@contextmanager
def buffers_kept(model):
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])


def trained(model, run, x):
    """Loss, gradients and running statistics after one step."""
    model.zero_grad()
    with buffers_kept(model):
        torch.manual_seed(1)
        loss = sum(leaf.square().mean() for leaf in tensors(run(x)))
        loss.backward()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"loss": loss.detach(), **buffers, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(mine, theirs):
    """Bitwise."""
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def evaluated(run, x):
    run.eval()
    with torch.no_grad():
        output = run(x)
    run.train()
    return output


@pytest.mark.parametrize("name", ZOO)
def test_a_model_that_people_train(name):
    torch.manual_seed(0)
    build, shape = ZOO[name]
    model = build().train()
    x, other = torch.randn(4, *shape), torch.randn(3, *shape)
    training, output = trained(model, model, x), evaluated(model, other)
    for num_stages in (2, 4):
        pipe = split(model, x, num_stages, costs="flops")
        assert_same(trained(model, pipe, x).values(), training.values())
        found = evaluated(pipe, other)
        assert type(found) is type(output)
        assert str(tree_structure(found)) == str(tree_structure(output))
        assert_same(tensors(found), tensors(output))
        held = [pipe.get_stage_module(stage).state_dict(keep_vars=True) for stage in range(num_stages)]
        wanted, objects = model.state_dict(keep_vars=True), {id(t) for state in held for t in state.values()}
        assert {key for state in held for key in state} <= set(wanted)
        assert {id(t) for t in wanted.values()} == objects
