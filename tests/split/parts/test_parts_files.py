"""Parts to disk and back: two files that say everything, and errors that say which of them is wrong."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import padded
from language_parts import parts_of, through

from torchdistpackage import CheckpointError, SplitError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from torchdistpackage.split.parts import (  # noqa: E402
    BaseBottomModel,
    BaseTopModel,
    CausalLMBottomModel,
    CausalLMTopModel,
    GPT2BottomModel,
    load_split_model,
    share_tied_weights,
)

COMPONENTS = ["bottom", "trunk", "top"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied Gemma and its parts; not to be changed."""
    return parts_of(tmp_path_factory.mktemp("models") / "gemma", "Gemma")


@pytest.fixture(scope="module")
def saved_once(found: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parts")
    for part in found:
        part.save_split_model(directory)
    return directory


@pytest.fixture
def files(saved_once: Path, tmp_path: Path) -> Path:
    """Files of the three parts, to be broken."""
    return Path(shutil.copytree(saved_once, tmp_path / "parts"))


def tamper(file: Path, changes: dict[str, Any]) -> None:
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def same(part: Any, other: Any) -> bool:
    own, others = part.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) and tensor.dtype == others[name].dtype for name, tensor in own.items()
    )


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mixtral", "Gemma3nText"])
@torch.no_grad()
def test_there_and_back(tmp_path: Path, family: str) -> None:
    parts = parts_of(tmp_path, family)
    ids, mask = padded()
    files = [part.save_split_model(tmp_path / "parts" / f"{part.component}.safetensors") for part in parts]
    by_class = [type(part).load_split_model(file) for part, file in zip(parts, files, strict=True)]
    for loaded in ([load_split_model(file) for file in files], by_class):
        assert all(same(part, other) and type(part) is type(other) for part, other in zip(parts, loaded, strict=True))
        assert not any(module.training for part in loaded for module in part.modules())
        logits = through(loaded, ids, attention_mask=mask).logits
        assert torch.equal(logits, parts.whole(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(("component", "start", "end"), [("bottom", 0, 1), ("trunk", 1, 3), ("top", 3, 5)])
def test_the_metadata_says_what_the_part_is(found: Any, files: Path, component: str, start: int, end: int) -> None:
    part = getattr(found, component)
    said = json.loads((files / f"{component}_metadata.json").read_text())
    assert said["model_class"] == type(part).__name__ == f"Gemma{component.capitalize()}Model"
    assert (said["component"], said["model_type"]) == (component, "gemma")
    assert (said["start_layer"], said["end_layer"], said["num_layers"], said["total_layers"]) == (
        start,
        end,
        end - start,
        5,
    )
    assert said["num_parameters"] == part.num_parameters()
    tensors = safetensors.load_file(files / f"{component}.safetensors")
    assert said["memory_mb"] == sum(tensor.numel() * 4 for tensor in tensors.values()) / 2**20
    assert (said["dtype"], said["config"]["hidden_size"]) == ("float32", 32)
    assert said["sha256"].keys() == tensors.keys() == part.state_dict().keys()
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(component)) == [
        f"{component}.safetensors",
        f"{component}_metadata.json",
    ]


@pytest.mark.parametrize("name", ["llama-3.1_2-10_bottom", "part.v2.safetensors", "old.pt", "new/deep/bottom"])
def test_names_of_files(found: Any, tmp_path: Path, name: str) -> None:
    path = found.bottom.save_split_model(tmp_path / name)
    stem = name.removesuffix(".safetensors").removesuffix(".pt")
    assert path == tmp_path / f"{stem}.safetensors"
    assert (tmp_path / f"{stem}_metadata.json").is_file()
    for given in (path, tmp_path / name, str(tmp_path / name)):
        assert same(load_split_model(given), found.bottom)


def test_a_directory_as_the_path(found: Any, tmp_path: Path) -> None:
    assert found.top.save_split_model(tmp_path) == tmp_path / "top.safetensors"
    assert same(load_split_model(tmp_path), found.top)
    assert found.bottom.save_split_model(f"{tmp_path}/new/") == tmp_path / "new" / "bottom.safetensors"
    found.bottom.save_split_model(tmp_path)
    assert same(BaseTopModel.load_split_model(tmp_path), found.top)
    assert same(CausalLMBottomModel.load_split_model(tmp_path), found.bottom)
    with pytest.raises(CheckpointError, match=r"is a directory with \['bottom', 'top'\]; give one file"):
        load_split_model(tmp_path)


def test_weights_alone(found: Any, tmp_path: Path) -> None:
    path = found.trunk.save_split_model(tmp_path / "trunk", save_metadata=False)
    assert [file.name for file in tmp_path.iterdir()] == ["trunk.safetensors"]
    with pytest.raises(CheckpointError, match=r"trunk_metadata\.json is not there"):
        load_split_model(path)
    again = type(found.trunk).from_pretrained_split(safetensors.load_file(path), found.whole.config, 1, 3)
    assert same(again, found.trunk)


def test_types_are_kept_whatever_the_configuration_says(found: Any, tmp_path: Path) -> None:
    part = copy.deepcopy(found.trunk).to(torch.bfloat16)
    part.get_transformer_blocks()[0].input_layernorm.float()
    path = part.save_split_model(tmp_path / "trunk")
    assert same(load_split_model(path), part)
    assert {p.dtype for p in load_split_model(path).parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in load_split_model(path, dtype="float16").parameters()} == {torch.float16}
    assert {p.dtype for p in load_split_model(path, dtype=torch.float64).parameters()} == {torch.float64}
    assert load_split_model(path, device="meta").get_transformer_blocks()[0].input_layernorm.weight.is_meta


@pytest.mark.parametrize("options", [{"dtype": "half a float"}, {"dtype": torch.int8}, {"device": "moon"}])
def test_types_and_devices_that_are_none(files: Path, options: Any) -> None:
    with pytest.raises(SplitError, match=f"{next(iter(options))} "):
        load_split_model(files / "trunk", **options)


def test_over_what_is_there(found: Any, files: Path) -> None:
    changed = copy.deepcopy(found.bottom)
    with torch.no_grad():
        next(changed.parameters()).zero_()
    changed.save_split_model(files / "bottom")
    assert same(load_split_model(files / "bottom"), changed)
    found.top.save_split_model(files / "bottom", save_metadata=False)
    with pytest.raises(CheckpointError, match=r"bottom_metadata\.json is not there"):
        load_split_model(files / "bottom")


def test_a_save_that_fails_leaves_what_was_there(found: Any, files: Path) -> None:
    (files / "bottom.safetensors.unfinished").mkdir()
    before = (files / "bottom.safetensors").read_bytes()
    changed = copy.deepcopy(found.bottom).to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"bottom\.safetensors cannot be written"):
        changed.save_split_model(files / "bottom")
    assert (files / "bottom.safetensors").read_bytes() == before
    assert same(load_split_model(files / "bottom"), found.bottom)
    (files / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        changed.save_split_model(files / "file" / "bottom")
    with pytest.raises(CheckpointError, match="embed_tokens.weight is on the meta device and has no values to save"):
        copy.deepcopy(found.bottom).to("meta").save_split_model(files / "bottom")
    assert same(load_split_model(files / "bottom"), found.bottom)


def test_a_file_of_another_part(files: Path) -> None:
    with pytest.raises(CheckpointError, match=r"top\.safetensors holds a top, not a bottom: CausalLMBottomModel"):
        CausalLMBottomModel.load_split_model(files / "top.safetensors")
    with pytest.raises(CheckpointError, match="holds a bottom, not a top"):
        BaseTopModel.load_split_model(files / "bottom.safetensors")
    with pytest.raises(CheckpointError, match="GPT2BottomModel is for gpt2, and the configuration is one of 'gemma'"):
        GPT2BottomModel.load_split_model(files / "bottom.safetensors")
    assert type(CausalLMTopModel.load_split_model(files / "top.safetensors")) is CausalLMTopModel
    assert type(BaseBottomModel.load_split_model(files)).__name__ == "GemmaBottomModel"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"component": "top"}, "the top ends at layer 3, not at 5"),
        ({"num_layers": 3}, "layers 1 to 3 of 5 are not 3 layers"),
        ({"start_layer": -1}, "start_layer is -1, not a number of layers"),
        ({"total_layers": 9}, "says 9 layers, and the configuration in it 5"),
        ({"start_layer": 2, "num_layers": 1}, r"the file holds model\.layers\.1\."),
        ({"end_layer": 4, "num_layers": 3}, r"does not hold model\.layers\.3\."),
        ({"config": ...}, "config missing"),
        ({"config": []}, r"config is \[\], not the fields"),
        ({"config": {}}, "says 5 layers, and the configuration in it 28"),
        (
            {"config": {"model_type": "gemma", "num_hidden_layers": "five"}},
            "configuration in the metadata cannot be used",
        ),
        ({"format_version": 99}, "format 99.*install a later one"),
        ({"sha256": {"x": "no"}}, "64 hexadecimal digits"),
    ],
)
def test_metadata_that_was_changed(files: Path, changes: dict[str, Any], says: str) -> None:
    tamper(files / "trunk_metadata.json", changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_split_model(files / "trunk.safetensors")
    assert "trunk" in str(caught.value)


def test_a_family_that_is_not_known_here(files: Path) -> None:
    tamper(files / "trunk_metadata.json", {"family": "unheard_of"})
    with pytest.raises(KeyError, match="Model type 'unheard_of' not registered"):
        load_split_model(files / "trunk.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_metadata_that_is_none(files: Path, text: str) -> None:
    (files / "top_metadata.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"top_metadata\.json"):
        load_split_model(files / "top.safetensors")


def test_files_that_are_missing(files: Path) -> None:
    (files / "top.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"top\.safetensors is not there; give the path"):
        load_split_model(files / "top.safetensors")
    (files / "trunk_metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"trunk_metadata\.json is not there: the part was not finished"):
        load_split_model(files / "trunk.safetensors")


def test_weights_that_are_broken(files: Path) -> None:
    weights = files / "trunk.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-10], whole[:20], b""):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"trunk\.safetensors is not a whole safetensors file"):
            load_split_model(weights)
    shutil.copy(files / "top.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors cannot be loaded.*model\.layers\.1\."):
        load_split_model(weights)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [(None, r"does not hold {name}"), (torch.ones(7), r"{name} is \(7,\) in the files and \(32,\)")],
)
def test_tensors_that_are_wrong(files: Path, tensor: Any, says: str) -> None:
    weights, name = files / "trunk.safetensors", "model.layers.2.input_layernorm.weight"
    tensors = safetensors.load_file(weights) | {name: tensor}
    safetensors.save_file({n: t for n, t in tensors.items() if t is not None}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=says.format(name=name.replace(".", r"\."))):
        load_split_model(weights)


def test_tensors_that_do_not_belong_there(files: Path) -> None:
    weights = files / "trunk.safetensors"
    safetensors.save_file({**safetensors.load_file(weights), "adapter": torch.ones(2)}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors.*the file holds adapter, which such a part"):
        load_split_model(weights)


def test_a_tied_top_is_saved_alone(found: Any, tmp_path: Path) -> None:
    bottom, top = copy.deepcopy(found.bottom), copy.deepcopy(found.top)
    assert share_tied_weights(bottom, top) == ["lm_head.weight"]
    path = top.save_split_model(tmp_path / "top")
    assert "lm_head.weight" in safetensors.load_file(path)
    assert same(load_split_model(path), found.top)


@torch.no_grad()
def test_copies_are_independent(found: Any) -> None:
    ids, mask = padded()
    parts = [copy.deepcopy(part) for part in found]
    expected = through(found, ids, attention_mask=mask).logits
    assert torch.equal(through(parts, ids, attention_mask=mask).logits, expected)
    for part, original in zip(parts, found, strict=True):
        assert part.stage is not original.stage
        own, kept = next(part.parameters()), next(original.parameters())
        assert own is next(part.stage.parameters())
        assert own is not kept
        for parameter in part.parameters():
            parameter.mul_(1.5)
    assert torch.equal(through(found, ids, attention_mask=mask).logits, expected)
    assert not torch.equal(through(parts, ids, attention_mask=mask).logits, expected)
