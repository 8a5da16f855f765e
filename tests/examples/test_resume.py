"""A run whose processes are killed ends with the bits of one that nobody disturbed; a torn checkpoint is never used."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import EXAMPLES, run_in_ranks

sys.path.insert(0, str(EXAMPLES))

import checkpoint_files

PARTS = {"stage-0-replica-0.pt": b"first" * 1000, "stage-1-replica-0.pt": b"second" * 1000}


# --- the files --------------------------------------------------------------------------------------------------------


def write(output, step, keep=2, only=PARTS):
    """What the ranks do, one after the other; without all parts no manifest is written."""
    folder = checkpoint_files.step_folder(output, step)
    for name in only:
        checkpoint_files.write_part(folder, name, lambda file, name=name: file.write(PARTS[name] + b"%d" % step))
    if len(only) == len(PARTS):
        checkpoint_files.finish(folder, list(PARTS), keep)
    return folder


def names(output):
    return sorted(path.name for path in output.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TEARS = {
    "truncated": (
        lambda f: os.truncate(f / "stage-1-replica-0.pt", 99),
        "stage-1-replica-0.pt has 99 bytes instead of",
    ),
    "a byte flipped": (lambda f: flip(f / "stage-0-replica-0.pt"), "stage-0-replica-0.pt has another SHA-256"),
    "a part missing": (lambda f: (f / "stage-1-replica-0.pt").unlink(), "stage-1-replica-0.pt is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (
        lambda f: os.truncate(f / "manifest.json", 40),
        "manifest.json cannot be read (JSONDecodeError",
    ),
    "another manifest": (lambda f: (f / "manifest.json").write_text("[3]"), "manifest.json cannot be read (TypeError"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text('{"parts": {}}'), "names no parts"),
    "bytes for a manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_by_name_and_written_again(tmp_path, tear):
    good, torn, said = write(tmp_path, 10), write(tmp_path, 20), []
    damage, reason = TEARS[tear]
    damage(torn)
    assert checkpoint_files.newest(tmp_path, said.append) == good
    assert len(said) == 1
    assert said[0].startswith("skipped step-00000020: ")
    assert reason in said[0]
    write(tmp_path, 20)
    assert checkpoint_files.newest(tmp_path, said.append) == torn
    assert len(said) == 1


def test_what_a_killed_run_left_does_not_count_and_goes(tmp_path):
    good, left, said = write(tmp_path, 10), write(tmp_path, 20, only=["stage-0-replica-0.pt"]), []
    (left / "stage-1-replica-0.pt.tmp").write_bytes(b"half of it")
    (left / "stage-7-replica-0.pt").write_bytes(b"of a run with more stages")
    assert checkpoint_files.newest(tmp_path, said.append) == good
    assert said == ["skipped step-00000020: it has no manifest.json, so it was not finished"]
    assert names(write(tmp_path, 20)) == ["manifest.json", *PARTS]


def test_the_newest_stay_and_leftovers_before_them_go(tmp_path):
    (tmp_path / "step-of-somebody").mkdir()
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 35, only=["stage-0-replica-0.pt"])
    os.truncate(tmp_path / "step-00000030" / "stage-1-replica-0.pt", 5)
    write(tmp_path, 50, only=["stage-0-replica-0.pt"])
    write(tmp_path, 40)
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050", "step-of-somebody"]
    write(tmp_path, 60, keep=1)
    assert names(tmp_path) == ["step-00000060", "step-of-somebody"]


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert checkpoint_files.newest(tmp_path / "nowhere") is None
    assert checkpoint_files.newest(tmp_path) is None


def killed_at_line(number, work):
    """Runs `work` in a forked process that is killed before its line `number`; whether it came that far."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = iter(range(number))

    def trace(frame, event, _):
        here = frame.f_code.co_filename == checkpoint_files.__file__
        if here and event == "line" and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace if here else None

    sys.settrace(trace)
    work()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_between_any_two_lines_leaves_a_whole_checkpoint(tmp_path):
    write(tmp_path, 10, keep=1)
    line, found = 0, set()
    while killed_at_line(line, partial(write, tmp_path, 10 * line + 20, keep=1)):
        newest = checkpoint_files.newest(tmp_path, lambda text: None)
        step = checkpoint_files.step_of(newest)
        assert (newest / "stage-1-replica-0.pt").read_bytes() == PARTS["stage-1-replica-0.pt"] + b"%d" % step
        found.add(step - 10 * line)
        write(tmp_path, 10 * line + 20, keep=1)  # the restarted run comes to the same step
        assert names(tmp_path) == [f"step-{10 * line + 20:08d}"]
        line += 1
    assert found == {10, 20}, "the one before or the new one"
    assert line > 80


