"""Language models in stages on a CUDA device, with the kinds of attention that exist only there."""

import importlib.util

import pytest
import torch
from language_models import OPTIONS, language_model, padded

from torchdistpackage import split_causal_lm
from torchdistpackage.split import new_cache

pytest.importorskip("transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KINDS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


def run(parts, x, caches=None, **kwargs):
    for number, part in enumerate(parts.values()):
        x = part(x, **kwargs, **({} if caches is None else {"past_key_values": caches[number]}))
    return x


@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_stages_on_a_device(family, kind):
    if kind.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    try:
        model = language_model(family, attn_implementation=kind).cuda().to(torch.bfloat16)
    except ValueError as error:
        pytest.skip(f"{family} has no {kind}: {error}"[:80])
    ids, mask = (tensor.cuda() for tensor in padded(tokens=32))
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    parts = split_causal_lm(model, 3)
    logits = run(parts, ids, attention_mask=mask)
    assert torch.equal(logits[mask.bool()], whole[mask.bool()])
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" not in name)


@torch.no_grad()
def test_cached_steps_on_a_device():
    model = language_model("Gemma3Text").cuda()
    ids, mask = (tensor.cuda() for tensor in padded())
    parts = split_causal_lm(model, 3)
    caches = [new_cache(part) for part in parts.values()]
    for begin, end in [(0, 6), *((at, at + 1) for at in range(6, 12))]:
        step = run(parts, ids[:, begin:end], caches, attention_mask=mask[:, :end], use_cache=True)
        whole = model(ids[:, :end], attention_mask=mask[:, :end], use_cache=False).logits
        torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=1e-3, atol=1e-4)
