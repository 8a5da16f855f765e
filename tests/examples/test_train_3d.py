"""Three dimensions of parallelism at once, as an example: the plain loop's numbers, and one file for plain timm."""

import re

import pytest
import torch
from example_runs import run_in_ranks

pytest.importorskip("timm")
pytest.importorskip("sklearn")


def differences(*options, processes):
    out = run_in_ranks("train_3d.py", "--check", 3, *options, processes=processes, timeout=120)
    assert "largest differences from the plain loop" in out
    return [float(number) for number in re.findall(r"(?:loss|norm|weights) ([0-9.e+-]+)", out)]


@pytest.mark.parametrize(
    "options",
    [
        ["--pp", 2, "--tp", 2],
        pytest.param(["--pp", 2, "--optimizer", "ddp", "--schedule", "zb-v"], marks=pytest.mark.slow),
    ],
)
def test_four_processes_have_the_numbers_of_the_plain_loop(options):
    found = differences(*options, processes=4)
    assert len(found) == 3
    assert max(found) < 1e-12


def test_a_wrong_number_of_processes_is_named():
    with pytest.raises(AssertionError, match="--pp 2 --tp 1 takes 2 processes for each replica, and here are 3"):
        run_in_ranks("train_3d.py", "--pp", 2, processes=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_processes_learn_digits_and_write_one_file(tmp_path):
    file = tmp_path / "digits.pt"
    out = run_in_ranks("train_3d.py", "--pp", 2, "--tp", 2, "--save", file, processes=8, timeout=500)
    accuracy, averaged = re.findall(r"accuracy ([0-9.]+)%, of the average ([0-9.]+)%", out)[-1]
    assert float(accuracy) > 95
    assert f"a plain timm model that loads them has {averaged}%" in out
    held = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+ +\[", line)]
    assert len(held) == 8
    assert all(float(row[5]) < 1.01 * float(row[4]) for row in held), "two replicas: half of AdamW's two states"
    weights = torch.load(file)
    assert weights["blocks.3.attn.qkv.weight"].shape == (192, 64)
    assert sum(tensor.numel() for tensor in weights.values()) == 202_058
