"""The room's public names, and that cutting a list of numbers does not import torch."""

from __future__ import annotations

import subprocess
import sys

from torchdistpackage import split


def test_every_public_name_is_there() -> None:
    assert {*split._FILE} == {*split.__all__} <= {*dir(split)}
    assert all(getattr(split, name).__name__ == name for name in split.__all__)


def test_boundaries_need_no_torch() -> None:
    code = "import sys; from torchdistpackage.split import uniform_sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
