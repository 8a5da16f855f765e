"""What a stage needs is what the real loader reads for it; and our headers are those of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import configuration, language_model

pytest.importorskip("transformers")
library = pytest.importorskip("safetensors.torch")

from torchdistpackage.errors import CheckpointError  # noqa: E402
from torchdistpackage.split.causal_lm import split_causal_lm  # noqa: E402
from torchdistpackage.split.decoder.filling import fill_stage  # noqa: E402
from torchdistpackage.split.decoder.needed_tensors import needed_tensors  # noqa: E402
from torchdistpackage.split.decoder.pretrained import read_config, without_weights  # noqa: E402
from torchdistpackage.split.decoder.safetensors_header import make_header, read_header  # noqa: E402
from torchdistpackage.split.decoder.weight_files import LazyTensor, WeightFiles  # noqa: E402

FAMILIES = ["GPT2", "Llama", "Qwen2", "Gemma", "Gemma3Text", "Gemma3nText", "Phi3", "GPTNeoX", "Mixtral", "Qwen3Moe"]
FAMILIES += ["OPT", "Bloom", "Falcon", "GPTJ"]


class Noting:
    """The real files; remembers what was read of them."""

    def __init__(self, files: WeightFiles) -> None:
        self.files, self.name, self.noted = files, files.name, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)

    def tensors(self) -> dict[str, Any]:
        return {name: LazyTensor(self, name) for name in self.files.file_of}  # type: ignore[arg-type]

    def read(self, name: str, part: Any = ...) -> torch.Tensor:
        self.noted.add(name)
        return self.files.read(name, part)


def stage_of(directory: Path, stage: int) -> tuple[Any, Any]:
    whole = without_weights(read_config(str(directory)), torch.bfloat16)
    return split_causal_lm(whole, 3, [stage], cut_points=[1, 3])[stage], whole


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_loader_reads(family: str, tmp_path: Path) -> None:
    language_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = read_header(tmp_path / "model.safetensors").tensors
    seen: set[str] = set()
    for stage in range(3):
        with WeightFiles(str(tmp_path)) as files:
            source = Noting(files)
            fill_stage(*stage_of(tmp_path, stage), source, torch.bfloat16)
        assert needed_tensors(*stage_of(tmp_path, stage), tensors, torch.bfloat16) == source.noted != set()
        seen |= source.noted
    assert seen == tensors.keys()


def test_a_missing_tensor_is_named_without_reading(tmp_path: Path) -> None:
    language_model("Llama").save_pretrained(tmp_path)
    tensors = dict(read_header(tmp_path / "model.safetensors").tensors)
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"parts/x does not hold model.norm.weight of LlamaForCausalLM"):
        needed_tensors(*stage_of(tmp_path, 2), tensors, torch.float32, name="parts/x")


def test_what_is_missing_takes_no_memory(tmp_path: Path) -> None:
    configuration("Llama", intermediate_size=2**40).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not hold lm_head.weight, .*model.layers.3.mlp.down_proj.weight"):
        needed_tensors(*stage_of(tmp_path, 2), {}, torch.float32)


def test_a_header_is_byte_for_byte_that_of_the_library(tmp_path: Path) -> None:
    types = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float32,
    ]
    types += [torch.float64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {f"{name}{place}": torch.ones(place, 3).to(dtype) for place, dtype in enumerate(types) for name in "bäA"}
    tensors |= {"scalar": torch.tensor(1.0), 'with "quotes"\n': torch.ones(2)}
    library.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    theirs = read_header(tmp_path / "theirs")
    assert make_header(theirs.tensors) == theirs
    assert {name: entry.shape for name, entry in theirs.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
