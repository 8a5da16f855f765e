"""Language models that are built in odd ways, cut and compared with the whole model; benchmarks/llm-zoo has all."""

import importlib.util
from pathlib import Path

import pytest
import torch
from language_models import padded

from torchdistpackage.split.causal_lm import new_cache, split_causal_lm

pytest.importorskip("transformers")
PATH = Path(__file__).parents[2] / "benchmarks" / "llm-zoo" / "models.py"
spec = importlib.util.spec_from_file_location("llm_zoo_models", PATH)
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)

ODD = {
    "biogpt": "positions out of the mask",
    "cpmant": "a prompt in front; every cached step takes all tokens",
    "deepseek_v4": "a hidden state of four streams, experts by token",
    "gemma4_text": "the last layers take keys and values of earlier ones",
    "git": "made for images",
    "glm_moe_dsa": "a layer hands its choice of tokens to the next one",
    "jamba": "state spaces, attention and experts in turn",
    "longcat_flash": "two attentions a layer",
    "mpt": "biases instead of positions",
    "openai-gpt": "no cache",
    "xglm": "positions out of a table",
    "zamba2": "a block with shared weights looks at the embeddings again",
}


def run(parts, ids, **kwargs):
    x = ids
    for part in parts.values():
        x = part(x, **kwargs)
    return x


def trained(model, call, seen):
    model.zero_grad()
    logits = call()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))[seen].sum().backward()
    return logits[seen], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", ODD)
def test_stages_compute_what_the_model_computes(family, side):
    model = zoo.build(family, 5, use_cache=False)
    ids, mask = padded(side=side)
    kwargs = {} if side == "none" else {"attention_mask": mask}
    seen = (torch.ones_like(mask) if side == "none" else mask).bool()
    logits, gradients = trained(model, lambda: model(ids, **kwargs).logits, seen)
    parts = split_causal_lm(model, 4)
    found, mine = trained(model, lambda: run(parts, ids, **kwargs), seen)
    assert torch.equal(found, logits)
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in ODD if family != "openai-gpt"])
@torch.no_grad()
def test_cached_steps_are_those_of_the_whole_model(family):
    model = zoo.build(family, 5)
    ids, mask = padded()
    parts, name, own = split_causal_lm(model, 4), "past_key_values", None
    caches = [new_cache(part) for part in parts.values()]
    for begin, end in [(0, 6), *((at, at + 1) for at in range(6, 12))]:
        x = now = ids[:, 0 if family == "cpmant" else begin : end]
        kwargs = {"attention_mask": mask[:, :end], "use_cache": True}
        whole = model(now, **kwargs, **{name: own})
        own = whole[name]
        for part, cache in zip(parts.values(), caches, strict=True):
            x = part(x, past_key_values=cache, **kwargs)
        assert torch.equal(x[:, -1], whole.logits[:, -1])
