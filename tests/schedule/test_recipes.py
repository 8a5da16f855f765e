import subprocess
import sys

import pytest

from torchdistpackage.schedule import add_communication, build, names, peak_activations, verify
from torchdistpackage.schedule.recipes.gpipe import gpipe
from torchdistpackage.schedule.recipes.one_f_one_b import one_f_one_b


def picture(recipe, num_ranks, num_microbatches):
    rows = [recipe(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return "\n".join(" ".join(f"{action.op.value}{action.microbatch}" for action in row) for row in rows)


def test_one_f_one_b():
    assert picture(one_f_one_b, 3, 4) == (
        "F0 F1 F2 B0 F3 B1 B2 B3\n"
        "F0 F1 B0 F2 B1 F3 B2 B3\n"
        "F0 B0 F1 B1 F2 B2 F3 B3"
    )  # fmt: skip


def test_gpipe():
    assert picture(gpipe, 2, 3) == (
        "F0 F1 F2 B0 B1 B2\n"
        "F0 F1 F2 B0 B1 B2"
    )  # fmt: skip


def test_one_f_one_b_with_fewer_microbatches_than_ranks():
    assert picture(one_f_one_b, 4, 2) == (
        "F0 F1 B0 B1\n"
        "F0 F1 B0 B1\n"
        "F0 F1 B0 B1\n"
        "F0 B0 F1 B1"
    )  # fmt: skip


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", range(1, 9))
def test_any_number_of_microbatches_is_proved(name, p):
    for m in range(1, 4 * p + 2):
        verify(build(name, p, m))
        verify(build(name, p, m, forward_only=True))


def test_peak_activations_are_the_published_ones():
    p, m = 4, 10
    assert peak_activations(build("1f1b", p, m)) == tuple(min(m, p - r) for r in range(p))
    assert peak_activations(build("gpipe", p, m)) == (m,) * p
    assert peak_activations(build("gpipe", p, m, forward_only=True)) == (1,) * p


def test_lowering_of_one_f_one_b():
    assert build("1f1b", 2, 2).to_text() == (
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE_GRAD\n"
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE_GRAD"
    )


def test_lowering_of_evaluation():
    assert build("gpipe", 3, 1, forward_only=True).to_text() == (
        "rank 0: 0F0 0SEND_F0\n"
        "rank 1: 1RECV_F0 1F0 1SEND_F0\n"
        "rank 2: 2RECV_F0 2F0"
    )  # fmt: skip


def test_receives_stand_in_the_order_of_the_sends():
    from torchdistpackage.schedule import Plan

    # Rank 0 sends for stage 1 and for stage 3; rank 1 uses them the other way round.
    plan = Plan.from_text("0F0 2F0 0F1 2F1 2B0 2B1 0B0 0B1 \n 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1")
    lowered = add_communication(plan)
    verify(lowered)
    assert "1RECV_F0 1F0 1SEND_F0 3RECV_F0 1RECV_F1 1F1" in lowered.to_text()


def test_plans_need_no_torch():
    code = (
        "import sys, torchdistpackage, torchdistpackage.schedule as s; s.build('1f1b', 4, 8);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
