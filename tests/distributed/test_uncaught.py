"""A process that ends with an exception between steps: the others hear which, not just that it has gone."""

import os
import subprocess
import sys

from torchdistpackage import find_free_port

SCRIPT = """
import torch
from torchdistpackage import forward_backward, setup_distributed, tpc

setup_distributed(backend="gloo")
tpc.setup_process_groups([("pipe", 2)])
layer, first = torch.nn.Linear(4, 4), tpc.is_first_in_pipeline_group()
for number in range(3):
    if number == 1 and not first:
        raise ValueError("the loader broke")
    x = torch.randn(4, 4) if first else None
    forward_backward(None, layer if first else lambda h: layer(h).mean(), None, x, 2)
"""


def test_the_others_name_the_exception_that_ended_a_process():
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert "ValueError: the loader broke" in said[1]
    assert "PipelineError: rank 1 of the pipeline (global rank 1) failed at something outside" in said[0]
    assert "ValueError('the loader broke')" in said[0]
