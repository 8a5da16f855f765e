"""What commands print where a person sits, what they say if an extra is missing, and how far a long one is."""

import sys
from io import StringIO
from types import SimpleNamespace

import click
import pytest

from torchdistpackage.cli import main
from torchdistpackage.cli.output import one_message, print_table
from torchdistpackage.cli.parts import _shown


class Terminal(StringIO):
    def isatty(self):
        return True


def table(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")  # a terminal without colours
    monkeypatch.setattr(sys, "stdout", Terminal())
    print_table(("name", "size"), [("[a]", "7"), ("long name", "1000")], right=[1])
    return sys.stdout.getvalue()


def test_a_table_in_a_terminal_is_drawn_and_brackets_are_brackets(monkeypatch):
    pytest.importorskip("rich")
    lines = [line.split() for line in table(monkeypatch).splitlines() if line.strip()]
    assert lines[0][:2] == ["name", "size"]
    assert ["[a]", "7"] in lines
    assert any("─" in line[0] for line in lines)


def test_a_table_without_rich_is_aligned_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert table(monkeypatch) == "name       size\n[a]           7\nlong name  1000\n"


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (ModuleNotFoundError("pictures need matplotlib: pip install 'torchdistpackage[viz]'"), click.ClickException),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), ModuleNotFoundError),
        (PermissionError(13, "Permission denied"), click.ClickException),
        (BrokenPipeError(), BrokenPipeError),
    ],
)
def test_what_is_one_message_and_what_goes_on(raised, seen):
    @one_message
    def command():
        raise raised

    with pytest.raises(seen) as caught:
        command()
    assert str(raised) in str(caught.value)


def test_without_click_one_sentence_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torchdistpackage.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit, match=r"pip install 'torchdistpackage\[cli\]'"):
        main()


def test_a_long_split_shows_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    parts = [SimpleNamespace(component=name, num_bytes=10) for name in ("bottom", "trunk", "top")]
    with _shown(parts) as progress:
        for done in (10, 30, 60):
            progress(done, 60)
    shown = sys.stderr.getvalue()
    assert "splitting" in shown
    assert shown.index("bottom.safetensors") < shown.index("trunk.safetensors") < shown.index("top.safetensors")
    assert "100%" in shown
