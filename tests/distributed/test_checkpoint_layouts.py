"""A checkpoint of any layout goes on in any other, with the losses of the undisturbed plain run."""

import itertools

import pytest
from checkpoint_layouts import KINDS, Layout, Run, plain_losses, with_known_kind
from distributed_harness import run_distributed

CHAIN = [
    Layout(4, "interleaved-1f1b", "balanced", "ddp"),
    Layout(2, "1f1b", "uniform", "fsdp"),
    Layout(1, "1f1b", "uniform", "zero"),
    Layout(2, "zb-v", "balanced", "zero-whole"),
    Layout(1, "1f1b", "uniform", "fsdp"),
    Layout(4, "1f1b", "uniform", "zero"),
    Layout(2, "zb-v", "uniform", "ddp"),
    Layout(2, "interleaved-1f1b", "uniform", "zero1"),
    Layout(4, "zb-v", "balanced", "fsdp"),
]


def chain(rank, world, folder, layouts):
    """One step in each layout, from the checkpoint of the one before."""
    expected = plain_losses(len(layouts))
    for step, layout in enumerate(layouts):
        run = Run(with_known_kind(layout), seed=step)
        with run.checkpointer(folder, asynchronous=step % 2 == 1) as checkpointer:
            loaded = checkpointer.load()
            assert step == 0 or (loaded.step == step and not loaded.same_layout)
            assert run.step(step) == pytest.approx(expected[step], rel=1e-6, abs=1e-6), layout
            checkpointer.save(step + 1)


def test_every_layout_goes_on_from_every_other_kind(tmp_path):
    run_distributed(chain, 4, str(tmp_path), CHAIN, timeout=120)


def undisturbed(rank, world, folder, layouts):
    """The same layout goes on with the same bits: dropout, optimizer, everything."""
    for number, layout in enumerate(layouts):
        run = Run(with_known_kind(layout), dropout=0.3)
        with run.checkpointer(f"{folder}/{number}", asynchronous=True) as checkpointer:
            run.step(0)
            checkpointer.save(1)
            expected = [run.step(step) for step in (1, 2)]
        again = Run(with_known_kind(layout), seed=5, dropout=0.3)
        with again.checkpointer(f"{folder}/{number}") as checkpointer:
            assert checkpointer.load().same_layout
            assert [again.step(step) for step in (1, 2)] == expected


def test_the_same_layout_goes_on_with_the_same_bits(tmp_path):
    layouts = [Layout(2, kind=kind) for kind in ("zero", "fsdp")] + [Layout(4, "zb-v", "balanced", "ddp")]
    run_distributed(undisturbed, 4, str(tmp_path), layouts, timeout=120)


def matrix(rank, world, folder, layouts, pipe):
    """Every layout of one pipeline size loads every layout."""
    expected = plain_losses(3)
    for number, layout in enumerate(layouts):
        run = Run(layout)
        with run.checkpointer(f"{folder}/{number}") as checkpointer:
            run.step(0)
            run.step(1)
            checkpointer.save(2)
    for layout in (one for one in layouts if one.pipe == pipe):
        for number in range(len(layouts)):
            run = Run(layout, seed=1)
            with run.checkpointer(f"{folder}/{number}") as checkpointer:
                assert checkpointer.load().step == 2
                assert run.step(2) == pytest.approx(expected[2], rel=1e-6, abs=1e-6), (layouts[number], layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_the_whole_matrix(tmp_path, pipe):
    schedules = {1: ["1f1b"], 2: ["1f1b", "interleaved-1f1b", "zb-v"], 4: ["1f1b", "interleaved-1f1b", "zb-v"]}
    kinds = [kind for kind in KINDS if kind in ("ddp", "zero", "fsdp")]
    layouts = [
        Layout(size, schedule, policy, kind)
        for size, some in schedules.items()
        for schedule, policy, kind in itertools.product(some, ["uniform", "balanced"], kinds)
        if size > 1 or policy == "uniform"
    ]
    run_distributed(matrix, 4, str(tmp_path), layouts, pipe, timeout=1700)
