"""A saved model becomes its parts, or an error that says what is wrong with the request or the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import language_model, padded
from language_parts import parts_of, saved, through
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchdistpackage import CheckpointError, SplitError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from torchdistpackage.split.parts import GPT2BottomModel, ModelFactory, ModelRegistry, load_split_model  # noqa: E402
from torchdistpackage.split.parts.causal_lm import CausalLMBottomModel  # noqa: E402

create = ModelFactory.create_split_models


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied GPT-2 in one file; not to be changed."""
    directory = tmp_path_factory.mktemp("models") / "gpt2-small.v1"
    saved(directory, "GPT2")
    return directory


def whole(directory: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


def rewrite(directory: Path, **changed: Any) -> None:
    """Changes tensors of a file; a name that ends in one of these is meant, and None takes it away."""
    file = directory / "model.safetensors"
    tensors = dict(safetensors.load_file(file))
    for end, tensor in changed.items():
        name = next(name for name in tensors if name.endswith(end.replace("__", ".")))
        tensors[name] = tensor
    safetensors.save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})


def pickled(directory: Path, family: str = "GPT2", **changed: Any) -> Any:
    """Weights as old versions wrote them."""
    model: Any = language_model(family)
    model.config.save_pretrained(directory)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"} | changed
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, directory / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("points", [(0, 3), (3, 3), (3, 1), (1, 5), (1, 9), (-1, 2)])
def test_split_points_that_leave_a_part_empty(gpt2: Path, points: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=rf"0 < split_point_1 < split_point_2 < 5, .* got {points[0]}, {points[1]}: try"
    ):
        create("gpt2", gpt2, *points)


@pytest.mark.parametrize("points", [("1", 3), (1.0, 3), (1, None)])
def test_split_points_that_are_no_numbers(gpt2: Path, points: Any) -> None:
    with pytest.raises(SplitError, match="split points are numbers of layers, got"):
        create("gpt2", gpt2, *points)


def test_two_layers_are_too_few(tmp_path: Path) -> None:
    saved(tmp_path, "GPT2", layers=2)
    with pytest.raises(SplitError, match="< 2, the number of layers.*three parts need three"):
        create("gpt2", tmp_path, 1, 2)


@pytest.mark.parametrize("kind", ["unheard_of", "GPT2", "t5", "", None])
def test_unknown_types_are_key_errors_that_list_the_known(kind: Any) -> None:
    with pytest.raises(KeyError) as caught:
        create(kind, "/not/there", 1, 3)
    assert isinstance(caught.value, SplitError)
    known = ModelFactory.list_available_models()
    assert str(caught.value).startswith(f"Model type {kind!r} not registered. Available models: {known}")
    assert {"causal_lm", "gemma", "gpt2", "qwen2"} <= {*known}


def test_an_incomplete_family_says_what_is_missing(gpt2: Path) -> None:
    ModelRegistry.register("half_a_gpt2", "bottom")(type("Half", (GPT2BottomModel,), {}))
    with pytest.raises(ValueError, match=r"'half_a_gpt2' is incomplete: trunk, top not registered.*'trunk': False"):
        create("half_a_gpt2", gpt2, 1, 3)
    with pytest.raises(KeyError, match=r"has no 'top' registered; it has \['bottom'\]"):
        ModelRegistry.get_model_class("half_a_gpt2", "top")


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2"])
def test_a_model_of_another_type(gpt2: Path, kind: str) -> None:
    with pytest.raises(
        SplitError, match=f"holds a model of type 'gpt2', not '{kind}': pass model_type='gpt2', or 'auto'"
    ):
        create(kind, gpt2, 1, 3)


@pytest.mark.parametrize(("kind", "made"), [("auto", GPT2BottomModel), ("causal_lm", CausalLMBottomModel)])
@torch.no_grad()
def test_types_that_fit_every_model(gpt2: Path, kind: str, made: type) -> None:
    parts = create(kind, str(gpt2), 1, 3)
    ids, mask = padded()
    assert type(parts[0]) is made
    assert torch.equal(through(parts, ids, attention_mask=mask).logits, whole(gpt2)(ids, attention_mask=mask).logits)


def test_a_device_for_all_or_one_for_each(gpt2: Path) -> None:
    def devices(**options: Any) -> list[str]:
        return [str(next(part.parameters()).device) for part in create("gpt2", gpt2, 1, 3, **options)]

    assert devices(device="meta") == ["meta"] * 3
    assert devices(device_map={"bottom": "cpu", "trunk": "meta", "top": "cpu"}) == ["cpu", "meta", "cpu"]
    if not torch.cuda.is_available():
        assert devices(device_map="auto") == ["cpu"] * 3


