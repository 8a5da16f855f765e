"""Recorded models of torchvision, timm and transformers have the weights of those that are built."""

import pytest
import torch
from language_models import MORE, OPTIONS, configuration

from torchdistpackage.split.deferred_init import record_init
from torchdistpackage.split.places import places_of

VISION = ["resnet50", "vit_b_16", "swin_t", "efficientnet_b0", "convnext_tiny", "mobilenet_v3_small", "densenet121"]
TIMM = [
    "vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0",
    "mixer_s32_224", "deit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "levit_128s",
    "maxvit_tiny_rw_224", "regnety_002", "coat_tiny", "xcit_nano_12_p16_224",
]  # fmt: skip


def assert_recorded(model_init):
    torch.manual_seed(0)
    wanted = {place.name: place.tensor for place in places_of(model_init())}
    end = torch.get_rng_state()
    recorded = record_init(model_init, seed=0)
    assert recorded.reason is None
    recorded.fill([recorded.model])
    assert torch.equal(torch.get_rng_state(), end)
    found = {place.name: place.tensor for place in places_of(recorded.model)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def language_model(family, **options):
    transformers = pytest.importorskip("transformers")
    config = configuration(family)
    return lambda: transformers.AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen3", "Mixtral"])
def test_some_language_models(family):
    assert_recorded(language_model(family))


def test_a_language_model_in_half_precision():
    assert_recorded(language_model("Llama", dtype=torch.bfloat16))


def test_a_residual_net_and_a_transformer_for_images():
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    assert_recorded(torchvision.models.resnet18)
    assert_recorded(lambda: timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("family", [*OPTIONS, *MORE])
def test_all_language_models(family):
    assert_recorded(language_model(family))


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_models_of_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    assert_recorded(lambda: torchvision.models.get_model(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    assert_recorded(lambda: timm.create_model(name, drop_path_rate=0.1))
