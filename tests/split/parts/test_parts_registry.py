"""Families: those of the library, and those that a user brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import configuration, language_model, padded
from language_parts import cached, saved, through
from own_decoder import OwnBottom, OwnTop, OwnTrunk, write_own
from torch import nn

from torchdistpackage import CheckpointError, PipelineError, SplitError

transformers = pytest.importorskip("transformers")

from torchdistpackage.split import parts as splitlearn  # noqa: E402
from torchdistpackage.split.parts import ModelFactory, ModelRegistry, load_split_model  # noqa: E402
from torchdistpackage.split.parts.core import BaseBottomModel, BaseTopModel, BaseTrunkModel  # noqa: E402

for own, place in ((OwnBottom, "bottom"), (OwnTrunk, "trunk"), (OwnTop, "top")):
    ModelRegistry.register("own_decoder", place)(own)
IDS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 9, dtype=torch.long)
MASK[0, :3] = MASK[1, 7:] = 0


def test_the_library_brings_three_families_and_one_for_all_others() -> None:
    assert {"causal_lm", "gemma", "gpt2", "qwen2"} <= {*ModelRegistry.list_supported_models()}
    info = ModelRegistry.get_model_info()
    for kind in ("causal_lm", "gemma", "gpt2", "qwen2"):
        assert info[kind] == {"bottom": True, "trunk": True, "top": True}
        assert ModelRegistry.is_complete(kind)
        assert ModelRegistry.get_model_class(kind, "top")._registry_info == {"model_type": kind, "part": "top"}
    assert ModelRegistry.get_model_class("gpt2", "trunk") is splitlearn.GPT2TrunkModel
    assert ModelRegistry.get_model_class("mistral", "trunk") is splitlearn.CausalLMTrunkModel
    assert ModelRegistry.is_model_registered("mistral")
    assert not ModelRegistry.is_model_registered("unheard_of")
    assert not ModelRegistry.is_complete("unheard_of")


@pytest.mark.parametrize("part", ["head", "Bottom", "", None])
def test_there_are_three_parts(part: Any) -> None:
    with pytest.raises(ValueError, match="part must be 'bottom', 'trunk' or 'top', got"):
        ModelRegistry.register("some_model", part)


def test_only_parts_are_registered() -> None:
    with pytest.raises(SplitError, match="'Linear' is no part of a model: derive it from BaseTopModel"):
        ModelRegistry.register("some_model", "top")(nn.Linear)  # type: ignore[type-var]
    with pytest.raises(SplitError, match="OwnTop is a top, not a bottom"):
        ModelRegistry.register("some_model", "bottom")(OwnTop)
    assert not ModelRegistry.is_model_registered("some_model")


def test_the_last_registration_counts() -> None:
    class Other(OwnBottom):
        pass

    assert ModelRegistry.register("replaced", "bottom")(OwnBottom) is OwnBottom
    ModelRegistry.register("own_decoder", "bottom")(OwnBottom)
    ModelRegistry.register("replaced", "bottom")(Other)
    assert ModelRegistry.get_model_class("replaced", "bottom") is Other


def test_abstract_methods_are_asked_for() -> None:
    class Unfinished(BaseTrunkModel):
        pass

    with pytest.raises(TypeError, match="from_pretrained_split"):
        Unfinished(configuration("GPT2"), 1, 2)  # type: ignore[abstract]


@pytest.mark.parametrize(("start", "end"), [(0, 0), (2, 2), (3, 2), (-1, 2), (2, 6)])
def test_layers_that_the_model_does_not_have(start: int, end: int) -> None:
    with pytest.raises(SplitError, match=rf"OwnTrunk would hold the layers from {start} up to {end}.*has 5: 0..4"):
        OwnTrunk(configuration("GPT2"), start, end)
    with pytest.raises(SplitError, match=rf"layers from {start} up to {end}.*has 5"):
        splitlearn.GPT2TrunkModel.from_pretrained_split({}, configuration("GPT2"), start, end)


# The document's own code


@torch.no_grad()
def test_quick_start(tmp_path: Path) -> None:
    full_model = saved(tmp_path, "GPT2", layers=12)
    bottom, trunk, top = splitlearn.ModelFactory.create_split_models(
        model_type="gpt2", model_name_or_path=str(tmp_path), split_point_1=2, split_point_2=10, device="cpu"
    )
    input_ids, _ = padded()
    hidden_1 = bottom(input_ids)
    hidden_2 = trunk(hidden_1)
    output = top(hidden_2)
    predicted_token = output.logits.argmax(dim=-1)
    assert torch.equal(predicted_token, full_model(input_ids).logits.argmax(-1))
    assert [part.num_layers for part in (bottom, trunk, top)] == [2, 8, 2]


@torch.no_grad()
def test_direct_model_creation() -> None:
    from torchdistpackage.split.parts.models.gpt2 import GPT2BottomModel

    full_model: Any = language_model("GPT2")
    state_dict = full_model.state_dict()
    bottom = GPT2BottomModel.from_pretrained_split(full_state_dict=state_dict, config=full_model.config, end_layer=2)
    ids, _ = padded()
    assert torch.equal(bottom(ids), full_model(ids, output_hidden_states=True).hidden_states[2])
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    for parameter in bottom.parameters():
        parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_dict.items())


def test_extending_to_new_architectures(tmp_path: Path) -> None:
    from torchdistpackage.split.parts.registry import ModelRegistry

    @ModelRegistry.register("my_model", "bottom")
    class MyBottomModel(BaseBottomModel):
        def __init__(self, config: Any, end_layer: int) -> None:
            super().__init__(config, end_layer)

        def get_embeddings(self) -> Any:
            return self.embed_tokens

        def apply_position_encoding(self, inputs_embeds: Any, position_ids: Any) -> Any:
            return inputs_embeds + self.position_embeddings

        def get_transformer_blocks(self) -> Any:
            return self.layers

        def prepare_attention_mask(self, attention_mask: Any, hidden_states: Any) -> Any:
            return attention_mask

        def get_layer_name_pattern(self) -> str:
            return r"\.layers\.[0-9]+"

        @classmethod
        def from_pretrained_split(cls, full_state_dict: Any, config: Any, end_layer: int) -> Any:  # type: ignore[override]
            pass

    write_own(tmp_path)
    with pytest.raises(ValueError, match="'my_model' is incomplete: trunk, top not registered"):
        ModelFactory.create_split_models("my_model", tmp_path, 1, 3)
    ModelRegistry.register("my_model", "trunk")(OwnTrunk)
    ModelRegistry.register("my_model", "top")(OwnTop)
    with pytest.raises(SplitError, match="MyBottomModel.from_pretrained_split returned NoneType; it has to return the"):
        ModelFactory.create_split_models("my_model", tmp_path, 1, 3)
    for place, of in (("trunk", OwnTrunk), ("top", OwnTop)):
        ModelRegistry.register("own_decoder", place)(of)


# A family of the user's own


@pytest.fixture
def own_parts(tmp_path: Path) -> Any:
    """The whole model, its files, its parts."""
    model = write_own(tmp_path)
    return model, tmp_path, ModelFactory.create_split_models("own_decoder", tmp_path, 1, 3, low_memory=True)


def test_an_own_family_computes_what_its_model_computes(own_parts: Any) -> None:
    model, _, parts = own_parts
    assert [type(part) for part in parts] == [OwnBottom, OwnTrunk, OwnTop]
    assert not any(module.training for part in parts for module in part.modules())
    for mask in (None, MASK):
        logits = model(IDS, mask)
        output = through(parts, IDS, IDS, attention_mask=mask)
        assert torch.equal(output.logits, logits)
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
    expected.backward()
    output.loss.backward()
    gradients = {name: p.grad for part in parts for name, p in part.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients.pop(name), parameter.grad)
    assert not gradients


@torch.no_grad()
def test_positions_may_be_given(own_parts: Any) -> None:
    model, _, parts = own_parts
    hidden = parts[0](IDS, position_ids=torch.zeros_like(IDS))
    start = model.embed(IDS) + model.where[0]
    assert torch.equal(hidden, model.layers[0](start, parts[0].prepare_attention_mask(None, start))[0])


@torch.no_grad()
def test_an_own_family_is_saved_and_loaded(own_parts: Any, tmp_path: Path) -> None:
    model, _, parts = own_parts
    files = [part.save_split_model(tmp_path / "saved" / part.component) for part in parts]
    by_class = [type(part).load_split_model(file) for part, file in zip(parts, files, strict=True)]
    for loaded in ([load_split_model(file) for file in files], by_class):
        assert [type(part) for part in loaded] == [OwnBottom, OwnTrunk, OwnTop]
        assert torch.equal(through(loaded, IDS, attention_mask=MASK).logits, model(IDS, MASK))
        assert loaded[0].config.secret == [1, {"two": 3}]
        assert parts[0].config.model_type == loaded[0].config.model_type == "own_decoder"
    with pytest.raises(CheckpointError, match=r"top\.safetensors holds a top, not a bottom"):
        OwnBottom.load_split_model(files[2])


def test_an_own_family_in_another_type(own_parts: Any, tmp_path: Path) -> None:
    _, directory, _ = own_parts
    parts = ModelFactory.create_split_models("own_decoder", directory, 1, 3, dtype="bfloat16")
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    file = parts[1].save_split_model(tmp_path / "saved" / "trunk")
    assert {p.dtype for p in load_split_model(file).parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_an_own_family_with_pickled_weights(own_parts: Any) -> None:
    model, directory, _ = own_parts
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    parts = ModelFactory.create_split_models("own_decoder", directory, 1, 3)
    assert torch.equal(through(parts, IDS).logits, model(IDS))


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_an_own_family_with_a_broken_configuration(own_parts: Any, text: str) -> None:
    _, directory, _ = own_parts
    (directory / "config.json").write_text(text)
    with pytest.raises((CheckpointError, SplitError), match=r"config"):
        ModelFactory.create_split_models("own_decoder", directory, 1, 3)


def test_layers_without_a_cache_say_so(own_parts: Any) -> None:
    _, _, parts = own_parts
    with pytest.raises(PipelineError, match=r"OwnLayer\.forward takes no past_key_values; call without a cache"):
        parts[0](IDS, use_cache=True)


def test_layers_that_would_see_padding_say_so(own_parts: Any) -> None:
    _, _, parts = own_parts
    parts[1].layers["1"] = nn.Linear(16, 16)
    with pytest.raises(PipelineError, match=r"Linear\.forward has no argument attention_mask, so that padding"):
        parts[1](torch.zeros(3, 9, 16), attention_mask=MASK)


# One whose layers are those of transformers


class _Rotary:
    def _make(self, config: Any, start: int, end: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.layers = nn.ModuleDict({str(n): LlamaDecoderLayer(config, n) for n in range(start, end)})
        self.rotary = LlamaRotaryEmbedding(config)

    def get_transformer_blocks(self) -> Any:
        return self.layers.values()

    def prepare_attention_mask(self, attention_mask: Any, hidden_states: Any) -> Any:
        if attention_mask is None:
            return None
        new, tokens = hidden_states.shape[1], attention_mask.shape[1]
        seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        return (seen & attention_mask[:, None, None].bool()) | torch.eye(tokens, dtype=torch.bool)[-new:]

    def block_arguments(self, hidden_states: Any, position_ids: Any) -> dict[str, Any]:
        return {"position_embeddings": self.rotary(hidden_states, position_ids)}

    def get_layer_name_pattern(self) -> str:
        return r"\.layers\.[0-9]+"

    @classmethod
    def from_pretrained_split(cls, full_state_dict: Any, config: Any, **kwargs: Any) -> Any:
        part: Any = cls(config, **kwargs)  # type: ignore[call-arg]
        names = {name: f"model.{name}" for name in part.state_dict()} | {"head.weight": "lm_head.weight"}
        part.load_state_dict({name: full_state_dict[names[name]] for name in part.state_dict()})
        return part


@ModelRegistry.register("rotary_decoder", "bottom")
class RotaryBottom(_Rotary, BaseBottomModel):
    def __init__(self, config: Any, end_layer: int) -> None:
        super().__init__(config, end_layer)
        self._make(config, 0, end_layer)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def apply_position_encoding(self, inputs_embeds: Any, position_ids: Any) -> Any:
        return inputs_embeds


@ModelRegistry.register("rotary_decoder", "trunk")
class RotaryTrunk(_Rotary, BaseTrunkModel):
    def __init__(self, config: Any, start_layer: int, end_layer: int) -> None:
        super().__init__(config, start_layer, end_layer)
        self._make(config, start_layer, end_layer)


@ModelRegistry.register("rotary_decoder", "top")
class RotaryTop(_Rotary, BaseTopModel):
    def __init__(self, config: Any, start_layer: int) -> None:
        super().__init__(config, start_layer)
        self._make(config, start_layer, config.num_hidden_layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_final_norm(self) -> nn.Module:
        return self.norm

    def get_lm_head(self) -> nn.Module:
        return self.head


@pytest.fixture
def rotary(tmp_path: Path) -> Any:
    """A Llama of transformers, and parts of it that are the user's."""
    whole = saved(tmp_path, "Llama")
    return whole, ModelFactory.create_split_models("rotary_decoder", tmp_path, 1, 3, low_memory=True)


