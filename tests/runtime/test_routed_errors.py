"""Values that go past stages, used wrongly: one clear error on every rank, no hang, and the next step runs."""

import pytest
import torch
from loopback_pipeline import on_every_rank, run_step, stage_inputs
from routed_model import WIDTH, Model, star
from torch import nn

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.schedule import Routed, build


def batch(rows):
    return torch.randn(rows, WIDTH).double(), torch.randn(rows, WIDTH).double()


def test_a_value_that_is_changed_before_it_is_seen_is_refused():
    functions = [
        lambda x: (h := x + 1) is None or Routed({1: (h,), 2: (h,)}, ((0, 2),)),
        lambda h: Routed({2: (h.mul_(2),)}, ((0, 2),)),
        lambda ins: ins[0].sum() + ins[1].sum(),
    ]
    work = [ChunkWork(function, inputs=torch.ones(2, 2) if s == 0 else None) for s, function in enumerate(functions)]
    plan = build("looped-bfs", 1, 2, chunks=3, forward_only=True)
    with pytest.raises(PipelineError, match="stage 0 returned a tensor and changed it in place"):
        Executor(plan, loopback(1)[0]).run(work)


WRONG = {
    "no entry": (0, lambda h: Routed({1: (h,), 2: (h,)}, star(4)), "no values for stage\\(s\\) 3, which wait for them"),
    "no skip": (1, lambda h: Routed({2: (h,), 3: (h,)}, ((0, 2), (0, 3))), "stage 1 returned .*not of one cut"),
    "not in table": (2, lambda h: Routed({3: (h,), 9: (h,)}, star(4)), "values for stage 9; it can send to later"),
    "back": (
        1,
        lambda h: Routed({0: (h,), 2: (h,), 3: (h,)}, star(4)),
        "for stage 0; it can send to later",
    ),
    "bad table": (0, lambda h: Routed({1: (h,)}, ((0, 1),)), "a wrong table of skips: .*does not skip a stage"),
    "no table": (0, lambda h: Routed({1: (h,)}, (5,)), "a wrong table of skips: .*pair"),
    "no tuple": (1, lambda h: Routed({2: h, 3: (h,)}, star(4)), "returned a Tensor for stage 2; .*\\(value,\\)"),
    "extra": (1, lambda h: Routed({2: (h,), 3: (h,)}, ()), "returned \\(\\): .*not of one cut"),
    "plain": (2, lambda h: h, "stage 2 returned a Tensor in place of a Routed: .*what the stage's module returned"),
    "last": (3, lambda h: Routed({4: (h,)}, star(4)), "stage 3 is the last one, but it returned a Routed"),
    "raises": (2, lambda h: 1 / 0, "division by zero"),
    "cannot travel": (0, lambda h: Routed({1: (h,), 2: (h, h > 0), 3: ({1},)}, star(4)), "a set, which cannot travel"),
}


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved-1f1b"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_one_clear_error_on_every_rank_and_the_next_step_runs(name, case):
    at, wrong, reason = WRONG[case]
    p = 4 if name == "1f1b" else 2
    plan, model = build(name, p, 3), Model(4)
    good, (x, y) = model.functions(), batch(6)
    bad = [*good[:at], lambda ins: wrong((ins[-1] if isinstance(ins, list) else ins) * 1.0), *good[at + 1 :]]
    inputs = stage_inputs(4, x, y)

    def steps(rank, transport):
        executor, errors = Executor(plan, transport), []
        for functions in (bad, good, bad, good):
            work = [ChunkWork(functions[s], inputs=inputs[s]) for s in plan.placement.local_stages(rank)]
            try:
                executor.run(work)
            except (PipelineError, TransportError, ZeroDivisionError) as error:
                errors.append(error)
        return errors

    found = on_every_rank(p, steps)
    assert [len(errors) for errors in found] == [2] * p
    for errors in found:
        for error in errors:
            with pytest.raises(type(error), match=f"(?s){reason}"):
                raise error


def test_a_plan_with_other_skips_says_both():
    model, (x, y) = Model(4), batch(4)
    plan = build("1f1b", 4, 2, skips=[(0, 2)])
    results = run_step(plan, model.functions(), stage_inputs(4, x, y))
    assert all("carries the skips ((0, 2),), but stage 0 returned ((0, 2), (0, 3), (1, 3))" in str(r) for r in results)
    plain = [nn.Linear(WIDTH, WIDTH).double() for _ in range(4)]
    results = run_step(plan, plain, stage_inputs(4, x))
    assert all("carries the skips ((0, 2),), but stage 0 returned a Tensor" in str(result) for result in results)


def test_ranks_whose_plans_differ_in_skips_are_told():
    model, (x, y) = Model(3), batch(4)

    def step(rank, transport):
        plan = build("1f1b", 3, 2, skips=star(3) if rank == 1 else ())
        work = ChunkWork(model.functions()[rank], inputs=stage_inputs(3, x, y)[rank])
        return Executor(plan, transport).run([work])

    assert all("ranks disagree about the step" in str(result) for result in on_every_rank(3, step))
