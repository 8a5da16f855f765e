import subprocess
import sys

import pytest
from click.testing import CliRunner

from torchdistpackage.cli.commands import torchdistpackage


def run(*arguments):
    return CliRunner().invoke(torchdistpackage, arguments)


def test_list_and_show():
    assert run("schedule", "list").output == "1f1b\ngpipe\n"
    shown = run("schedule", "show", "1F1B", "-p", "2", "-m", "2")
    assert shown.output == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n"
    assert "0SEND_F0" in run("schedule", "show", "gpipe", "--communication").output


@pytest.mark.parametrize("arguments", [["zigzag"], ["1f1b", "-m", "0"]])
def test_a_mistake_is_one_line_and_an_exit_code(arguments):
    result = run("schedule", "show", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1


def test_the_command_starts_without_torch():
    code = "import sys; sys.argv = ['torchdistpackage', 'schedule', 'list']\n"
    code += "from torchdistpackage.cli import main\n"
    code += "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
