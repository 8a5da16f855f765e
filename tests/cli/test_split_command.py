"""split prints how a model would be cut, and says what is wrong in one message."""

import re

import pytest
from click.testing import CliRunner

from torchdistpackage.cli.commands import torchdistpackage

RESNET = ["torchvision:resnet18", "-i", "2x3x32x32", "--costs", "flops"]


def run(*arguments):
    return CliRunner().invoke(torchdistpackage, ["split", *arguments])


def test_the_table():
    result = run(*RESNET, "-p", "2", "--code")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ +0  conv1 .. ", result.stdout, re.M)
    assert "imbalance" in result.stdout
    assert "# stage 1\ndef forward(self, " in result.stdout


def test_a_model_of_ones_own_on_the_meta_device(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential("
        "nn.Embedding(50_000_000, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 9))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run("mine:build", "-p", "2", "-i", "2x7<100", "--meta")
    assert result.exit_code == 0, result.output
    assert "TFLOP" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "-i", "2"], "write timm:NAME"),
        (["torchvision:resnet19", "-i", "2"], "cannot be built"),
        (["torchvision:resnet18", "-i", "2xa"], "is no shape"),
        (["torchvision:resnet18", "-i", "2x3x32x32", "--layout", "t|"], "a layout starts with E"),
    ],
)
def test_a_mistake_is_one_message(arguments, message):
    result = run(*arguments, "-p", "2")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
