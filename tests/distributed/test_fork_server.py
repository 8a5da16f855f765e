"""Ranks are forked with this very package imported: nothing says so when that goes wrong, all tests just get slow."""

import multiprocessing
import os
import sys

import pytest
from distributed_harness import run_distributed

import torchdistpackage


def at_the_start(rank, world_size):
    started = "torchdistpackage.trainer.pipeline_trainer" in sys.modules
    return started, torchdistpackage.__file__, os.environ.get("PYTHONPATH"), os.environ.get("PYTHONSAFEPATH")


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server")
def test_a_rank_begins_with_the_package_of_this_process():
    here = torchdistpackage.__file__, os.environ.get("PYTHONPATH"), os.environ.get("PYTHONSAFEPATH")
    assert run_distributed(at_the_start, 2) == [(True, *here)] * 2
