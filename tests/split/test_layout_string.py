"""Megatron-LM's layouts: what they mean, and that a mistake is shown where it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdistpackage.errors import SplitError
from torchdistpackage.split.layout_string import layout_boundaries, parse_layout


@pytest.mark.parametrize(
    ("layout", "stages"),
    [
        ("EL", "EL"),
        ("E|L", "E|L"),
        ("Ett|(tt|)*3L", "Ett|tt|tt|tt|L"),
        ("E,t*3|t*3,L", "Ettt|tttL"),
        ("E(tt|t)*2,L", "Ett|ttt|tL"),
        ("E(|tt)*2|L", "E|tt|tt|L"),
        ("E||t|L", "E||t|L"),
        ("E|*3L", "E|||L"),
        ("Et*0|t*12|L", "E|tttttttttttt|L"),
        ("E ((t*2|)*2 m|)*1 L", "Ett|tt|m|L"),
        ("E(t)L", "EtL"),
    ],
)
def test_stages(layout: str, stages: str) -> None:
    assert parse_layout(layout) == tuple(stages.split("|"))


def test_the_layout_of_deepseek_v3() -> None:
    layout = "Et*3|(tt|)*29,m|L"
    assert parse_layout(layout) == ("Ettt", *["tt"] * 29, "m", "L")
    cuts = layout_boundaries(layout, before=1, blocks=62, after=2, num_stages=32, mtp_blocks=1)
    assert cuts == (0, *range(4, 63, 2), 63, 65)
    without = layout_boundaries(layout, before=1, blocks=61, after=2)
    assert without == (0, *range(4, 63, 2), 62, 64)  # the stage of the m has nothing


@given(st.lists(st.integers(0, 5), min_size=2, max_size=8), st.integers(0, 3), st.integers(0, 3))
def test_a_layout_made_of_sizes_gives_them_back(sizes: list[int], before: int, after: int) -> None:
    layout = "E" + "|".join(f"t*{size}" for size in sizes) + "L"
    cuts = layout_boundaries(layout, before=before, blocks=sum(sizes), after=after)
    assert cuts == (
        0,
        *(before + sum(sizes[: stage + 1]) for stage in range(len(sizes) - 1)),
        before + sum(sizes) + after,
    )


@pytest.mark.parametrize(
    ("layout", "caret", "reason"),
    [
        ("", "^", "starts with E"),
        ("tE|L", "^", "starts with E"),
        ("|EL", "^", "starts with E"),
        ("Ett|t", "    ^", "ends with L"),
        ("Et|L|", "    ^", "ends with L"),
        ("EtEL", "  ^", "E, the embedding, comes once"),
        ("E(t|L)*2", "    ^", "L, the loss, comes once"),
        ("Etm|tL", "    ^", "cannot come behind"),
        ("Etx|L", "  ^", "'x' is none of"),
        ("Etl", "  ^", "'l' is none of"),
        ("E(tt|L", " ^", "never closed"),
        ("E(t(t|)*2L", " ^", "never closed"),
        ("Ett)|L", "   ^", "closes nothing"),
        ("Et*|L", "  ^", "a number must follow"),
        ("Et**2|L", "  ^", "a number must follow"),
        ("Et*-1|L", "  ^", "a number must follow"),
        ("*3E|L", "^", "nothing in front of '*3'"),
        ("E(*3)L", "  ^", "nothing in front of '*3'"),
        ("Et*2*3L", "    ^", "nothing in front of '*3'"),
        ("Et*3000000L", "  ^", "more than 100000 layers"),
        ("E(t*50000|)*5000L", "           ^", "more than 100000 layers"),
        (f"Et*{'9' * 5000}L", "  ^", "more than 100000 layers"),
        ("Et|\nxL", "    ^", "'x' is none of"),
    ],
)
def test_a_caret_points_at_the_mistake(layout: str, caret: str, reason: str) -> None:
    with pytest.raises(SplitError) as caught:
        parse_layout(layout)
    first, line, below = str(caught.value).split("\n")
    assert reason in first
    assert line == "    " + layout.replace("\n", " ")
    assert below == "    " + caret


def test_wrong_numbers_say_both_and_how_they_are_counted() -> None:
    message = r"has 8 t, but the model has 9 transformer blocks; it counts 2 on each of stages 0 to 2, 1 on each of "
    with pytest.raises(SplitError, match=message + r"stages 3 to 4, 0 on stage 5"):
        layout_boundaries("Ett|(tt|)*2(t|)*2L", before=1, blocks=9, after=1)
    with pytest.raises(SplitError, match=r"has 1 m, but the model has 2 multi-token-prediction blocks.* 1 on stage 1"):
        layout_boundaries("Et|mL", before=1, blocks=3, after=1, mtp_blocks=2)
    with pytest.raises(SplitError, match=r"has 3 stages, but there are to be 4; it has 2 bars, and 4 stages take 3"):
        layout_boundaries("E|t|L", before=1, blocks=1, after=1, num_stages=4)
    with pytest.raises(SplitError, match=r"mtp_blocks=2 .*mtp_blocks is a part of blocks"):
        layout_boundaries("E|t|L", before=1, blocks=1, after=1, mtp_blocks=2)