def test_parts_take_inputs_to_where_they_are(gpt2: Path) -> None:
    bottom, trunk, _ = create("gpt2", gpt2, 1, 3, device_map={"bottom": "cpu", "trunk": "meta", "top": "cpu"})
    hidden, _ = trunk(bottom(padded()[0]), use_cache=True)  # without a cache, transformers looks at values
    assert (hidden.device.type, hidden.shape) == ("meta", (3, 12, 32))


@pytest.mark.parametrize("options", [{"device": "moon"}, {"device_map": "balanced"}, {"device_map": {"bottom": "cpu"}}])
def test_devices_that_are_none(gpt2: Path, options: Any) -> None:
    with pytest.raises(SplitError, match="device"):
        create("gpt2", gpt2, 1, 3, **options)


def test_only_wanted_parts_are_made(gpt2: Path) -> None:
    def made(parts: Any) -> list[bool]:
        return [part is not None for part in create("gpt2", gpt2, 1, 3, parts=parts)]

    assert made("trunk") == [False, True, False]
    assert made(["top", "bottom"]) == [True, False, True]
    for junk in ([], ["head"], 5, [1, "top"]):
        with pytest.raises(SplitError, match=r"parts must be some of \['bottom', 'trunk', 'top'\], got"):
            made(junk)


def test_only_files_of_wanted_parts_are_read(tmp_path: Path) -> None:
    saved(tmp_path, "Llama", sharded=True)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in files.items() if ".layers.1." in name or ".layers.2." in name}
    for file in {*files.values()} - needed:
        (tmp_path / file).unlink()
    assert create("llama", tmp_path, 1, 3, parts=["trunk"])[1].num_layers == 2
    with pytest.raises(CheckpointError, match=r"\.safetensors \(the file is not there\), wanted for"):
        create("llama", tmp_path, 1, 3, parts=["top"])


def test_a_directory_that_is_not_there_or_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="/not/there is not a directory"):
        create("gpt2", "/not/there", 1, 3)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        create("gpt2", tmp_path, 1, 3)
    language_model("GPT2").config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors nor"):
        create("gpt2", tmp_path, 1, 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "unheard_of"}'])
