"""Tensor parallelism of other people's models: the whole model's outputs, gradients, norms and optimizer steps."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import start
from language_models import language_model, padded
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from torchdistpackage import PipelineError, SplitError, clip_grad_norm_, forward_backward, tpc
from torchdistpackage.parallel.tensor_parallel import (
    FreshRowwise,
    FusedColwise,
    SharedColwise,
    WholeOnShards,
    apply_tensor_parallel,
    tensor_parallel_plan,
)

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(model, run, rank, tolerance=1e-9):
    """Two backwards, a clipped norm and an AdamW step of the sharded and of the whole model."""
    other = copy.deepcopy(model)
    for parameter in other.parameters() if rank else ():
        parameter.data.fill_(rank)  # all start with the weights of the first rank
    sharded = apply_tensor_parallel(other)
    outputs = []
    for each in (sharded, model):
        outputs.append(run(each))
        outputs[-1].square().mean().backward()
        run(each).square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    wanted = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        gradient, expected = parameter.grad, wanted[name].grad
        assert (gradient is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(whole(gradient), expected, rtol=tolerance, atol=tolerance, msg=name)
    norms = [
        clip(each.parameters(), 0.01)
        for clip, each in zip((clip_grad_norm_, nn.utils.clip_grad_norm_), (sharded, model), strict=True)
    ]
    torch.testing.assert_close(*norms, rtol=tolerance, atol=tolerance)
    for each in (sharded, model):
        torch.optim.AdamW(each.parameters(), lr=0.01).step()
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(whole(parameter), wanted[name], rtol=100 * tolerance, atol=100 * tolerance, msg=name)
    assert sharded.state_dict().keys() == model.state_dict().keys()
    return sum(hasattr(p, "full_tensor") for p in sharded.parameters())


def vision_transformer(**options):
    kind = timm.models.vision_transformer.VisionTransformer
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5}
    return kind(**{**sizes, **options}).double()


def vision(rank, world):
    start(1, config=[("tensor", world)])
    images, found = torch.randn(3, 3, 16, 16).double(), {}
    cases = {
        "plain": {},
        "norms of heads, scaled layers": {"qk_norm": True, "init_values": 0.1},
        "gated": {"mlp_layer": timm.layers.GluMlp},
        "SwiGLU": {"mlp_layer": timm.layers.SwiGLU},
        "no bias": {"qkv_bias": False, "proj_bias": False},
    }
    for name, options in cases.items():
        found[name] = compare(vision_transformer(**options), lambda model: model(images), rank)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_vision_transformers(world):
    found = run_distributed(vision, world, timeout=90)[0]
    sharded = {"plain": 16, "norms of heads, scaled layers": 24, "gated": 16, "SwiGLU": 20, "no bias": 8}
    assert found == (sharded if world > 1 else dict.fromkeys(sharded, 0))


def languages(rank, world):
    start(1, config=[("tensor", world)])
    ids, mask = padded()
    found = {}
    for family in ("Llama", "Qwen3", "Gemma2", "Phi3", "Mistral", "Mixtral", "Gemma3nText"):
        model = language_model(family, layers=5 if family == "Gemma3nText" else 2)
        found[family] = compare(model, lambda m: m(ids, attention_mask=mask, use_cache=False).logits, rank, 2e-5)
    return found


def test_language_models():
    found = run_distributed(languages, 2, timeout=120)[0]
    assert found["Llama"] == 16  # 7 a layer, the embedding and the head
    assert found["Qwen3"] == 20  # and two norms of heads a layer, whole on every rank
    assert found["Mixtral"] == 10  # experts stay whole


def plans(rank, world):
    start(1, config=[("tensor", world)])
    plan = tensor_parallel_plan(language_model("Qwen3", layers=1))
    kinds = {name.removeprefix("model.layers.0."): type(style) for name, style in plan.items()}
    assert kinds["self_attn.q_proj"] is kinds["self_attn.v_proj"] is kinds["mlp.up_proj"] is SharedColwise
    assert plan["model.layers.0.mlp.up_proj"] is plan["model.layers.0.mlp.gate_proj"]
    assert plan["model.layers.0.mlp.up_proj"] is not plan["model.layers.0.self_attn.q_proj"]
    assert kinds["self_attn.o_proj"] is kinds["mlp.down_proj"] is FreshRowwise
    assert kinds["self_attn.q_norm"] is WholeOnShards
    assert kinds["lm_head"] is ColwiseParallel
    tied = tensor_parallel_plan(language_model("Gemma2", layers=1))
    assert not {"lm_head", "model.embed_tokens"} & tied.keys()
    assert str(tensor_parallel_plan(vision_transformer())["blocks.1.attn"]) == "LocalHeads(2 of 4)"


def test_what_a_plan_says():
    run_distributed(plans, 2)


def refusals(rank, world):
    start(1, config=[("tensor", world)])
    with pytest.raises(SplitError, match=r"blocks.0.attn has 3 heads, which do not divide by 2 ranks"):
        apply_tensor_parallel(vision_transformer(embed_dim=12, num_heads=3))
    with pytest.raises(SplitError, match=r"k_proj has 1 heads"):
        apply_tensor_parallel(language_model("Llama", layers=1, num_key_value_heads=1))
    with pytest.raises(SplitError, match=r"no layer of Sequential is known .* pass plan="):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SplitError, match=r"the plan names first, which Sequential does not have"):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)), {"first": ColwiseParallel()})
    with pytest.raises(SplitError, match=r"the plan names foo.\*, which Sequential does not have"):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)), {"foo.*": ColwiseParallel()})
    with pytest.raises(SplitError, match=r"the plan is empty"):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)), {})
    with pytest.raises(SplitError, match=r"the plan has 'colwise' for 0; pass a style"):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 2)), {"0": "colwise"})
    with pytest.raises(SplitError, match=r"9 outputs in 3 parts do not divide by 2"):
        apply_tensor_parallel(nn.Sequential(nn.Linear(2, 9)), {"0": FusedColwise(3)})
    model = apply_tensor_parallel(vision_transformer())
    with pytest.raises(SplitError, match=r"is a DTensor already"):
        apply_tensor_parallel(model)
    assert dist.get_world_size() == world


def test_what_cannot_be_sharded_is_said():
    run_distributed(refusals, 2)


def own_plan(rank, world):
    start(1, config=[("tensor", world)])
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    model, x = copy.deepcopy(layers), torch.randn(3, 4).double()
    apply_tensor_parallel(layers, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss = forward_backward(None, lambda x: layers(x).square().mean(), None, x, 2)
    model(x).square().mean().backward()
    torch.testing.assert_close(loss, model(x).square().mean())
    for norm_type in (1.0, 2.0, 3.0, float("inf")):
        mine = clip_grad_norm_(layers.parameters(), 1e9, norm_type)
        torch.testing.assert_close(mine, nn.utils.clip_grad_norm_(model.parameters(), 1e9, norm_type))


def test_a_plan_of_ones_own_and_every_kind_of_norm():
    run_distributed(own_plan, 2)


def other_group(rank, world):
    """Tensor groups that tpc knows nothing of: global ranks [0, 1] and [2, 3]."""
    start(1, config=[("data", world)])
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, images = vision_transformer(), torch.randn(2, 3, 16, 16).double()
    sharded = apply_tensor_parallel(copy.deepcopy(model), group=pairs[rank // 2])
    torch.testing.assert_close(sharded(images), model(images))
    sharded(images).square().mean().backward()
    model(images).square().mean().backward()
    norms = clip_grad_norm_(sharded.parameters(), 1.0), nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(*norms)


def test_a_group_that_the_topology_does_not_know():
    run_distributed(other_group, 4)


def reductions(rank, world):
    """All-reduces in one forward and backward of an MLP whose two first layers read one tensor."""
    start(1, config=[("tensor", world)])
    model = apply_tensor_parallel(language_model("Llama", layers=1)).model.layers[0].mlp
    x = torch.randn(2, 3, 32, requires_grad=True)
    with torch.profiler.profile() as profile:
        model(x).mean().backward()
    return sum(event.name == "gloo:all_reduce" for event in profile.events())


def test_layers_side_by_side_enter_once():
    assert run_distributed(reductions, 2) == [2, 2]  # one in the forward, one in the backward


def kept(rank, world):
    """Nothing of a step is held once it is over."""
    start(1, config=[("tensor", world)])
    import gc
    import weakref

    layer = apply_tensor_parallel(language_model("Llama", layers=1)).model.layers[0]
    x = torch.randn(2, 3, 32)
    seen = weakref.ref(x)
    layer.mlp(x)
    del x
    gc.collect()
    assert seen() is None
    copied = copy.deepcopy(layer.mlp)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(copied(x), layer.mlp(x))


def test_nothing_is_held_after_a_step():
    run_distributed(kept, 2)


def data_parallel(rank, world):
    from torchdistpackage import DDP

    start(1, config=[("data", 1), ("tensor", 2)])
    with pytest.raises(PipelineError, match="cannot hold DTensors, and VisionTransformer .* NaiveDDP"):
        DDP(apply_tensor_parallel(vision_transformer()))
    assert tpc.get_tp_size() == 2


def test_torchs_ddp_cannot_hold_dtensors():
    run_distributed(data_parallel, 2)