# --- what is random ---------------------------------------------------------------------------------------------------


class Noise:
    """A data set with random transforms of all three kinds."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), float(torch.rand(()))


def test_a_sample_depends_on_seed_epoch_and_index_only():
    data = checkpoint_files.RepeatableDataset(Noise(), seed=3)
    before = random.random(), np.random.rand(), torch.rand(())
    checkpoint_files.seed_all(1)
    first = [data[index] for index in range(12)]
    again = [data[index] for index in reversed(range(12))][::-1]
    drawn = random.random(), np.random.rand(), torch.rand(())
    assert first == again
    assert len({sample[1:] for sample in first}) == 12
    checkpoint_files.seed_all(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(())) != before
    data.set_epoch(1)
    assert data[0] != first[0]


def test_an_epoch_begins_in_its_middle():
    sampler = checkpoint_files.ResumableSampler(range(20), 2, 1, seed=5)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, skip=4)
    assert list(sampler) == whole[4:]
    sampler.set_epoch(3)
    assert list(sampler) == whole


# --- the whole run ----------------------------------------------------------------------------------------------------


class Run:
    """torchrun with two workers; what it says is read as it comes."""

    def __init__(self, output, *options, restarts=0):
        output.mkdir()
        self.output, self.said = output, []
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        files = ["--output", output, "--resume", "--log-losses", output / "losses"]
        command = [sys.executable, *launcher, EXAMPLES / "train_deit.py", *options, *files]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stdout), daemon=True)
        self.reader.start()

    def workers(self):
        """Process ids of the workers that run."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            own = b"train_deit" in command and b"torch.distributed.run" not in command  # forked, but not yet a worker
            if int(parent) == self.process.pid and state != "Z" and own:
                found.append(int(entry.name))
        return sorted(found)

    def new_workers(self, old=()):
        """Waits for two workers that are none of the old ones."""
        found = []
        self.wait_for(lambda: found.append({*self.workers()} - {*old}) or len(found[-1]) == 2)
        return found[-1]

    def wait_for(self, condition, timeout=300):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, "the run ended:\n" + self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def text(self):
        return "".join(self.said)

    def end(self, timeout=300):
        code = self.process.wait(timeout)
        self.reader.join(30)
        assert code == 0, self.text()
        return self


@pytest.fixture
def start():
    """Starts runs; those that a failed test leaves behind are ended with it."""
    runs = []
    yield lambda *options, **restarts: runs.append(Run(*options, **restarts)) or runs[-1]
    for run in runs:
        run.process.terminate()  # torchrun ends its workers
        run.process.wait(60)


def whole(output, step):
    return (checkpoint_files.step_folder(output, step) / "manifest.json").exists()


