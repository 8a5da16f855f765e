"""comm-check starts processes by itself, takes part under torchrun, and says what is wrong."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(90)
COMMAND = [sys.executable, "-c", "from torchdistpackage.cli import main; main()", "comm-check", "--timeout", "30"]


def run(*arguments, command=COMMAND):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=80, env=environment)


def test_two_processes_are_started_here():
    result = run("--nproc", "2", "--backend", "gloo", "--numel", "100", "--iterations", "1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["what", "operation", "bytes", "latency", "us", "bandwidth", "GB/s"]
    assert sum(line.startswith("link pipe") for line in lines) == 2
    assert lines[-1] == "all groups and links work"


def test_a_mistake_is_one_message():
    result = run("--nproc", "1", "--backend", "gloo", "--pipe", "2")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Error: 1 ranks are not pipelines of 2; choose --pipe so that it divides\n"


@pytest.mark.parametrize("where", [(), ("--nproc", "2")])
def test_a_backend_that_there_is_not_is_one_message(where):
    result = run("--backend", "glooo", *where)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: backend 'glooo': torch does not know 'glooo'")


def test_under_torchrun_each_process_is_a_rank():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    result = run("--backend", "gloo", "--numel", "100", command=[*launcher, *COMMAND])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("all groups and links work") == 1
