"""The language model learns the same however it is cut, and what it has learnt can be taken anywhere."""

import re
import sys

import pytest
import torch
from example_runs import EXAMPLES, run_in_ranks

from torchdistpackage.schedule import names

pytest.importorskip("transformers")
sys.path.insert(0, str(EXAMPLES))

import train_gpt

SMALL = ["--layers", 4, "--width", 32, "--context", 32, "--batch-size", 8, "--tokens", 12]
STEPS = [*SMALL, "--steps", 10, "--every", 1]


def losses(out):
    """Training and held-out loss of every line of the table after the first."""
    return [[float(a), float(b)] for a, b in re.findall(r"^ +\d+ +([0-9.]+) +([0-9.]+) .*e-", out, re.MULTILINE)]


def start(*options, processes=0, timeout=170):
    return run_in_ranks("train_gpt.py", *options, processes=processes, timeout=timeout)


@pytest.fixture(scope="module")
def plain():
    """A run without the library of each architecture."""
    return {arch: start("--plain", "--arch", arch, *STEPS) for arch in ("gpt2", "llama")}


CUTS = [
    ("llama", 0, ["--pp", 1]),
    ("llama", 2, ["--pp", 2]),
    ("llama", 2, ["--pp", 2, "--schedule", "interleaved-1f1b"]),
    ("gpt2", 2, ["--pp", 2, "--schedule", "zb-v"]),
    ("gpt2", 4, ["--pp", 2, "--microbatches", 2]),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("arch", "processes", "options"), CUTS)
def test_every_step_has_the_loss_of_the_plain_loop(plain, arch, processes, options):
    out = start("--arch", arch, *STEPS, *options, processes=processes)
    found, expected = torch.tensor(losses(out)), torch.tensor(losses(plain[arch]))
    assert expected.shape == (10, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert out.splitlines()[0] == plain[arch].splitlines()[0]
    assert out.splitlines()[-1] == plain[arch].splitlines()[-1], "the sample is drawn alike"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*names(), "auto", "auto-v"])
def test_every_schedule(plain, schedule):
    out = start("--schedule", schedule, *STEPS, processes=2)
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(plain["llama"])), rtol=0, atol=1e-5)


@pytest.mark.timeout(300)
def test_a_saved_model_goes_on_where_it_was_and_is_one_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = [*SMALL, "--steps", 4, "--every", 4]
    out = start("--save", tmp_path / "model", "--plot", tmp_path / "loss.png", *options, processes=2)
    again = start("--model", tmp_path / "model", *options)
    first = re.search(r"^ +0 +([0-9.]+)$", again, re.MULTILINE)
    assert float(first.group(1)) == pytest.approx(losses(out)[-1][1], abs=2e-6)
    assert (tmp_path / "loss.png").stat().st_size > 5000
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 22)
    assert tokenizer.decode(ids[0]) == "def f(x):\n    return x"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits.shape == (1, 22, len(tokenizer))


WRONG = {
    "--pp 3": "--pp 3 needs 3 processes or a multiple; 2 run here",
    "--pp 1 --batch-size 5": "--batch-size 5 is not divisible by the 2 replicas",
    "--width 100": "--width 100 is no multiple of 32: try 96",
    "--microbatches 0": "--microbatches is 0; it must be 1 or more",
    "--context 1": "--context is 1; it must be 2 or more",
    "--model nowhere": "--model nowhere has no config.json",
    f"--save {__file__}": "is a file; give a directory",
}


@pytest.mark.parametrize("options", WRONG)
def test_options_that_do_not_fit(options):
    with pytest.raises(SystemExit, match=re.escape(WRONG[options])):
        train_gpt.check(train_gpt.get_args(options.split()), processes=2)


def test_a_model_that_does_not_fit_the_text(tmp_path):
    from transformers import GPT2Config

    GPT2Config(vocab_size=90, n_positions=64).save_pretrained(tmp_path)
    args = train_gpt.get_args(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="has a vocabulary of 90, but the text has 96 kinds of tokens"):
        train_gpt.make_config(args, None, torch.arange(96), torch.zeros(500))
    with pytest.raises(SystemExit, match="longer than the 64 positions of --model .*: try --context 64"):
        train_gpt.make_config(args, None, torch.arange(90), torch.zeros(500))
    with pytest.raises(SystemExit, match="--prompt 'é' must be made of the text's characters, 'abc'"):
        train_gpt.make_tokenizer(train_gpt.get_args(["--prompt", "é"]), ["abca"])


@pytest.mark.slow
def test_by_default_it_learns_to_write():
    out = start("--pp", 2, processes=2, timeout=900)
    entropy = float(re.match(r"unigram entropy ([0-9.]+) nats", out).group(1))
    assert losses(out)[-1][1] < 2 < 3 < entropy
    expected = losses(start("--plain", "--tokens", 0, timeout=900))
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(expected), rtol=0, atol=1e-3)
    sample = out[out.index("\nclass ") :]
    assert len(sample) > 400
    assert {"self", "return", "def", "if", "in", "is", "the"} & {*re.findall(r"[a-z]+", sample)}
