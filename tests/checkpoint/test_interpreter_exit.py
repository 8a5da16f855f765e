"""An interpreter that ends while a checkpoint is written finishes it."""

import subprocess
import sys

from torchdistpackage.checkpoint import list_checkpoints

SCRIPT = """
import sys, torch
from torchdistpackage.checkpoint import Checkpointer
model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(5)])
Checkpointer(sys.argv[1], model, asynchronous=True).save(1)
raise SystemExit(3)
"""


def test_the_end_waits_for_the_thread(tmp_path):
    assert subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], timeout=60).returncode == 3
    assert [(info.step, info.fault) for info in list_checkpoints(tmp_path, hashes=True)] == [(1, None)]
