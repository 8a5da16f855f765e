"""The file beside a part: it comes back as it was written, and says what is wrong with one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.parts.metadata import PartMetadata, metadata, metadata_path, weights_path


class Config:
    model_type = "llama"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": 4,
            "id2label": {0: "a"},
            "limit": (0.0, float("inf")),
            "_name_or_path": "/home/me/llama",
        }


def made(**changes: Any) -> PartMetadata:
    values: dict[str, Any] = {"num_parameters": 12, "num_bytes": 3 * 2**19, "dtype": "torch.bfloat16"}
    values |= {"sha256": {"w": "0a" * 32}, "source": "/home/me/llama/", "extra": {"cut_points": [2, 10]}}
    return metadata("trunk", 2, 10, 12, Config(), **values | changes)


def test_there_and_back(tmp_path: Path) -> None:
    path = metadata_path(weights_path(tmp_path, "trunk"))
    made().write(path)
    back = PartMetadata.read(path)
    assert back.sha256 == {"w": "0a" * 32}
    assert (back.num_layers, back.memory_mb, back.dtype) == (8, 1.5, "bfloat16")
    assert (back.source, back.names) == ("llama", "checkpoint")
    assert back.config == {
        "model_type": "llama",
        "hidden_size": 4,
        "id2label": {"0": "a"},
        "limit": [0.0, float("inf")],
    }
    assert ": Infinity" not in path.read_text().replace('"__float__": "Infinity"', "")  # it is JSON for all readers
    assert path.name == "trunk_metadata.json"
    assert [*tmp_path.iterdir()] == [path]
    assert "/home" not in path.read_text()
    assert set(json.loads(path.read_text())) >= {"num_layers", "format_version", "library_version", "cut_points"}


def test_keys_that_are_not_known_are_kept() -> None:
    found = json.loads(made().to_json()) | {"colour": "blue"}
    assert PartMetadata.from_json(json.dumps(found)).extra == {"cut_points": [2, 10], "colour": "blue"}
    assert json.loads(PartMetadata.from_json(json.dumps(found)).to_json()) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": "middle"}, "component is 'middle', not bottom, trunk or top"),
        ({"start_layer": -1}, "start_layer is -1"),
        ({"start_layer": True}, "start_layer is True"),
        ({"end_layer": 20}, "layers 2 to 20 of 12 are not 8 layers"),
        ({"num_layers": 7}, "layers 2 to 10 of 12 are not 7 layers"),
        ({"component": "bottom"}, "the bottom begins at layer 2, not at 0"),
        ({"component": "top"}, "the top ends at layer 10, not at 12"),
        ({"sha256": {"w": "abc"}}, "sha256 is .*, not 64 hexadecimal digits"),
        ({"saved_at": "yesterday"}, "saved_at is 'yesterday', not a time"),
        ({"config": []}, "config is "),
        ({"memory_mb": "much"}, "memory_mb is 'much'"),
        ({"format_version": "1"}, "format_version is '1', not 1"),
        ({"format_version": 2}, "has format 2, written by torchdistpackage .* install a later one"),
    ],
)
def test_impossible_fields_are_named(changes: dict[str, Any], message: str) -> None:
    found = json.loads(made().to_json()) | changes
    with pytest.raises(CheckpointError, match=message):
        PartMetadata.from_json(json.dumps(found))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "top_metadata.json"
    with pytest.raises(CheckpointError, match="top_metadata.json is not there"):
        PartMetadata.read(path)
    for content, message in (("{", "is no JSON"), ("[]", "holds list"), ("{}", "format_version, .*sha256.* missing")):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            PartMetadata.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        PartMetadata.read(path)
