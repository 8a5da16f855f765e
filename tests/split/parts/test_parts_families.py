"""Bottom, Trunk and Top of every family compute what the whole model computes, to the last bit."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from language_models import MORE, OPTIONS, padded
from language_parts import cached, parts_of, through

transformers = pytest.importorskip("transformers")

FAMILIES = [*OPTIONS, *MORE]
CACHED = [family for family in FAMILIES if family not in ("RoFormer", "XLMRoberta")]
KINDS = [
    (True, True),
    (False, False),
    pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow),
]
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])  # two sequences in a row
DROPOUTS: dict[str, dict[str, float]] = {
    "GPT2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "Llama": {"attention_dropout": 0.5},
    "OPT": {"dropout": 0.5},
    "GPTNeoX": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Parts, made once; whoever changes them undoes it."""

    @functools.cache
    def made(family: str, tied: bool, sharded: bool) -> Any:
        directory = tmp_path_factory.mktemp(family)
        found = parts_of(directory, family, sharded=sharded, factory={"low_memory": True}, tie_word_embeddings=tied)
        assert (directory / "model.safetensors").exists() is not sharded
        return found

    return made


@pytest.mark.parametrize(("tied", "sharded"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_whole_model(parts: Any, family: str, tied: bool, sharded: bool) -> None:
    found = parts(family, tied, sharded)
    ids, left = padded()
    masked: list[dict[str, Any]] = [{}, {"attention_mask": left}, {"attention_mask": padded(side="right")[1]}]
    if "position_ids" in inspect.signature(found.whole.forward).parameters:
        masked.append({"position_ids": PACKED.expand(3, -1)})
    for arguments in masked:
        whole = found.whole(ids, **arguments, use_cache=False).logits
        assert torch.equal(through(found, ids, **arguments).logits, whole)
        if family in CACHED:  # with a cache, and no mask, packed sequences are one to transformers
            whole = found.whole(ids, **arguments, use_cache=True).logits
            assert torch.equal(cached(found, ids, None, **arguments)[0], whole)


@pytest.mark.parametrize("family", CACHED)
@torch.no_grad()
def test_eight_cached_steps_are_those_of_the_whole_model(parts: Any, family: str) -> None:
    found = parts(family, True, True)
    ids, mask = padded(tokens=6)
    whole: Any = None
    caches: Any = None
    for _ in range(9):
        output = found.whole(ids, attention_mask=mask, past_key_values=whole, use_cache=True)
        logits, caches = cached(found, ids, caches, attention_mask=mask)
        assert torch.equal(logits, output.logits)
        whole, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


@pytest.mark.parametrize("use_cache", [None, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["GPT2", "Gemma2", "Qwen2"])
def test_the_loss_with_a_cache(parts: Any, family: str, tied: bool, use_cache: bool | None) -> None:
    found = parts(family, tied, tied)
    ids, mask = padded()
    hidden = found.trunk(found.bottom(ids, attention_mask=mask), attention_mask=mask)
    output = found.top(hidden, attention_mask=mask, labels=ids, use_cache=use_cache)
    whole = found.whole(ids, attention_mask=mask, labels=ids, use_cache=bool(use_cache))
    assert torch.equal(output.loss, whole.loss)
    assert (output.past_key_values is not None) is bool(use_cache)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_model(parts: Any, family: str, tied: bool) -> None:
    found = parts(family, tied, tied)
    ids, mask = padded()
    labels = ids.masked_fill(mask == 0, -100)
    whole = found.whole(ids, attention_mask=mask, labels=labels)
    output = through(found, ids, labels, attention_mask=mask)
    assert torch.equal(output.loss, whole.loss)
    whole.loss.backward()
    output.loss.backward()
    gradients = {name: p.grad for part in found for name, p in part.named_parameters() if p.grad is not None}
    ties = found.whole.all_tied_weights_keys
    for name, parameter in found.whole.named_parameters():
        first = ties.get(name, name)
        ends = [first, *(other for other, kept in ties.items() if kept == first)]
        copies = [gradients.pop(end) for end in ends if end in gradients]
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(sum(copies, torch.zeros_like(parameter)), expected, rtol=0, atol=1e-6)
    assert not gradients
    for part in (found.whole, *found):
        part.zero_grad()


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma", "Qwen2", "Mixtral", "OPT"])
@torch.no_grad()
def test_checkpoints_in_half_precision_stay_that(family: str, tmp_path: Any) -> None:
    found = parts_of(tmp_path, family, dtype=torch.bfloat16)
    ids, mask = padded()
    assert {parameter.dtype for part in found for parameter in part.parameters()} == {torch.bfloat16}
    whole = found.whole(ids, attention_mask=mask).logits
    assert torch.equal(through(found, ids, attention_mask=mask).logits, whole)


@pytest.mark.parametrize("family", DROPOUTS)
@torch.no_grad()
def test_parts_come_in_evaluation_mode_and_change_it_everywhere(family: str, tmp_path: Any) -> None:
    found = parts_of(tmp_path, family, **DROPOUTS[family])
    ids, _ = padded()
    assert torch.equal(through(found, ids).logits, found.whole(ids).logits)
    for part in found:
        assert not any(module.training for module in (*part.modules(), *part.stage.modules()))
        assert part.train() is part
        assert all(module.training for module in (*part.modules(), *part.stage.modules()))
    assert not torch.equal(through(found, ids).logits, through(found, ids).logits)
    for part in found:
        part.eval()
    assert torch.equal(through(found, ids).logits, found.whole(ids).logits)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma", "Qwen2"])
def test_only_the_hidden_state_leaves_the_client(parts: Any, family: str) -> None:
    found = parts(family, True, True)
    ids, mask = padded()
    hidden = found.bottom(ids, attention_mask=mask)
    assert hidden.shape == (3, 12, 32)
    assert found.trunk(hidden, attention_mask=mask).shape == (3, 12, 32)
