"""What the methods of parts give is what the whole model has at that place."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from language_models import padded
from language_parts import parts_of, through

from torchdistpackage import PipelineError, SplitError

transformers = pytest.importorskip("transformers")

from torchdistpackage.split.parts import share_tied_weights  # noqa: E402

LAYERS = {
    "GPT2": "transformer.h",
    "Llama": "model.layers",
    "Gemma": "model.layers",
    "Qwen2": "model.layers",
    "GPTNeoX": "gpt_neox.layers",
    "OPT": "model.decoder.layers",
}
"""Family -> where its layers are."""


@pytest.fixture(scope="module", params=LAYERS)
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model and its parts."""
    return parts_of(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def gpt2(tmp_path: Any) -> Any:
    """A tied one that may be changed."""
    return parts_of(tmp_path, "GPT2")


def layers_at(found: Any) -> str:
    return next(name for name in LAYERS.values() if f"{name}.0" in dict(found.whole.named_modules()))


def calls(found: Any, ids: Any, **arguments: Any) -> list[dict[str, Any]]:
    """What each layer of the whole model gets."""
    seen: list[dict[str, Any]] = []
    layers = found.whole.get_submodule(layers_at(found))

    def note(module: Any, args: Any, kwargs: Any) -> None:
        names = ["hidden_states", "past_key_values", "attention_mask"] if "gpt2" in str(type(module)) else ["hidden"]
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        found.whole(ids, use_cache=False, **arguments)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_embeddings_and_positions_are_what_the_first_layer_gets(found: Any) -> None:
    ids, _ = padded()
    positions = torch.arange(12).expand(3, -1)
    first = next(iter(calls(found, ids)[0].values()))
    embed = found.bottom.get_embeddings()
    assert torch.equal(embed.weight, found.whole.get_input_embeddings().weight)
    assert torch.equal(found.bottom.apply_position_encoding(embed(ids), positions), first)
    assert torch.equal(found.bottom.apply_position_encoding(embed(ids), None), first)


def test_positions_of_families(gpt2: Any, tmp_path: Any) -> None:
    x = torch.randn(2, 5, 32, requires_grad=True)
    positions = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]])
    added = gpt2.bottom.apply_position_encoding(x, positions)
    assert torch.equal(added, x + gpt2.whole.transformer.wpe(positions))
    assert torch.autograd.grad(added.sum(), x)[0].eq(1).all()
    rotary = parts_of(tmp_path / "llama", "Llama").bottom
    assert torch.equal(rotary.apply_position_encoding(x, positions), x)
    gemma = parts_of(tmp_path / "gemma", "Gemma").bottom
    ids, _ = padded()
    raw = gemma.get_embeddings().weight[ids]
    torch.testing.assert_close(gemma.apply_position_encoding(gemma.get_embeddings()(ids), None), raw * 32**0.5)


@torch.no_grad()
def test_masks_are_those_of_the_whole_model(found: Any) -> None:
    ids, mask = padded()
    for given in (None, mask):
        seen = calls(found, ids, attention_mask=given)
        for part in found:
            wanted = seen[part.start_layer].get("attention_mask")
            made = part.prepare_attention_mask(given, torch.zeros(3, 12, 32))
            assert made is None if wanted is None else torch.equal(made, wanted)


def test_blocks_are_the_layers_of_the_part(found: Any) -> None:
    whole = found.whole.get_submodule(layers_at(found))
    for part, (start, end) in zip(found, [(0, 1), (1, 3), (3, 5)], strict=True):
        blocks = list(part.get_transformer_blocks())
        assert (
            (part.start_layer, part.end_layer, part.num_layers)
            == (start, end, end - start)
            == (start, end, len(blocks))
        )
        for block, layer in zip(blocks, whole[start:end], strict=True):
            assert type(block) is type(layer)
            assert all(torch.equal(a, b) for a, b in zip(block.parameters(), layer.parameters(), strict=True))


def test_the_pattern_is_in_the_names_of_layers_and_in_no_other(found: Any) -> None:
    for part in found:
        pattern = part.get_layer_name_pattern()
        matching = {name for name in part.state_dict() if re.search(pattern, name)}
        assert matching == {name for name in part.state_dict() if name.startswith(f"{layers_at(found)}.")} != set()


@torch.no_grad()
def test_norm_and_head_make_the_logits(found: Any) -> None:
    ids, _ = padded()
    hidden = found.trunk(found.bottom(ids))
    behind: list[Any] = []
    norm, head = found.top.get_final_norm(), found.top.get_lm_head()
    assert "Norm" in type(norm).__name__
    assert type(head) is torch.nn.Linear
    handle = norm.register_forward_pre_hook(lambda module, args: behind.append(args[0]))
    logits = found.top(hidden).logits
    handle.remove()
    between = getattr(found.top.stage.get_submodule(""), "model", None)
    project = getattr(getattr(between, "decoder", None), "project_out", None) or torch.nn.Identity()
    torch.testing.assert_close(head(project(norm(behind[0]))), logits, rtol=0, atol=0)


def test_names_are_those_of_the_whole_model(found: Any) -> None:
    states = [part.state_dict() for part in found]
    whole = found.whole.state_dict()
    for state in states:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
    assert {name for state in states for name in state} == {*whole}
    assert sum(map(len, states)) == len(whole)


