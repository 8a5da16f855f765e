"""Runs the examples: as their first lines say, or in the ranks of the harness, which start in no time.

Both run the file itself, as `__main__`, in the environment that torchrun makes. What torchrun and a fresh interpreter
add is the same for every example and costs 10 s of CPU time a run, so one example of each kind of start shows it.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

from distributed_harness import run_distributed

EXAMPLES = Path(__file__).parents[1] / "examples"
_NO_LAUNCHER = dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])


def run_as_said(script: str, *options: object, processes: int = 0, timeout: float = 170) -> str:
    """What a user sees: by torchrun on so many processes, or for 0 by plain `python`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    process = subprocess.Popen(
        [sys.executable, *launcher, str(EXAMPLES / script), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # not killed: torchrun ends its workers first
        out, err = process.communicate()
        raise AssertionError(f"{script} did not end within {timeout:g} s:\n{out}{err}") from None
    assert process.returncode == 0, out + err
    return out


def run_in_ranks(script: str, *options: object, processes: int = 0, timeout: float = 170) -> str:
    """The same in forked ranks; what each has printed, one after the other. Fails with what a rank raised or exited."""
    env = {} if processes else _NO_LAUNCHER
    words = [str(option) for option in options]
    return "".join(run_distributed(_one_rank, processes or 1, script, words, timeout=timeout, env=env))


def _one_rank(rank: int, world_size: int, script: str, words: list[str]) -> str:
    sys.path.insert(0, str(EXAMPLES))  # as python does for a script
    sys.argv = [str(EXAMPLES / script), *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise AssertionError(
                    f"{script} ended with {ended.code}, after it had said:\n{out.getvalue()}"
                ) from None
    return out.getvalue()
