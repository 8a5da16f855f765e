"""Parts as Python objects: memory of their own, pickles, server modes; and slips that would go unnoticed."""

import pickle

import pytest
import torch
from language_models import language_model, padded
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from torchdistpackage.errors import PipelineError
from torchdistpackage.split.parts import ModelFactory, load_split_model
from torchdistpackage.split.parts.blocks import through_blocks


@pytest.fixture
def parts(tmp_path):
    language_model("GPT2").save_pretrained(tmp_path / "gpt2")
    return ModelFactory.create_split_models("gpt2", tmp_path / "gpt2", 1, 3)


def test_no_two_parts_share_memory(parts):
    held = [{tensor.data_ptr() for tensor in part.parameters()} for part in parts]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]


def test_copies_of_a_tied_weight_are_stepped_once(parts):
    bottom, trunk, top = parts
    before = bottom.get_embeddings().weight.detach().clone()
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=0.01)
    ids, _ = padded()
    top(trunk(bottom(ids)), labels=ids).loss.backward()
    optimizer.step()
    for weight in (bottom.get_embeddings().weight, top.get_lm_head().weight):
        assert (weight - before).abs().max() <= 0.0101  # Adam's first step is of lr at most


def test_pickles(parts):
    bottom, trunk, _ = parts
    trunk.train()
    next(trunk.parameters()).requires_grad_(False)
    ids, _ = padded()
    for part, x in ((bottom, ids), (trunk, bottom(ids))):
        again = pickle.loads(pickle.dumps(part))
        assert torch.equal(again(x), part(x))
        assert again.training == part.training
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in part.parameters()]


def test_parts_that_were_made_in_inference_mode_can_train(tmp_path):
    language_model("GPT2").save_pretrained(tmp_path)
    ids, _ = padded()
    with torch.inference_mode():
        bottom, trunk, top = ModelFactory.create_split_models("gpt2", tmp_path, 1, 3, device_map="auto")
        top = load_split_model(top.save_split_model(tmp_path / "top"))
        assert top(trunk(bottom(ids))).logits.is_inference()
    top(trunk(bottom(ids)), labels=ids).loss.backward()
    assert all(p.grad is not None for part in (bottom, trunk, top) for p in part.parameters())


def test_a_keyword_that_is_nearly_one(parts):
    ids, mask = padded()
    with pytest.raises(PipelineError, match="'attenton_mask' is no argument of GPT2LMHeadModel; .*'attention_mask'"):
        parts[0](ids, attenton_mask=mask)


def test_a_pair_where_a_hidden_state_goes(parts):
    with pytest.raises(PipelineError, match="a tuple; with use_cache=True .* the pair"):
        parts[1](parts[0](padded()[0], use_cache=True))


def test_layers_of_transformers_say_what_they_want():
    gpt2, llama = language_model("GPT2", 1).config, language_model("Llama", 1).config
    hidden, (_, mask) = torch.zeros(3, 12, 32), padded()
    with pytest.raises(PipelineError, match=r"padding mask as it is, \(3, 12\); GPT2Block .*create_causal_mask"):
        through_blocks([GPT2Block(gpt2, layer_idx=0)], hidden, None, {"attention_mask": mask})
    with pytest.raises(PipelineError, match="LlamaDecoderLayer takes position_embeddings: let block_arguments"):
        through_blocks([LlamaDecoderLayer(llama, 0)], hidden, None, {"attention_mask": None})
