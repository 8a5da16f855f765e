"""split MODEL_DIR --at --out writes the parts, prints them, and says what is wrong in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from language_models import language_model
from safetensors import safe_open

from torchdistpackage.cli.commands import torchdistpackage
from torchdistpackage.split.parts.checkpoint_split import verify_part


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(torchdistpackage, ["split", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    language_model("Llama").save_pretrained(directory)
    return directory


def test_the_parts_and_their_table(checkpoint: Path, tmp_path: Path) -> None:
    for _ in range(2):  # again: it is all there
        result = run(checkpoint, "--at", "1,3", "--out", tmp_path / "parts")
        assert result.exit_code == 0, result.output
        assert [line.split()[:3] for line in result.stdout.splitlines()[:4]] == [
            ["part", "layers", "tensors"],
            ["bottom", "0-0", "10"],
            ["trunk", "1-2", "18"],
            ["top", "3-4", "20"],
        ]
        assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["bottom", "trunk", "top"]
        assert "load_split_model(" in result.stdout
    verify_part(tmp_path / "parts" / "trunk.safetensors")
    with safe_open(tmp_path / "parts" / "top.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()


def test_a_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--at", "2, 4", "--dry-run", "--out", tmp_path / "parts")
    assert result.exit_code == 0, result.output
    assert "trunk   2-3 " in result.stdout
    assert run(checkpoint, "--at", "2,4", "--dry-run").exit_code == 0
    assert not (tmp_path / "parts").exists()


def test_other_parts_are_replaced_on_demand(checkpoint: Path, tmp_path: Path) -> None:
    assert run(checkpoint, "--at", "1,3", "--out", tmp_path).exit_code == 0
    refused = run(checkpoint, "--at", "1,4", "--out", tmp_path)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.output
    assert run(checkpoint, "--at", "1,4", "--out", tmp_path, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--at", "a,b"], 1, "--at 'a,b' is no list of layers: write where trunk and top begin, --at 2,10"),
        (["--at", "3,1"], 1, "within the layers 1..4 of 5, so that each part has one; got 3,1"),
        (["--at", "2,10"], 1, "got 2,10: try 1,4"),
        (["--at", "2"], 1, "two layers say where trunk and top begin"),
        (["--at", "2,3", "-p", "2"], 2, "-p is for cutting a model by tracing"),
        (["--at", "2,3", "--code", "-i", "2"], 2, "-i, --code is for cutting a model by tracing"),
        ([], 2, "without --at"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], code: int, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, "--out", tmp_path / "parts", *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "parts").exists()


def test_the_two_ways_are_told_apart(checkpoint: Path) -> None:
    without = run("torchvision:resnet18", "-p", "2")
    assert without.exit_code == 2
    assert "without -i, torchvision:resnet18 cannot be cut by tracing" in without.output
    assert "split MODEL_DIR --at 2,10 --out DIR" in without.output
    nowhere = run("nowhere", "--at", "1,2", "--out", "parts")
    assert nowhere.exit_code == 1
    assert "nowhere is not there" in nowhere.output
    assert "without --out" in run(checkpoint, "--at", "1,2").output
