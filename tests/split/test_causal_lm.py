"""Language models of transformers in stages: the numbers of the whole model, to the last bit."""

import copy
import itertools

import pytest
import torch
from language_models import MORE, OPTIONS, language_model, padded
from torch import nn

from torchdistpackage import SplitError
from torchdistpackage.split import load_whole_model_state_dict, materialize_stages
from torchdistpackage.split.causal_lm import causal_lm_module_names, split_causal_lm
from torchdistpackage.split.ties import ties_in

pytest.importorskip("transformers")
FAMILIES = [*OPTIONS, *MORE]


def run(parts, ids, **kwargs):
    x = ids
    for part in parts.values():
        x = part(x, **kwargs)
    return x


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients_are_those_of_the_whole_model(family, side):
    model = language_model(family)
    ids, mask = padded(side=side)
    kwargs = {} if side == "none" else {"attention_mask": mask}
    seen = (torch.ones_like(mask) if side == "none" else mask).bool()
    whole = model(ids, **kwargs, use_cache=False).logits
    weights = torch.randn(whole.shape) * seen[..., None]
    (whole * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    logits = run(split_causal_lm(model, 3), ids, **kwargs)
    (logits * weights).sum().backward()
    assert torch.equal(logits[seen], whole[seen])
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("RoFormer", "XLMRoberta")])
@torch.no_grad()
def test_cached_steps_are_those_of_the_whole_model(family):
    from transformers import DynamicCache

    model = language_model(family)
    ids, mask = padded()
    parts = split_causal_lm(model, 4)
    whole, caches = DynamicCache(config=model.config), [DynamicCache(config=model.config) for _ in parts]
    for begin, end in [(0, 6), *((at, at + 1) for at in range(6, 12))]:
        now = {"attention_mask": mask[:, :end], "use_cache": True}
        expected = model(ids[:, begin:end], past_key_values=whole, **now).logits
        x = ids[:, begin:end]
        for part, cache in zip(parts.values(), caches, strict=True):
            x = part(x, past_key_values=cache, **now)
        assert torch.equal(x[:, -1], expected[:, -1])


