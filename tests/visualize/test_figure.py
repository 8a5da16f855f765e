import sys
from dataclasses import replace

import pytest

from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import Action, CostModel, Op, Span, Timeline, build, simulate
from torchdistpackage.visualize import figure

pytest.importorskip("matplotlib")


def timeline(name="1f1b", ranks=4, microbatches=8, **costs):
    plan = build(name, ranks, microbatches)
    return simulate(
        plan, CostModel.uniform(plan.placement.num_stages, chunks=plan.placement.num_stages // ranks, **costs)
    )


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_says_what_is_written(tmp_path, suffix, start):
    path = tmp_path / f"plan{suffix}"
    figure(timeline(), path=path)
    assert path.read_bytes().startswith(start)


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        figure(timeline(), path=tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_is_written_in_the_picture():
    axes = figure(timeline()).axes[0]
    assert axes.get_title(loc="left") == "1f1b:  makespan 33, bubble 27.3%"
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {rank}" for rank in range(4)]
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("7") == 8  # F and B of micro-batch 7 on four ranks
    assert texts[-5:] == ["peak held", "4", "3", "2", "1"]


def test_measured_goes_below_on_the_same_axis():
    simulated = timeline(forward=0.01, input_grad=0.01, weight_grad=0.01, unit="s")
    late = [[Span(Action(0, Op.RECV_F, 0), 0, 0.1), Span(Action(rank, Op.FORWARD, 0), 0.1, 0.5)] for rank in range(4)]
    measured = Timeline("measured", tuple(map(tuple, late)), unit="s")
    upper, lower = figure(simulated, measured=measured, title="mine").axes
    assert upper.get_xlim() == lower.get_xlim() == (0, 500)
    assert upper.get_title(loc="left").startswith("mine:  makespan 330 ms")
    assert lower.get_title(loc="left").startswith("measured:  makespan 500 ms")
    assert lower.get_xlabel() == "time in ms"


def test_a_long_step_goes_on_in_a_strip_below():
    frame = figure(timeline("zb-v", 8, 32))
    windows = [axes.get_xlim() for axes in frame.axes]
    assert windows == [(0, 49.75), (49.75, 99.5)]
    assert len(figure(timeline("1f1b", 8, 32)).axes) == 1


def test_a_very_long_step_has_no_numbers():
    (axes,) = figure(replace(timeline("zb-h1", 16, 128), peak_bytes=())).axes
    assert not axes.texts


def test_no_global_state_of_matplotlib():
    figure(timeline("1f1b", 1, 1))
    assert "matplotlib.pyplot" not in sys.modules


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ScheduleError, match=r"end the path in \.png, \.svg, \.pdf"):
        figure(timeline(), path=tmp_path / "plan.jpg")
    with pytest.raises(ScheduleError, match="simulate with measured costs"):
        figure(timeline(), measured=timeline(unit="s"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchdistpackage\[viz\]'"):
        figure(timeline())


def test_boxes_of_almost_no_time_do_not_cost_the_others_their_numbers():
    row = [Span(Action(0, op, i), start, end) for i in range(8) for op, start, end in times(i)]
    (axes,) = figure(Timeline("first stage", (tuple(row),), peak_bytes=(0.0,))).axes
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(8) for _ in "FW"]


def times(i):
    return (
        (Op.FORWARD, 2 * i, 2 * i + 1),
        (Op.INPUT_GRAD, 2 * i + 1, 2 * i + 1.001),
        (Op.WEIGHT_GRAD, 2 * i + 1.001, 2 * i + 2),
    )


def test_sending_is_drawn_and_explained():
    f, send = (Action(0, op, 0) for op in (Op.FORWARD, Op.SEND_F))
    picture = figure(Timeline("measured", ((Span(f, 0.0, 1.0), Span(send, 1.0, 2.0)),)))
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert labels == ["F  forward", "sending, reducing", "idle"]
    assert len(picture.axes[0].collections) == 3


def test_nothing_is_a_picture_with_a_rank():
    (axes,) = figure(Timeline("empty", ((),))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0"]
