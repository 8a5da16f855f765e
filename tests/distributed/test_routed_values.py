"""Values that go past stages over real processes: gradients, evaluation, failures, replicas, the plan that was run."""

import copy

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import close, start
from routed_model import WIDTH, Model, mse, star
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage import PipelineError, forward_backward, last_plan, last_timeline, tpc
from torchdistpackage.parallel.pipeline_state import current_state
from torchdistpackage.schedule import Routed, describe


def batch(rows):
    return torch.randn(rows, WIDTH).double(), torch.randn(rows, WIDTH).double()


class Steps:
    """This rank's stages of a model with skips under a schedule."""

    def __init__(self, schedule):
        facts = describe(schedule)
        self.schedule, self.placement = schedule, facts.place(tpc.get_pp_size(), facts.chunks)
        self.mine = self.placement.local_stages(tpc.get_pp_rank())
        self.model = Model(self.placement.num_stages)

    def run(self, x, y, m, functions=None, **options):
        functions = functions or self.model.functions(y is None)
        own = [
            ([x] if s == 0 else []) + ([y] if s == self.model.count - 1 and y is not None else []) for s in self.mine
        ]
        arguments = ([functions[s] for s in self.mine], None, [each or None for each in own], m)
        return forward_backward(None, *arguments, schedule=self.schedule, **options)

    def parameters(self, model):
        return [p for s in self.mine for p in model.layers[s].parameters()]


def every_schedule(rank, world, schedules, same_host=True):
    start(world, same_host=same_host)
    for schedule in schedules:
        steps = Steps(schedule)
        reference = copy.deepcopy(steps.model)
        for rows in (9, 2, 9, 12):  # one by one: learnt, fewer rows than micro-batches, known, longer
            x, y = batch(rows)
            loss = steps.run(x, y, 5, broadcast_loss=True, record_timeline=rows == 12)
            whole = mse(reference(x), y)
            whole.backward()
            assert torch.allclose(loss, whole), schedule
            assert last_plan().skips == star(steps.model.count)
        assert last_timeline() is not None
        assert close(steps.parameters(steps.model), steps.parameters(reference)), schedule
        x, _ = batch(7)
        outputs = steps.run(x, None, 3, forward_only=True)
        if rank == steps.placement.loss_rank:
            assert torch.allclose(outputs, reference(x)), schedule


@pytest.mark.parametrize("same_host", [True, False])
def test_two_ranks_with_two_stages_each(same_host):
    run_distributed(every_schedule, 2, ["interleaved-1f1b", "zb-v"], same_host, timeout=120)


@pytest.mark.parametrize("same_host", [True, False])
def test_four_ranks(same_host):
    run_distributed(every_schedule, 4, ["1f1b", "zb-h1"], same_host, timeout=120)


def failing(rank, world, at, same_host):
    """A rank that others wait for in a skip fails, before anybody has learnt the table and after."""
    start(world, same_host=same_host)
    steps = Steps("1f1b")
    good, (x, y) = steps.model.functions(), batch(6)
    bad = [*good[:at], lambda arguments: 1 / 0, *good[at + 1 :]]
    for functions in (bad, good, bad, good):
        if functions is good:
            assert steps.run(x, y, 3, functions, broadcast_loss=True).isfinite()
            continue
        with pytest.raises(ZeroDivisionError if rank == at else PipelineError, match="division by zero"):
            steps.run(x, y, 3, functions)


@pytest.mark.parametrize(("at", "same_host"), [(0, True), (2, True), (3, True), (2, False)])
def test_a_failure_ends_the_wait_for_a_skip(at, same_host):
    run_distributed(failing, 4, at, same_host, timeout=60)


def long_messages(rank, world, same_host):
    """How many frames the edge from the first to the last rank needs, for one skip of 24 micro-batches."""
    start(world, same_host=same_host)
    w = torch.ones(4096, requires_grad=True)
    functions = [
        lambda x: Routed({1: (x[:, :1] * 1,), 3: (x * w,)}, ((0, 3),)),
        lambda h: Routed({2: (h,)}, ((0, 3),)),
        lambda h: Routed({3: (h,)}, ((0, 3),)),
        lambda ins: (ins[0] * ins[1]).sum(),
    ]
    counts = []
    for _ in range(3):
        forward_backward(None, functions[rank], None, torch.ones(24, 4096) if rank == 0 else None, 24)
        outlet = current_state().transport._outlets.get(3 - rank)
        known = [] if outlet is None else [known for alike in outlet._known.values() for known in alike]
        counts.append(sum(len(one.spare) for one in known if one.layout.frame_bytes > 8192))
    return counts


@pytest.mark.parametrize("same_host", [True, False])
def test_few_frames_of_a_skip_are_under_way_at_once(same_host):
    counts = run_distributed(long_messages, 4, same_host, timeout=60)
    assert all(0 < count <= 6 for count in (*counts[0][1:], *counts[3][1:])), counts


def replicated(rank, world):
    """Two replicas of two ranks: the layers are wrapped, the last backward of each stage starts from a Routed."""
    start(2)
    for schedule in ("interleaved-1f1b", "zb-v"):
        steps = Steps(schedule)
        reference = copy.deepcopy(steps.model)
        torch.manual_seed(7)
        for s in steps.mine:
            steps.model.layers[s] = DistributedDataParallel(
                steps.model.layers[s], process_group=tpc.get_group("data"), find_unused_parameters=True
            )
        for _ in range(2):
            x, y = batch(12)
            which = tpc.get_dp_rank()
            steps.run(x.chunk(2)[which], y.chunk(2)[which], 3)
            mse(reference(x), y).backward()
        assert close(steps.parameters(steps.model), steps.parameters(reference)), schedule


def test_replicas():
    run_distributed(replicated, 4, timeout=120)


def scattered(rank, world):
    """Each rank of a tensor group sends half of every message, those of skips too."""
    start(2, config=[("tensor", 2), ("pipe", 2)])
    for schedule in ("interleaved-1f1b", "zb-v"):
        steps = Steps(schedule)
        reference, (x, y) = copy.deepcopy(steps.model), batch(8)
        for _ in range(2):
            steps.run(x, y, 3, scatter_gather_tensors=True)
            mse(reference(x), y).backward()
        assert close(steps.parameters(steps.model), steps.parameters(reference)), schedule


def test_scattered_messages():
    run_distributed(scattered, 4, timeout=120)


def planned(rank, world):
    start(world)
    steps = Steps("1f1b")
    steps.schedule = "auto"
    model = steps.model
    reference, (x, y) = copy.deepcopy(model), batch(8)
    for _ in range(8):
        steps.run(x, y, 4)
        mse(reference(x), y).backward()
    assert last_plan().name.startswith("auto")
    assert last_plan().skips == star(3)
    assert close(steps.parameters(model), steps.parameters(reference))


def test_a_planned_schedule():
    run_distributed(planned, 3, timeout=120)
