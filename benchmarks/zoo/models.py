"""The models of the zoo: how each one is built, without weights from anywhere, and the smallest input that it takes.

Images are 64 x 64 pixels where the model allows it: what is tested is where a forward can be cut, and that does not
depend on the size. Who fixes the size of its maps (windows that must divide, heads that pool 7 x 7) says so below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torchvision
from torch import nn
from torchvision.models import detection

__all__ = ["CATALOGUE", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        family: Under which it is summed up.
        name: Of the row in the table.
        build: Makes it.
        shape: Of one row of its input.
        rows: Of a training batch.
    """

    family: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int = 4


# torchvision: other than (3, 64, 64), and what the constructor has to know of it.
_SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
_CLIPS = {"s3d": (14, 224, 224), "mvit_v1_b": (16, 224, 224), "mvit_v2_s": (16, 224, 224)}

# timm: module -> its smallest configuration by parameters (those made for tests left out) and the size of the image.
# "!" where the constructor has to know the size.
_TIMM = """
beit beit_base_patch16_224 64!
byoanet halonet_h1 256
byobnet mobileone_s1 64
cait cait_xxs24_224 64!
coat coat_tiny 64!
convit convit_tiny 64!
convmixer convmixer_768_32 64
convnext convnext_zepto_rms 64
cpubone cpubone_nano 64
crossvit crossvit_tiny_240 64
csatv2 csatv2 64
cspnet cs3darknet_focus_s 64
cspnext cspnext_tiny 64
davit davit_tiny 64
deepseek_vit deepseek_vit_412m 56
deit deit_tiny_patch16_224 64!
densenet densenet121 64
dla dla46x_c 64
dpn dpn48b 64
edgenext edgenext_xx_small 64
efficientformer efficientformer_l1 224
efficientformer_v2 efficientformerv2_s0 64!
efficientnet mobilenetv2_035 64
efficientvim efficientvim_m1 64
efficientvit_mit efficientvit_b0 64
efficientvit_msra efficientvit_m0 64
eva vit_tiny_patch16_dinov3_qkvb 64
fasternet fasternet_t0 64
fastvit fastvit_t8 64
focalnet focalnet_tiny_srf 64
gcvit gcvit_xxtiny 64!
gemma4_vit gemma4_vit_167m 64
ghostnet ghostnet_050 64
hardcorenas hardcorenas_b 64
hgnet hgnetv2_b0 64
hiera hiera_tiny_224 64!
hieradet_sam2 sam2_hiera_tiny 64
hrnet hrnet_w18_small 64
iformer iformer_t 64
inception_next inception_next_atto 64
inception_resnet_v2 inception_resnet_v2 96
inception_v3 inception_v3 96
inception_v4 inception_v4 96
lcnetv2 lcnetv2_small 64
levit levit_128s 64!
lowformer lowformer_b0 64
mambaout mambaout_femto 64
maxxvit maxvit_pico_rw_256 64!
metaformer poolformerv2_s12 64
mlp_mixer gmlp_ti16_224 64!
mobilenetv3 mobilenetv3_small_050 64
mobilenetv5 mobilenetv5_base 64
mobilevit mobilevit_xxs 64
mvitv2 mvitv2_tiny 64
naflexvit naflexvit_base_patch16_parfac_gap 64
nasnet nasnetalarge 64
nest nest_tiny 64!
nextvit nextvit_small 64
nfnet nf_regnet_b0 64
pit pit_ti_224 64!
pnasnet pnasnet5large 64
pvt_v2 pvt_v2_b0 64
qwen3_vit qwen3_vit_88m 64
rdnet rdnet_tiny 64
regnet regnetx_002 64
repghost repghostnet_050 64
repvit repvit_m1 64
res2net res2next50 64
resnest resnest14d 64
resnet resnet10t 64
resnetv2 resnetv2_18 64
rexnet rexnet_100 64
selecsls selecsls42 64
senet legacy_seresnet18 64
sequencer sequencer2d_s 64
shvit shvit_s1 64
sknet skresnet18 64
starnet starnet_s050 64
swiftformer swiftformer_xs 64
swin_transformer swin_tiny_patch4_window7_224 64!
swin_transformer_v2 swinv2_tiny_window16_256 64!
swin_transformer_v2_cr swinv2_cr_tiny_224 64!
tiny_vit tiny_vit_5m_224 64
tnt tnt_s_legacy_patch16_224 64!
tresnet tresnet_m 64
twins twins_svt_small 64
vgg vgg11 64
visformer visformer_tiny 64!
vision_transformer vit_tiny_patch16_224 64!
vision_transformer_hybrid vit_tiny_r_s16_p8_224 64!
vision_transformer_relpos vit_srelpos_small_patch16_224 64!
vision_transformer_sam samvit_base_patch16_224 64
vitamin vitamin_small_224 64!
volo volo_d1_224 64!
vovnet ese_vovnet19b_slim_dw 64
xception legacy_xception 64
xception_aligned xception41p 64
xcit xcit_nano_12_p8_224 64
"""


def _torchvision() -> list[Entry]:
    models = torchvision.models
    found = []
    for name in models.list_models(module=models):
        size = _SIZES.get(name, 64)
        options = {"image_size": size} if name.startswith("vit_") else {}
        found.append(Entry("torchvision classification", name, _getter(name, **options), (3, size, size)))
    for name in models.list_models(module=models.segmentation):
        found.append(Entry("torchvision segmentation", name, _getter(name, weights_backbone=None), (3, 64, 64)))
    for name in models.list_models(module=models.video):
        clip = _CLIPS.get(name, (8, 64, 64))
        found.append(Entry("torchvision video", name, _getter(name), (3, *clip), 2 if name in _CLIPS else 4))
    return found


def _getter(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def _backbones() -> list[Entry]:
    """What detectors put before their heads; the heads themselves look at the numbers of their proposals."""

    def of(name: str) -> Callable[[], nn.Module]:
        return lambda: torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone

    makers: dict[str, Callable[[], nn.Module]] = {
        "resnet_fpn_backbone(resnet18)": lambda: detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        ),
        "mobilenet_backbone(mobilenet_v3_small, fpn)": lambda: detection.backbone_utils.mobilenet_backbone(
            backbone_name="mobilenet_v3_small", weights=None, fpn=True, norm_layer=nn.BatchNorm2d, trainable_layers=6
        ),
    }
    # One of each kind: the detectors that are left out have the backbone of another one.
    kinds = (
        "fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn "
        "retinanet_resnet50_fpn_v2 ssd300_vgg16 ssdlite320_mobilenet_v3_large"
    )
    makers |= {f"{name}.backbone": of(name) for name in kinds.split()}
    sizes = {"ssd300_vgg16.backbone": 300, "ssdlite320_mobilenet_v3_large.backbone": 320}
    return [
        Entry("torchvision detection", name, make, (3, sizes.get(name, 128), sizes.get(name, 128)))
        for name, make in makers.items()
    ]


def _timm() -> list[Entry]:
    found = []
    for line in _TIMM.split("\n"):
        if not line:
            continue
        module, name, size = line.split()
        pixels = int(size.rstrip("!"))
        options = {"img_size": pixels} if size.endswith("!") else {}
        build = _creator(name, options)
        found.append(Entry("timm", f"{module}/{name}", build, (3, pixels, pixels)))
    return found


def _creator(name: str, options: dict[str, int]) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


CATALOGUE: tuple[Entry, ...] = tuple([*_torchvision(), *_backbones(), *_timm()])
