"""checkpoint inspect, verify and export: what they print of whole, torn and foreign folders, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from torchdistpackage.checkpoint import Checkpointer
from torchdistpackage.cli.commands import torchdistpackage


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(torchdistpackage, ["checkpoint", *map(str, arguments)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with Checkpointer(tmp_path / "run", net, optimizer=optimizer, keep=None) as saver:
        for step in (20, 40):
            saver.save(step, extra={"epoch": 3})
    return tmp_path / "run"


def tear(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_is_a_table(saved: Path) -> None:
    (saved / "step-00000060.unfinished").mkdir()
    (saved / "step-00000040" / "shared.pt").unlink()
    result = run("inspect", saved)
    assert result.exit_code == 0, result.output
    header, unfinished, torn, whole = result.stdout.splitlines()
    assert header.split() == ["checkpoint", "written", "size", "state"]
    assert unfinished.startswith("step-00000060.unfinished  ")
    assert torn.endswith("kB  torn: shared.pt is missing")
    assert whole.startswith("step-00000020 ")
    assert whole.endswith("kB  whole")
    told = json.loads(run("inspect", saved, "--json").stdout)
    assert [(one["step"], one["fault"]) for one in told[1:]] == [(40, "shared.pt is missing"), (20, None)]


def test_one_checkpoint_in_a_few_lines(saved: Path) -> None:
    result = run("inspect", saved / "step-00000040")
    assert result.exit_code == 0, result.output
    facts = {
        name: value.strip() for name, _, value in (line.partition(" ") for line in result.stdout.splitlines()[:13])
    }
    assert facts["step"] == "40"
    assert facts["model"] == "4 tensors, 23 elements, 92 B, float32"
    assert facts["state"] == "step, exp_avg, exp_avg_sq of 4 parameters"
    assert facts["groups"] == "AdamW, 4 parameters, lr 0.25"
    assert facts["extra"] == "epoch"
    assert "model.0.weight " in result.stdout
    told = json.loads(run("inspect", saved / "step-00000040", "--json").stdout)
    assert told["kinds"]["model"]["elements"] == 23


def test_every_tensor(saved: Path) -> None:
    lines = run("inspect", saved / "step-00000020", "--tensors").stdout.splitlines()
    assert lines[0].split() == ["tensor", "shape", "dtype", "size", "pieces"]
    assert lines[2].split() == ["model.0.weight", "3x4", "float32", "48", "B", "whole"]
    told = json.loads(run("inspect", saved / "step-00000020", "--tensors", "--json").stdout)
    assert told["tensors"]["model.1.bias"] == {"shape": [2], "dtype": "float32", "bytes": 8, "pieces": ["whole"]}
    refused = run("inspect", saved, "--tensors")
    assert refused.exit_code == 1
    assert "such as " in refused.output


def test_verify_reads_everything(saved: Path) -> None:
    result = run("verify", saved)
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["step-00000040", "whole:"],
        ["step-00000020", "whole:"],
    ]
    tear(saved / "step-00000020")
    assert "whole" in run("inspect", saved / "step-00000020").stdout  # its sizes are right
    for path, count in ((saved, 2), (saved / "step-00000020", 1)):
        result = run("verify", path)
        assert result.exit_code == 1
        assert len(result.stdout.splitlines()) == count
        assert "torn: __0_0.distcp has another SHA-256" in result.stdout


def test_export_takes_the_newest_whole_one(saved: Path, tmp_path: Path) -> None:
    (saved / "step-00000040" / "manifest.json").unlink()
    result = run("export", saved, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "1MB")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {tmp_path / 'out'}: model.safetensors, 4 tensors, 46 B\n"
    assert json.loads((tmp_path / "out" / "export.json").read_text())["checkpoint"] == "step-00000020"


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
@pytest.mark.parametrize(("name", "reason"), [("nothing", "no such folder"), ("foreign", "no manifest.json")])
def test_what_is_no_checkpoint_is_said_in_one_message(command: str, name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".metadata").write_bytes(b"x")
    result = run(command, tmp_path / name, *([tmp_path / "out"] if command == "export" else []))
    assert result.exit_code == 1
    assert reason in result.output
    assert "Traceback" not in result.output


def test_runs_are_listed_and_verified_without_torch(saved: Path) -> None:
    for command in ("inspect", "verify"):
        code = f"import sys; sys.argv = ['torchdistpackage', 'checkpoint', {command!r}, {str(saved)!r}]\n"
        code += "from torchdistpackage.cli import main\ntry:\n    main()\nfinally:\n"
        code += "    assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode == 0
