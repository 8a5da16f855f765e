"""Puts `tests/` on the import path, so that every room's tests find `distributed_harness`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Ranks share few cores: one thread each is faster, and it keeps float sums in one order. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
