import subprocess
import sys
from pathlib import Path


def test_public_types():
    path = Path(__file__).with_name("check_public_types.py")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(path)],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=path.parents[2],
    )
    assert result.returncode == 0, result.stdout
