"""Puts `tests/` on the import path, so that every room's tests find `distributed_harness`; makes collections cheap."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from pathlib import Path

# Ranks share few cores: one thread each is faster, and it keeps float sums in one order. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """Put what the imports have made, two million objects, out of the collector's way.

    Every full collection reads them else, 0.2 s each; torch asks for some, and Python for one now and then.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else extension modules complain about leaks at the end
