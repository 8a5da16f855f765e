"""Exports of language models load with `from_pretrained` and compute the same, whatever their files look like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from language_models import OPTIONS, language_model, padded
from torch import nn

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint import Checkpointer, export_safetensors

pytest.importorskip("transformers")
QUICK = [("Llama", {"tie_word_embeddings": True}), ("Mixtral", {}), ("GPT2", {})]


def saved(model: nn.Module, folder: Path) -> Path:
    with Checkpointer(folder, model, config=model.config) as saver:
        saver.save(3)
    return folder


def check(model: nn.Module, run: Path, out: Path, size: int | str) -> int:
    from transformers import AutoModelForCausalLM

    report = export_safetensors(run, out, max_shard_size=size)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, mask = padded()
    assert torch.equal(model(ids, attention_mask=mask).logits, again.eval()(ids, attention_mask=mask).logits)
    return len(report.files)


@pytest.mark.parametrize(("family", "options"), QUICK)
def test_from_pretrained_loads_it(family: str, options: dict[str, bool], tmp_path: Path) -> None:
    model = language_model(family, 3, **options)
    run = saved(model, tmp_path / "run")
    assert check(model, run, tmp_path / "one", "5GB") == 1
    assert check(model, run, tmp_path / "many", 30_000) > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", OPTIONS)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    run = saved(model, tmp_path / "run")
    for number, size in enumerate(("5GB", 40_000, 1000)):
        check(model, run, tmp_path / str(number), size)


def test_another_type_is_in_the_configuration(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = language_model("Llama", 2)
    export_safetensors(saved(model, tmp_path / "run"), tmp_path / "out", dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == again.config.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(CheckpointError, match="without aliases"):
        export_safetensors(tmp_path / "run", tmp_path / "out", aliases=True)


def test_other_heads_keep_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file

    model = language_model("Llama", 2)
    model.adapter = nn.Linear(2, 2)
    export_safetensors(saved(model, tmp_path / "run"), tmp_path / "out")
    assert {*load_file(tmp_path / "out" / "model.safetensors")} == {*model.state_dict()}
    assert "adapter.bias, adapter.weight" in caplog.text


def test_a_configuration_of_other_sizes(tmp_path: Path) -> None:
    model = language_model("Llama", 2)
    with Checkpointer(tmp_path / "run", model, config=language_model("Llama", 2, vocab_size=97).config) as saver:
        saver.save(3)
    with pytest.raises(CheckpointError, match=r"\(96, 32\) in .* and \(97, 32\) by its config.json"):
        export_safetensors(tmp_path / "run", tmp_path / "out")
