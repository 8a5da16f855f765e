"""A checkpoint of 2 GB is split in less memory than 1.2 times its largest part."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchdistpackage.split.parts.checkpoint_split import verify_part

pytest.importorskip("transformers")
BENCH = Path(__file__).parents[3] / "benchmarks" / "split-checkpoint" / "bench.py"

COMMAND = """
import atexit, sys
from torchdistpackage.cli import main

def tell():
    with open("/proc/self/status") as status:
        print(*(line.split()[1] for line in status if line.startswith("VmHWM")))

atexit.register(tell)
sys.argv = ["torchdistpackage", "split", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not tell the peak")
def test_the_peak_is_less_than_the_largest_part(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("split_checkpoint_bench", BENCH)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    try:
        (tmp_path / "model").mkdir()
        bench.make(tmp_path / "model")
        assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) > 2e9
        arguments = [str(tmp_path / "model"), "--at", "6,16", "--out", str(tmp_path / "parts")]
        made = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=True)
        parts = [*(tmp_path / "parts").glob("*.safetensors")]
        for part in parts:
            verify_part(part)
        peak, largest = int(made.stdout.split()[-1]) * 1024, max(part.stat().st_size for part in parts)
        assert peak < 1.2 * largest, f"{peak >> 20} MB for parts of up to {largest >> 20} MB"
    finally:
        shutil.rmtree(tmp_path)