@torch.no_grad()
def test_layers_of_transformers_with_a_cache(rotary: Any) -> None:
    whole, parts = rotary
    ids, mask = padded()
    past: Any = None
    caches: Any = None
    for _ in range(5):
        expected = whole(ids, attention_mask=mask, past_key_values=past, use_cache=True)
        logits, caches = cached(parts, ids, caches, attention_mask=mask)
        seen = mask[:, -ids.shape[1] :].bool()
        torch.testing.assert_close(logits[seen], expected.logits[seen], rtol=0, atol=1e-5)
        past, ids = expected.past_key_values, expected.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


@torch.no_grad()
def test_layers_of_transformers_without_a_mask(rotary: Any) -> None:
    whole, parts = rotary
    ids, _ = padded()
    torch.testing.assert_close(through(parts, ids).logits, whole(ids).logits, rtol=0, atol=1e-5)
    first, caches = cached(parts, ids[:, :8], None)
    rest, _ = cached(parts, ids[:, 8:9], caches)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole(ids[:, :9]).logits, rtol=0, atol=1e-5)


def test_own_parts_do_not_share_a_cache(rotary: Any) -> None:
    _, (bottom, trunk, _) = rotary
    hidden, cache = bottom(padded()[0], use_cache=True)
    with pytest.raises(PipelineError, match="layers 1..2 needs a cache of its own"):
        trunk(hidden, past_key_values=cache)