def bits(value):
    """A checkpoint's part with bytes for its tensors; without the table, which has seconds in it."""
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items() if key != "table"}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def assert_same_end(output, other):
    """Weights, optimizer, random numbers, scale and losses of the runs in two folders, bit by bit."""
    first, second = checkpoint_files.newest(output), checkpoint_files.newest(other)
    assert first.name == second.name
    parts, others = checkpoint_files.load_parts(first), checkpoint_files.load_parts(second)
    assert "model" in parts["stage-0-replica-0.pt"]
    for key in ("model", "optimizer", "log", "random", "scaler", "epoch", "rows", "layout"):
        for name in (*parts, *others):
            assert bits(parts[name].get(key)) == bits(others[name].get(key)), (name, key)
    assert (output / "losses").read_text() == (other / "losses").read_text()


SMALL = ["--depth", 2, "--drop-path", 0.2, "--warmup-epochs", 0.5]


@pytest.mark.timeout(400)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, start):
    options = [*SMALL, "--pp", 2, "--epochs", 1, "--steps-limit", 6, "--checkpoint-every", 2]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    run_in_ranks(
        "train_deit.py", *options, "--output", undisturbed, "--log-losses", undisturbed / "losses", processes=2
    )
    killed = start(tmp_path / "killed", *options, restarts=20)
    killed.wait_for(lambda: whole(killed.output, 2))
    os.kill(killed.workers()[1], signal.SIGKILL)
    killed.end()
    assert re.search(r"restart \d+: torchrun says above", killed.text())
    assert re.search(r"resumed from step-0000000[24] \(epoch 0, step [24]\)", killed.text())
    assert_same_end(undisturbed, killed.output)


def random_images(folder):
    """An image folder of noise, which every crop and flip changes."""
    from PIL import Image

    for part, count in (("train", 48), ("val", 8)):
        for label in "abcdefg":
            (folder / part / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / "abcdefg"[number % 7] / f"{number}.png")
    return folder


SEED = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
KILLS = 5
SLOW = {
    "float32": ["--pp", 2, "--epochs", 8],
    "fp16": ["--pp", 2, "--epochs", 2, "--amp", "fp16", "--batch-size", 16],
    "replicas": ["--pp", 1, "--dp", 2, "--epochs", 16],
    "images": ["--pp", 2, "--epochs", 40, "--batch-size", 8, "--workers", 1, "--checkpoint-every", 2],
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", SLOW)
def test_kills_at_random_moments_change_no_bit(tmp_path, start, case):
    options = [*SMALL, "--checkpoint-every", 3, *SLOW[case]]
    if case == "images":
        options += ["--data-path", random_images(tmp_path / "data")]
    chance = random.Random(f"{SEED} {case}")
    print(f"\n{case}: KILL_SEED={SEED}")
    began = time.monotonic()
    undisturbed = start(tmp_path / "undisturbed", *options)
    undisturbed.new_workers()
    born = time.monotonic()
    undisturbed.wait_for(lambda: any(undisturbed.output.glob("step-*")))
    start_up = time.monotonic() - born
    undisturbed.end(600)
    steps = time.monotonic() - born - start_up
    # Long enough for start-up, steps and checkpoints; too short for all lives together to come to the end.
    window = start_up + steps / (KILLS + 1)
    killed, seen, moments = start(tmp_path / "killed", *options, restarts=20), set(), []
    for _ in range(KILLS):
        seen |= killed.new_workers(seen)
        moments.append(chance.uniform(0, window))
        time.sleep(moments[-1])
        killed.wait_for(killed.workers)  # for none that is left, if the run ended before all kills: make it longer
        os.kill(chance.choice(killed.workers()), signal.SIGKILL)
    killed.end(600)
    restarts = max(map(int, re.findall(r"restart (\d+): ", killed.text())))
    assert restarts >= KILLS
    assert_same_end(undisturbed.output, killed.output)
    seconds, resumed = time.monotonic() - began, re.findall(r"(?:resumed|skipped).*", killed.text())
    print(f"start-up {start_up:.1f} s, steps {steps:.1f} s, killed after {[round(moment, 1) for moment in moments]} s")
    print(f"{KILLS} kills, {restarts} restarts, {seconds:.0f} s with the undisturbed run, same bits; {resumed}")
