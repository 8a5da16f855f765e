"""A model split over client and server writes and learns as the whole one; mistakes are said by every process."""

import contextlib
import importlib
import io
import json
import re
import sys

import pytest
import torch
from distributed_harness import run_distributed
from example_runs import EXAMPLES, run_as_said, run_in_ranks

pytest.importorskip("transformers")
sys.path.insert(0, str(EXAMPLES))

import split_and_generate
import split_training

WRITE, TRAIN = "split_and_generate.py", "split_training.py"
SHORT = ["--steps", 4, "--batch-size", 7]


def one_process(rank, world, script, options):
    """How the script ends here: 0, or what it says; and what it prints."""
    sys.argv = [script, *map(str, options)]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        importlib.import_module(script.removesuffix(".py")).main()
    return ended.value.code, out.getvalue()


def start(script, *options, processes=3):
    """As torchrun would, with less to wait for: what each process says at its end, and what all print."""
    codes, out = zip(*run_distributed(one_process, processes, script, options, timeout=100), strict=True)
    return [*codes], "".join(out)


def refused(ended, text):
    """Every process says it."""
    for code in ended[0]:
        assert re.search(text, str(code)), ended


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The files of a short training that was checked."""
    folder = tmp_path_factory.mktemp("split") / "parts"
    options = [*SHORT, "--microbatches", 3, "--freeze", "trunk", "--schedule", "zb-h1", "--save", folder, "--check"]
    out = run_in_ranks(TRAIN, *options, processes=3)
    assert "check: 4 losses" in out
    assert len(re.findall(r"^(?:bottom|trunk|top) +has layers [0-9.]+, [0-9,]+ parameters", out, re.MULTILINE)) == 3
    return folder


@pytest.mark.timeout(200)
def test_the_text_is_that_of_the_whole_model():
    out = run_as_said(WRITE, "--at", "1,5", "--check", processes=3)
    assert "check: the same tokens as the whole model" in out
    assert "  Beautiful is better than ugly.\n" in out
    assert "  Now is better than never.\n" in out
    assert "trunk  has layers 1..4" in out


@pytest.mark.timeout(200)
@pytest.mark.parametrize("frozen", ["bottom", "top"])
def test_every_step_has_the_loss_of_the_plain_loop(frozen):
    codes, out = start(TRAIN, *SHORT, "--microbatches", 4, "--check", "--freeze", frozen)
    assert codes == [0, 0, 0], out
    assert "check: 4 losses" in out


@pytest.mark.timeout(200)
def test_parts_that_were_saved_go_on(parts):
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    assert names == ["bottom.safetensors", "top.safetensors", "trunk.safetensors"]
    options = ["--tokens", 5, "--temperature", 0.7, "--prompt", "def ", "--prompt", "    if "]
    (codes, first), (_, again) = (start(WRITE, "--parts", parts, *options) for _ in range(2))
    texts = [re.findall(r"^  (.*)$", out, re.MULTILINE) for out in (first, again)]
    assert codes == [0, 0, 0]
    assert len(texts[0]) == 2
    assert texts[0][0].startswith("def ")
    assert texts[0] == texts[1], "the seed says what is drawn"


@pytest.mark.timeout(200)
def test_parts_that_do_not_fit_together(parts, tmp_path):
    for name in parts.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    about = tmp_path / "top_metadata.json"
    found = json.loads(about.read_text())
    found["config"]["layer_norm_epsilon"] = 1e-3
    about.write_text(json.dumps(found))
    refused(start(WRITE, "--parts", tmp_path), "the parts are of different models")
    (tmp_path / "bottom.safetensors").unlink()
    refused(start(WRITE, "--parts", tmp_path), "bottom: .*bottom.safetensors is not there")


def test_parts_of_different_cuts(parts, tmp_path):
    codes, out = start(TRAIN, "--steps", 1, "--at", "1,3", "--save", tmp_path)
    assert codes == [0, 0, 0], out
    for name in ("top.safetensors", "top_metadata.json"):
        (tmp_path / name).write_bytes((parts / name).read_bytes())
    refused(start(WRITE, "--parts", tmp_path), "the layers of the parts do not join: bottom 0..0, trunk 1..2, top 4..5")


def test_a_mistake_ends_all_processes(parts):
    refused(start(TRAIN, processes=2), "three processes are needed")
    refused(start(TRAIN, "--at", "2,6"), "got 2, 6: try 2, 4")
    text = "^bottom: --tokens 120 after a prompt of 15 are more than the 128 positions"
    refused(start(WRITE, "--parts", parts, "--tokens", 120), text)


WRONG = {
    "--tokens 0": "--tokens is 0",
    "--check --temperature 1": "--check compares the likeliest tokens",
    "--check --parts x": "--check needs the whole model",
}


@pytest.mark.parametrize("options", WRONG)
def test_options_that_do_not_fit(options, capsys):
    with pytest.raises(SystemExit):
        split_and_generate.get_args(options.split())
    assert WRONG[options] in capsys.readouterr().err


def test_labels_of_padding_are_not_learnt():
    args = split_training.get_args(["--steps", "1", "--batch-size", "6"])
    tokenizer = split_training.character_tokenizer(split_training.read_lines())
    ids, mask, labels = next(split_training.batches(args, tokenizer))
    assert torch.equal(labels == -100, mask == 0)
    assert torch.equal(labels[mask == 1], ids[mask == 1])
    assert len({*mask.sum(1).tolist()}) > 1, "rows have different lengths"
    assert split_training.predicted(labels) == mask.sum() - 6