def test_numbers_and_bytes(found: Any) -> None:
    for part in found:
        tensors = [*part.parameters(), *part.buffers()]
        assert part.num_parameters() == sum(p.numel() for p in part.parameters())
        expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert part.memory_footprint_mb() == pytest.approx(expected / 2**20)
    ties = len(found.whole.all_tied_weights_keys) * 96 * found.whole.get_input_embeddings().weight.shape[1]
    assert sum(part.num_parameters() for part in found) - ties == found.whole.num_parameters()


def test_half_precision_takes_half_the_memory(gpt2: Any) -> None:
    full = gpt2.trunk.memory_footprint_mb()
    assert full > 0
    assert gpt2.trunk.to(torch.bfloat16).memory_footprint_mb() == full / 2


def test_training_with_shared_weights_is_training_the_whole_model(gpt2: Any) -> None:
    ids, mask = padded()
    assert share_tied_weights(gpt2.bottom, gpt2.top) == ["lm_head.weight"]
    assert gpt2.top.get_lm_head().weight is gpt2.bottom.get_embeddings().weight
    own = list(dict.fromkeys(parameter for part in gpt2 for parameter in part.parameters()))
    optimizers = [torch.optim.SGD(model, lr=0.1) for model in (own, gpt2.whole.parameters())]
    for _ in range(3):
        losses = [
            through(gpt2, ids, ids, attention_mask=mask).loss,
            gpt2.whole(ids, attention_mask=mask, labels=ids).loss,
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    whole = gpt2.whole.state_dict()
    for part in gpt2:
        for name, tensor in part.state_dict().items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)


def test_sharing_says_what_it_cannot(gpt2: Any, tmp_path: Any) -> None:
    llama = parts_of(tmp_path / "llama", "Llama")
    assert share_tied_weights(llama.bottom, llama.top) == []
    assert share_tied_weights(gpt2.bottom, gpt2.trunk) == []
    with pytest.raises(SplitError, match=r"lm_head.weight is \(96, 32\) on cpu and its other end \(96, 32\) on meta"):
        share_tied_weights(gpt2.bottom.to("meta"), gpt2.top)


@torch.no_grad()
def test_a_cache_of_another_part_is_refused(gpt2: Any) -> None:
    ids, _ = padded()
    hidden, first = gpt2.bottom(ids, use_cache=True)
    hidden, second = gpt2.trunk(hidden, use_cache=True)
    with pytest.raises(PipelineError, match=r"written by the part with layers 0..0; the part with layers 1..2 needs"):
        gpt2.trunk(hidden, past_key_values=first)
    with pytest.raises(PipelineError, match=r"written by the part with layers 1..2; the part with layers 0..0 needs"):
        gpt2.bottom(ids[:, :1], past_key_values=second)
    with pytest.raises(PipelineError, match="written by the whole model or something else"):
        gpt2.bottom(ids[:, :1], past_key_values=gpt2.whole(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("cache", [((1, 2),), 3, "cache", torch.zeros(2)])
def test_what_is_no_cache_is_refused(gpt2: Any, cache: Any) -> None:
    with pytest.raises(PipelineError, match=f"past_key_values is a {type(cache).__name__}; pass the cache"):
        gpt2.trunk(torch.zeros(1, 2, 32), past_key_values=cache)


@torch.no_grad()
def test_an_empty_cache_of_the_users_is_taken(gpt2: Any) -> None:
    ids, _ = padded()
    caches = [transformers.DynamicCache(config=gpt2.whole.config) for _ in range(3)]
    for tokens in (ids[:, :8], ids[:, 8:]):
        hidden = gpt2.trunk(gpt2.bottom(tokens, past_key_values=caches[0]), past_key_values=caches[1])
        logits = gpt2.top(hidden, past_key_values=caches[2]).logits
    torch.testing.assert_close(logits, gpt2.whole(ids).logits[:, 8:])


@pytest.mark.parametrize("x", [None, torch.zeros(2, 3, dtype=torch.long)])
def test_a_trunk_wants_a_hidden_state_and_a_bottom_wants_ids(gpt2: Any, x: Any) -> None:
    with pytest.raises(PipelineError, match="takes the hidden state that the stage before returned"):
        gpt2.trunk(x)
    with pytest.raises(PipelineError, match="the first stage takes token ids, integers"):
        gpt2.bottom(torch.zeros(2, 3, 32))


@pytest.mark.parametrize("side", ["run", "run and ask"])
@torch.no_grad()
def test_threads_of_a_server_may_call_one_part(gpt2: Any, side: str) -> None:
    inputs = [torch.randint(3, 96, (2, tokens)) for tokens in range(3, 11)]
    expected = [gpt2.whole(ids).logits for ids in inputs]

    @torch.no_grad()  # is of one thread
    def served(number: int) -> bool:
        ids = inputs[number % len(inputs)]
        if side == "run and ask":
            gpt2.trunk.prepare_attention_mask(torch.ones_like(ids), torch.zeros(*ids.shape, 32))
            gpt2.bottom.apply_position_encoding(torch.zeros(*ids.shape, 32), None)
        return torch.equal(through(gpt2, ids).logits, expected[number % len(inputs)])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(served, range(32)))
