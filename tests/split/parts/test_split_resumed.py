"""A split that was killed goes on where it was; nothing half-written, foreign or damaged is taken for finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from language_models import language_model

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.parts.checkpoint_plan import plan_split
from torchdistpackage.split.parts.checkpoint_split import split_checkpoint, verify_part, write_parts
from torchdistpackage.split.parts.metadata import COMPONENTS


class Killed(Exception):
    """What the test raises in the middle."""


def killed_at(share: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise Killed

    return progress


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    language_model("Llama").to(torch.bfloat16).save_pretrained(directory, max_shard_size="20KB")
    return directory


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("wanted")
    split_checkpoint(checkpoint, [1, 3], directory)
    return files(directory)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95, 1.0])
def test_killed_at_any_point_it_goes_on(
    share: float, checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        split_checkpoint(checkpoint, [1, 3], tmp_path, progress=killed_at(share))
    finished = [name for name in COMPONENTS if (tmp_path / f"{name}_metadata.json").exists()]
    assert len(finished) < 3
    written = sum(len(content) for content in files(tmp_path).values())
    parts = split_checkpoint(checkpoint, [1, 3], tmp_path)
    assert files(tmp_path) == wanted
    resumed = sum(part.resumed_bytes for part in parts)
    largest = 96 * 32 * 2  # a tensor that was cut is copied anew
    assert written - largest - 3 * 4096 <= resumed <= written
    assert all(part.resumed_bytes == part.num_bytes for part in parts if part.component in finished)


def test_killed_before_the_metadata_nothing_is_copied_again(checkpoint: Path, tmp_path: Path) -> None:
    split_checkpoint(checkpoint, [1, 3], tmp_path)
    (tmp_path / "trunk_metadata.json").unlink()
    (tmp_path / "top_metadata.json").unlink()
    os.rename(tmp_path / "top.safetensors", tmp_path / "top.safetensors.unfinished")
    assert all(part.resumed_bytes == part.num_bytes for part in split_checkpoint(checkpoint, [1, 3], tmp_path))
    for name in COMPONENTS:
        verify_part(tmp_path / f"{name}.safetensors")


def test_a_finished_split_is_not_written_again(checkpoint: Path, tmp_path: Path) -> None:
    split_checkpoint(checkpoint, [1, 3], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    split_checkpoint(checkpoint, [1, 3], tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)  # the same content at another time
    split_checkpoint(copy, [1, 3], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_unfinished_part_of_something_else_is_begun_anew(
    checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    torch.manual_seed(5)
    model = language_model("Llama").to(torch.bfloat16)
    for parameter in list(model.parameters())[3:]:  # the first tensors are the same, then values differ
        parameter.data += 1
    model.save_pretrained(other, max_shard_size="20KB")
    for source, points in ((other, [1, 3]), (checkpoint, [2, 3])):
        out = tmp_path / f"{points[0]}"
        with pytest.raises(Killed):
            split_checkpoint(source, points, out, progress=killed_at(0.15))
        split_checkpoint(checkpoint, [1, 3], out)
        assert files(out) == wanted


def test_other_parts_are_not_mixed_with(checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "parts"
    other = tmp_path / "other"
    language_model("GPT2").save_pretrained(other)
    split_checkpoint(other, [1, 3], out)
    before = files(out)
    with pytest.raises(CheckpointError, match=r"bottom.safetensors, gpt2 of other, layers 0 to 0; .*overwrite=True"):
        split_checkpoint(checkpoint, [1, 3], out)
    assert files(out) == before
    split_checkpoint(checkpoint, [1, 3], out, overwrite=True)
    assert files(out) == wanted
    with pytest.raises(CheckpointError, match="layers 1 to 2.*overwrite"):
        split_checkpoint(checkpoint, [1, 2], out)


def test_files_of_somebody_else_are_not_touched(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "top.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"top.safetensors, without metadata .*--overwrite"):
        split_checkpoint(checkpoint, [1, 3], tmp_path)
    assert files(tmp_path) == {"top.safetensors": b"precious"}


def test_the_same_model_with_other_values_is_another_one(checkpoint: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    out = tmp_path / "parts"
    split_checkpoint(trained, [1, 3], out)
    path = sorted(trained.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"parts that are not of this split: top.safetensors, llama of trained"):
        split_checkpoint(trained, [1, 3], out)


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_finished_part_that_was_damaged_is_mended(
    damage: str, checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    split_checkpoint(checkpoint, [1, 3], tmp_path)
    path = tmp_path / "trunk.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-100])
    told: list[int] = []
    with path.open("rb") as held:  # as if a part were mapped from it
        _, trunk, _ = split_checkpoint(checkpoint, [1, 3], tmp_path, progress=lambda done, total: told.append(done))
        assert held.read() != wanted["trunk.safetensors"]
    assert files(tmp_path) == wanted
    assert 0 < trunk.resumed_bytes < trunk.num_bytes
    assert told == sorted(told)


def test_a_second_run_at_the_same_time(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_split(checkpoint, [1, 3])

    def progress(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="another process is splitting into .* now; wait for it"):
            write_parts(plan, tmp_path)

    write_parts(plan, tmp_path, progress=progress)
    verify_part(tmp_path / "top.safetensors")