@pytest.mark.parametrize(
    ("family", "attention"),
    [*itertools.product(["Llama", "Gemma3Text", "GPTNeoX"], ["eager", "sdpa"]), ("Gemma2", "eager")],
)
def test_attention_and_packed_sequences(family, attention):
    model = language_model(family, attn_implementation=attention)
    ids, _ = padded()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]).expand(3, -1)  # two sequences in a row
    whole = model(ids, position_ids=positions, use_cache=False).logits
    assert not torch.equal(whole, model(ids, use_cache=False).logits)
    assert torch.equal(run(split_causal_lm(model, 2), ids, position_ids=positions), whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = language_model("Llama").train()
    ids, mask = padded()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    run(split_causal_lm(model, 2), ids, attention_mask=mask, labels=ids).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_router_loss_is_that_of_all_layers(family, masked):
    model = language_model(family, output_router_logits=True)
    ids, mask = padded()
    kwargs = {"labels": ids, "attention_mask": mask if masked else None}
    whole = model(ids, **kwargs)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = run(split_causal_lm(model, 3), ids, **kwargs)
    loss.backward()
    assert whole.aux_loss > 0
    torch.testing.assert_close(loss, whole.loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6)


def test_a_stage_has_the_names_and_the_tensors_of_the_whole_model():
    model = language_model("Llama")
    parts = split_causal_lm(model, 2)
    assert isinstance(parts[1], type(model))
    assert isinstance(parts[1].model.layers, nn.ModuleDict)
    assert list(parts[1].model.layers) == ["3", "4"]
    assert parts[1].model.embed_tokens is None
    assert parts[0].lm_head is None
    assert parts[0].model.norm is None
    states = [part.state_dict() for part in parts.values()]
    assert not states[0].keys() & states[1].keys()
    assert states[0].keys() | states[1].keys() == model.state_dict().keys()
    assert parts[0].model.layers["0"] is model.model.layers[0]


def test_the_whole_model_is_left_as_it_is():
    model = language_model("Gemma")
    ids, _ = padded()
    before, attributes = model(ids).logits, set(vars(model.model))
    run(split_causal_lm(model, 2), ids)
    assert torch.equal(model(ids).logits, before)
    assert set(vars(model.model)) == attributes


def test_tied_heads_are_found():
    parts = split_causal_lm(language_model("Gemma"), 3)
    assert [list(ties_in(part)) for part in parts.values()] == [["model.embed_tokens.weight"], [], ["lm_head.weight"]]
    assert next(iter(ties_in(parts[2]).values())).stages == (0, 2)


def test_only_wanted_stages_are_made_and_a_copy_runs():
    model = language_model("Llama")
    ids, _ = padded()
    parts = split_causal_lm(model, 4, [0, 3])
    assert list(parts) == [0, 3]
    assert [(part.is_first_stage, part.is_last_stage) for part in parts.values()] == [(True, False), (False, True)]
    assert torch.equal(copy.deepcopy(parts[0])(ids), parts[0](ids))


def test_a_model_on_the_meta_device_is_cut_alike():
    import transformers

    model = language_model("Gemma3Text")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    for part, other in zip(split_causal_lm(model, 3).values(), split_causal_lm(empty, 3).values(), strict=True):
        assert part.state_dict().keys() == other.state_dict().keys()
        assert all(tensor.is_meta for tensor in other.parameters())


def test_weights_move_layers_away_from_embeddings_and_head():
    def counts(**weights):
        parts = split_causal_lm(language_model("Llama", layers=8), 4, **weights)
        return [len(part.model.layers) for part in parts.values()]

    assert counts(input_weight=0, output_weight=0) == [2, 2, 2, 2]
    assert counts() == [2, 3, 2, 1]
    assert counts(input_weight=2, output_weight=2) == [1, 3, 3, 1]
    assert counts(input_weight=1, output_weight=30) == [2, 3, 2, 1]  # no stage is empty


def test_module_names_say_where_to_cut():
    model = language_model("GPT2")
    names = causal_lm_module_names(model, 2)
    assert names[0] == ["transformer.wte", "transformer.wpe", *(f"transformer.h.{n}" for n in range(3))]
    names[1].insert(0, names[0].pop())
    parts = split_causal_lm(model, 2, module_names=names)
    assert [list(part.transformer.h) for part in parts.values()] == [["0", "1"], ["2", "3", "4"]]
    ids, _ = padded()
    assert torch.equal(run(parts, ids), model(ids).logits)


def test_stages_of_embeddings_or_of_the_head_alone():
    model = language_model("OPT", layers=2)
    ids, mask = padded()
    whole = [name for names in causal_lm_module_names(model, 1) for name in names]
    cuts = [whole[:3], whole[3:4], whole[4:6], whole[6:]]  # norm and head on two stages, too
    parts = split_causal_lm(model, 4, module_names=cuts)
    assert torch.equal(run(parts, ids, attention_mask=mask), model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda names: names[1].remove("model.layers.3"), "no stage has model.layers.3"),
        (lambda names: names[1].append("model.layers.0"), "model.layers.0 is given to stage 0 and to stage 1"),
        (lambda names: names[1].append("model.layers.9"), "'model.layers.9', which the model does not have"),
        (lambda names: names.append([]), "3 lists for 2 stages"),
        (lambda names: names[1].append(names[0].pop(0)), "model.embed_tokens is on stage 1"),
        (
            lambda names: names[0].append(names[1].pop(2)),
            "norm is on stage 0, and model.layers.4, which runs before it",
        ),
        (lambda names: names[0].append("model"), "name whole modules like model.layers.0 instead"),
    ],
)
def test_wrong_names_are_refused(change, says):
    model = language_model("Llama")
    names = causal_lm_module_names(model, 2)
    change(names)
    with pytest.raises(SplitError, match=says):
        split_causal_lm(model, 2, module_names=names)


def test_what_cannot_be_cut_is_refused_in_words():
    import transformers

    config = transformers.T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    with pytest.raises(SplitError, match=r"encoder-decoder.*split_model"):
        split_causal_lm(transformers.T5ForConditionalGeneration(config), 2)
    with pytest.raises(SplitError, match=r"6 stages need at least as many layers; model.layers has 5"):
        split_causal_lm(language_model("Llama"), 6)
    with pytest.raises(SplitError, match=r"stages \[2\] are asked for, but the 2 stages"):
        split_causal_lm(language_model("Llama"), 2, [2])
    with pytest.raises(SplitError, match="no torch.nn.ModuleList"):
        split_causal_lm(nn.Linear(2, 2), 1)


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma3Text", "GPT2", "Mixtral", "Gemma3nText"])
def test_stages_of_the_meta_device_get_memory_buffers_and_ties(family):
    import transformers

    model = language_model(family)
    ids, mask = padded()
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    parts = split_causal_lm(empty, 3)
    materialize_stages(parts)
    tied = [tie.parameter for part in parts.values() for tie in ties_in(part).values()]
    assert len({id(parameter) for parameter in tied}) <= 1
    assert all(parameter.isfinite().all() for part in parts.values() for parameter in part.parameters())
    for part in parts.values():
        load_whole_model_state_dict(part, model.state_dict())
    seen = mask.bool()
    assert torch.equal(run(parts, ids, attention_mask=mask)[seen], model(ids, attention_mask=mask).logits[seen])


def test_modules_that_nobody_can_fill_are_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, device="meta"))

    part = nn.Sequential(nn.Linear(2, 2, device="meta"), Scale())
    with pytest.raises(SplitError, match="nobody knows how to fill Scale"):
        materialize_stages({0: part})
    assert part[0].weight.is_meta
