import re
import sys
from io import StringIO

import pytest

from torchdistpackage.schedule import Action, CostModel, Op, Plan, Span, Timeline, build, names, simulate
from torchdistpackage.visualize import text_grid, unit_timeline
from torchdistpackage.visualize.palette import OP_NAMES, ink

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def grid(what, width=120):
    return text_grid(what, width=width, colour=False)


def test_a_plan_is_drawn_in_unit_times():
    assert grid(build("1f1b", 3, 4), width=70).splitlines() == [
        "1f1b: makespan 18 (F = I = W = 1, B = 2), bubble 33.3%",
        "time    0              5              10             15",
        "rank 0  F0 F1 F2             B0--- F3 B1---    B2---    B3---",
        "rank 1     F0 F1       B0--- F2 B1--- F3 B2---    B3---",
        "rank 2        F0 B0--- F1 B1--- F2 B2--- F3 B3---",
        "",
        "F forward   B backward   empty: idle",
    ]


def test_chunks_have_letters():
    assert grid(build("zb-v", 2, 2), width=66).splitlines()[2:4] == [
        "rank 0  F0a F1a     F0b I0b W0b F1b I1b W1b I0a W0a     I1a W1a",
        "rank 1      F0a F0b F1a F1b I0b W0b I0a W0a I1b W1b I1a W1a",
    ]


def test_time_goes_on_below_in_blocks_of_one_width():
    lines = grid(build("zb-h1", 8, 32)).splitlines()
    rulers = [line for line in lines if line.startswith("time")]
    assert [line.split()[1] for line in rulers] == ["0", "26", "52", "78"]
    assert max(map(len, lines)) <= 120
    rows = [line[8:] for line in lines if line.startswith("rank 3")]
    assert " ".join(rows).replace("-", "").split() == [
        str(action)[1:] for action in build("zb-h1", 8, 32).actions[3] if action.op.is_compute
    ]


@pytest.mark.parametrize("name", names())
def test_every_action_of_every_schedule_is_there(name):
    plan = build(name, 4, 6)
    text = grid(plan, width=400)
    for rank, row in enumerate(plan.actions):
        cells = text.splitlines()[2 + rank].split()[2:]
        assert len(cells) == sum(action.op.is_compute for action in row)


def test_a_picture_of_too_many_lines_gives_up_its_numbers():
    text = grid(build("zb-h1", 16, 128))
    assert text.count("\n") < 155
    assert "too long for the numbers" in text
    assert not re.search(r"rank +3 .*[FIW]\d", text)


def test_a_picture_of_very_many_actions_has_a_coarser_time():
    lines = grid(build("gpipe", 2, 4000), width=40).splitlines()
    assert len(lines) < 155
    assert all(len(line) <= 40 for line in lines[1:-1])


def test_times_that_are_multiples_of_nothing_are_rounded():
    costs = CostModel.uniform(2, forward=0.0103, input_grad=0.0111, weight_grad=0.0097, hop=0.0013, unit="s")
    lines = grid(simulate(build("1f1b", 2, 2), costs), width=60).splitlines()
    assert lines[0].startswith("1f1b: makespan 9")
    assert " ms, bubble" in lines[0]
    assert lines[1].startswith("ms")
    assert lines[2].split()[2:4] == ["F0---", "F1--"]
    assert max(map(len, lines)) <= 60


def test_waiting_and_sending_are_no_compute():
    recv, f, send = (Action(1, op, 0) for op in (Op.RECV_F, Op.FORWARD, Op.SEND_F))
    timeline = Timeline("measured", ((Span(recv, 0, 4), Span(f, 4, 5), Span(send, 5, 6)),))
    assert grid(timeline, width=60).splitlines()[2] == "rank 0" + " " * 26 + "F0---"


def test_colours_say_what_letters_say():
    plain, colour = grid(build("zb-v", 2, 2)), text_grid(build("zb-v", 2, 2), width=120, colour=True)
    assert "\x1b[" in colour
    digits = ["".join(re.findall(r"\d", line[8:])) for line in plain.splitlines()[2:4]]
    assert ["".join(re.findall(r"\d", ANSI.sub("", line)[8:])) for line in colour.splitlines()[2:4]] == digits


def test_no_codes_where_nobody_sees_them(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = text_grid(build("1f1b", 2, 2))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 60


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("kind", "coloured"), [("xterm-256color", True), ("xterm", False), ("dumb", False)])
def test_a_terminal_of_many_colours_gets_them(monkeypatch, kind, coloured):
    pytest.importorskip("rich")
    for name in ("COLORTERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert ("\x1b[" in text_grid(build("1f1b", 2, 2))) is coloured


def test_a_terminal_without_rich_gets_letters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "rank 0  F0" in text_grid(build("1f1b", 2, 2))


def test_colour_without_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchdistpackage\[viz\]'"):
        text_grid(build("1f1b", 2, 2), colour=True)


def test_nothing_is_a_picture_too():
    assert "makespan 0" in grid(Timeline("empty", ((), ())))


def test_evaluation_and_one_rank():
    assert grid(build("gpipe", 1, 2, forward_only=True), width=40).splitlines()[2] == "rank 0  F0--- F1---"
    assert unit_timeline(Plan.from_text("0F0 0B0")).makespan == 3


@pytest.mark.parametrize("system", [2, 3])
def test_no_two_kinds_of_boxes_look_alike(system):
    colour = pytest.importorskip("rich.color")
    inks = [ink(op, chunk, chunks) for chunks in (1, 2, 3) for op in OP_NAMES for chunk in range(chunks)]
    fills = {each.fill: colour.Color.parse(each.fill).downgrade(colour.ColorSystem(system)) for each in inks}
    assert len({str(fill) for fill in fills.values()}) == len(fills)