@pytest.mark.parametrize("kind", ["gpt2", "auto"])
def test_a_broken_configuration(tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json of .* cannot be used"):
        create(kind, tmp_path, 1, 3)


def test_a_truncated_file(tmp_path: Path) -> None:
    saved(tmp_path, "GPT2")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        create("gpt2", tmp_path, 1, 3)


def test_missing_tensors_are_named_and_only_where_they_are_wanted(tmp_path: Path) -> None:
    saved(tmp_path, "GPT2")
    rewrite(tmp_path, **{"h__4__ln_1__weight": None})
    assert create("gpt2", tmp_path, 1, 3, parts=["bottom", "trunk"])[2] is None
    with pytest.raises(CheckpointError, match=r"does not hold transformer\.h\.4\.ln_1\.weight of GPT2LMHeadModel"):
        create("gpt2", tmp_path, 1, 3)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "GPT2")
    rewrite(tmp_path, **{"h__1__ln_1__weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_1\.weight is \(7,\) in the files and \(32,\) in GPT2LMHead"):
        create("gpt2", tmp_path, 1, 3)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@torch.no_grad()
def test_pickled_weights(tmp_path: Path, family: str) -> None:
    options = {} if family == "GPT2" else {"lm_head.weight": torch.randn(96, 32)}
    pickled(tmp_path, family, **options)
    ids, mask = padded()
    parts = create("auto", tmp_path, 1, 3)
    assert torch.equal(
        through(parts, ids, attention_mask=mask).logits, whole(tmp_path)(ids, attention_mask=mask).logits
    )
    with pytest.raises(CheckpointError, match=r"weights in pytorch_model\.bin.*convert it once") as caught:
        create("auto", tmp_path, 1, 3, low_memory=True)
    assert caught.value.__cause__ is None


def test_pickled_weights_that_are_broken(tmp_path: Path) -> None:
    pickled(tmp_path, **{"transformer.h.0.ln_1.weight": None, "transformer.h.1.ln_1.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"does not hold transformer\.h\.0\.ln_1\.weight"):
        create("gpt2", tmp_path, 1, 3)
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_1\.weight is \(7,\) in the files"):
        create("gpt2", tmp_path, 1, 3, parts=["trunk"])
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a whole file of pickled tensors"):
        create("gpt2", tmp_path, 1, 3)


@torch.no_grad()
def test_pickled_shards(tmp_path: Path) -> None:
    state = pickled(tmp_path).state_dict()
    (tmp_path / "pytorch_model.bin").unlink()
    names = [name for name in state if name != "lm_head.weight"]
    index = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
    for file in {*index.values()}:
        torch.save({name: state[name] for name in names if index[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ids, _ = padded()
    assert torch.equal(through(create("gpt2", tmp_path, 1, 3), ids).logits, whole(tmp_path)(ids).logits)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin, which its index names, is not there"):
        create("gpt2", tmp_path, 1, 3)


@torch.no_grad()
def test_parts_are_saved_as_they_are_made(gpt2: Path, tmp_path: Path) -> None:
    parts = create("gpt2", gpt2, 1, 3, storage_path=tmp_path, auto_save=True)
    files = [tmp_path / part / f"gpt2-small.v1_1-3_{part}.safetensors" for part in ("bottom", "trunk", "top")]
    ids, _ = padded()
    assert torch.equal(through(map(load_split_model, files), ids).logits, through(parts, ids).logits)
    with pytest.raises(SplitError, match=r"auto_save needs to know where to: pass storage_path"):
        create("gpt2", gpt2, 1, 3, auto_save=True)


def test_the_current_directory_has_a_name(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gpt2)
    create("gpt2", ".", 1, 3, storage_path=tmp_path, auto_save=True, parts="top")
    assert (tmp_path / "top" / "gpt2-small.v1_1-3_top.safetensors").is_file()


@torch.no_grad()
def test_the_implementation_of_attention(tmp_path: Path) -> None:
    found = parts_of(tmp_path, "Gemma2", factory={"attn_implementation": "eager"})
    ids, mask = padded()
    eager = whole(tmp_path, attn_implementation="eager")
    assert {part.stage.config._attn_implementation for part in found} == {"eager"}
    assert found.trunk.prepare_attention_mask(None, torch.zeros(3, 12, 32)).shape == (3, 1, 12, 12)
    assert torch.equal(through(found, ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}]
)
@torch.no_grad()
def test_another_type(gpt2: Path, options: Any) -> None:
    parts = create("gpt2", gpt2, 1, 3, **options)
    ids, _ = padded()
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert torch.equal(through(parts, ids).logits, whole(gpt2, dtype=torch.bfloat16)(ids).logits)


@pytest.mark.parametrize("dtype", ["bf16", "save", torch.int8, 3])
def test_what_is_no_type(gpt2: Path, dtype: Any) -> None:
    assert create("gpt2", gpt2, 1, 3, dtype="auto", parts="trunk")[1].stage.dtype == torch.float32
    with pytest.raises(SplitError, match=r"dtype must be a floating type such as torch\.bfloat16"):
        create("gpt2", gpt2, 1, 3, dtype=dtype)


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "Qwen2"])
@torch.no_grad()
def test_the_tied_head_of_a_sharded_checkpoint(tmp_path: Path, family: str) -> None:
    found = parts_of(tmp_path, family, sharded=True, factory={"low_memory": True}, tie_word_embeddings=True)
    assert "lm_head.weight" not in json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    embedding = found.whole.get_input_embeddings().weight
    assert torch.equal(found.top.get_lm_head().weight, embedding)
    assert torch.equal(found.bottom.get_embeddings().weight, embedding)


@pytest.mark.parametrize("low_memory", [False, True])
@torch.no_grad()
def test_the_names_that_gpt2_has_on_the_hub(gpt2: Path, tmp_path: Path, low_memory: bool) -> None:
    tensors = safetensors.load_file(gpt2 / "model.safetensors")
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(5)}
    safetensors.save_file({**named, **masks}, tmp_path / "model.safetensors", {"format": "pt"})
    whole(gpt2).config.save_pretrained(tmp_path)
    ids, mask = padded()
    expected = whole(gpt2)(ids, attention_mask=mask).logits
    parts = create("gpt2", tmp_path, 1, 3, low_memory=low_memory)
    assert torch.equal(through(parts, ids, attention_mask=mask).logits, expected)
    config = whole(gpt2).config
    ends = ({"end_layer": 1}, {"start_layer": 1, "end_layer": 3}, {"start_layer": 3})
    classes = [ModelRegistry.get_model_class("gpt2", part) for part in ("bottom", "trunk", "top")]
    made = [of.from_pretrained_split(named, config, **end) for of, end in zip(classes, ends, strict=True)]
    assert torch.equal(through(made, ids, attention_mask=mask).logits, expected)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors took which functions of torch saw inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._seen = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {at: (ref, size) for at, (ref, size) in self._seen.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self._seen.values()))
        return result


@pytest.mark.parametrize("sharded", [False, True])
def test_no_more_memory_than_the_parts_and_one_tensor(
    tmp_path: Path, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread only
    saved(tmp_path, "Llama", sharded=sharded, hidden_size=128, intermediate_size=1024)
    with LiveBytes() as live:
        size = whole(tmp_path).get_memory_footprint()
    assert live.most >= size
    for wanted in (["trunk"], ["bottom", "trunk", "top"]):
        with LiveBytes() as live:
            made = [part for part in create("llama", tmp_path, 1, 3, low_memory=True, parts=wanted) if part is not None]
        size = sum(part.memory_footprint_mb() for part in made) * 2**20
        largest = max(p.numel() * p.element_size() for part in made for p in part.parameters())
        assert size <= live.most <= size + 2 * largest
