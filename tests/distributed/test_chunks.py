"""Several stages a rank over gloo: every schedule, ties, clipping, replicas."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, make_layers, mse, start
from torch import nn

from torchdistpackage import (
    DDP,
    PipelineError,
    ScheduleError,
    SplitError,
    clip_grad_norm_,
    flatten_sequence,
    forward_backward,
    partition_chunks,
    tie_parameters,
    tpc,
    whole_model_state_dict,
)
from torchdistpackage.schedule import describe, names


class Chunks:
    """This rank's stages of a model under a schedule, with what a step and an evaluation need."""

    def __init__(self, layers, schedule, wrap=lambda module: module, **options):
        self.schedule = schedule
        self.stages = {s: wrap(m) for s, m in partition_chunks(layers, schedule, **options).items()}
        facts = describe(schedule)
        self.placement = facts.place(tpc.get_pp_size(), options.get("chunks") or facts.chunks)
        self.last = self.placement.num_stages - 1

    def parameters(self):
        return itertools.chain.from_iterable(module.parameters() for module in self.stages.values())

    def own(self, x, y):
        return [
            ([x] if s == 0 else []) + ([y] if s == self.last and y is not None else []) or None for s in self.stages
        ]

    def step(self, x, y, m, **options):
        def forward(s):
            return (lambda ins: mse(self.stages[s](ins[0]), ins[1])) if s == self.last else self.stages[s]

        functions = [forward(s) for s in self.stages]
        return forward_backward(
            None, functions, None, self.own(x, y), m, schedule=self.schedule, broadcast_loss=True, **options
        )

    def evaluate(self, x, m):
        functions = list(self.stages.values())
        return forward_backward(None, functions, None, self.own(x, None), m, forward_only=True, schedule=self.schedule)


def every_schedule(rank, world, schedules):
    start(world)
    x, y = torch.randn(11, 6).double(), torch.randn(11, 6).double()
    for schedule in schedules:
        layers = make_layers(2 * world)
        reference = copy.deepcopy(layers)
        chunks = Chunks(flatten_sequence(layers, 0), schedule)
        outputs = chunks.evaluate(x, 4)
        if rank == chunks.placement.loss_rank:
            assert torch.allclose(outputs, reference(x)), schedule
        else:
            assert outputs is None
        for _ in range(2):  # gradients accumulate
            loss = chunks.step(x, y, 5)
            whole = mse(reference(x), y)
            whole.backward()
            assert torch.allclose(loss, whole), schedule
        norm = clip_grad_norm_(chunks.parameters(), 0.1)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        assert torch.allclose(norm, expected), schedule
        theirs = dict(reference.named_parameters())
        found = {k: v for module in chunks.stages.values() for k, v in whole_model_state_dict(module).items()}
        assert found.keys() <= theirs.keys()
        mine = partition_chunks(list(reference), schedule)
        assert close(chunks.parameters(), itertools.chain.from_iterable(m.parameters() for m in mine.values())), (
            schedule
        )


def test_every_schedule_on_two_ranks():
    run_distributed(every_schedule, 2, names(), timeout=120)


def test_a_sample_on_four_ranks():
    run_distributed(every_schedule, 4, ["interleaved-1f1b", "zb-v", "dualpipe-v", "zb-h2", "v-min"], timeout=120)


class Head(nn.Linear):
    """A head that shares its weight with the first layer."""

    def __init__(self, first):
        super().__init__(6, 6, bias=False)
        self.weight = first[0].weight


def tied(rank, world, schedule):
    start(world)
    layers = make_layers(2 * world - 1)
    layers.append(Head(layers[0]).double())
    reference = copy.deepcopy(layers)
    assert reference[-1].weight is reference[0][0].weight
    chunks = Chunks(list(layers), schedule)
    x, y = torch.randn(7, 6).double(), torch.randn(7, 6).double()
    for _ in range(2):
        chunks.step(x, y, 3)
        mse(reference(x), y).backward()
    norm = clip_grad_norm_(chunks.parameters(), 10.0)
    assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), 10.0))
    if 0 in chunks.stages:
        assert torch.allclose(layers[0][0].weight.grad, reference[0][0].weight.grad)
    if chunks.last in chunks.stages:
        assert torch.allclose(layers[-1].weight.grad, reference[-1].weight.grad)
    from torchdistpackage.parallel.tied_parameters import ties

    return len(ties()._ties)


@pytest.mark.parametrize("schedule", ["zb-v", "hanayo"])
def test_a_tie_on_one_rank_shares_the_tensor_and_sends_nothing(schedule):
    assert run_distributed(tied, 2, schedule) == [0, 0]


@pytest.mark.parametrize("schedule", ["interleaved-zb", "zb-h1"])
def test_a_tie_over_two_ranks_is_summed(schedule):
    assert run_distributed(tied, 2, schedule) == [1, 1]


def replicated(rank, world, schedules, rows):
    """Two replicas of two ranks: each trains on its half of the batch, the gradient is the whole batch's."""
    start(2)
    replica = tpc.get_dp_rank()
    x, y = torch.randn(2 * rows, 6).double(), torch.randn(2 * rows, 6).double()
    half = slice(replica * rows, (replica + 1) * rows)
    for schedule in schedules:
        for shares in (False, True):
            layers = make_layers(3)
            layers.append(Head(layers[0]).double() if shares else make_layers(1)[0])
            reference = copy.deepcopy(layers)
            unlike = {"gradient_as_bucket_view": True, "find_unused_parameters": shares}
            chunks = Chunks(list(layers), schedule, wrap=lambda module, unlike=unlike: DDP(module, **unlike))
            for _ in range(2):
                chunks.step(x[half], y[half], 4)
            mse(reference(x), y).backward()
            mse(reference(x), y).backward()
            theirs = dict(reference.named_parameters(remove_duplicate=False))
            for module in chunks.stages.values():
                names = {id(p): name for name, p in layers.named_parameters(remove_duplicate=False)}
                for p in module.parameters():
                    assert torch.allclose(p.grad, theirs[names[id(p)]].grad), (schedule, shares, names[id(p)])


@pytest.mark.parametrize("rows", [5, 1])
def test_replicas_are_reduced_once(rows):
    run_distributed(replicated, 4, ["zb-h1", "zb-v", "interleaved-zb", "dualpipe-v"], rows, timeout=120)


def wrong_use(rank, world):
    start(2)
    layers = list(make_layers(4))
    for call, reason in (
        (lambda: partition_chunks(layers, "zigzag"), "known schedules"),
        (lambda: partition_chunks(layers, "zb-v", chunks=3), "does not run 3 stages a rank"),
        (lambda: partition_chunks(layers, describe("zb-v").place(3, 2)), "for 3 ranks; this pipeline has 2"),
    ):
        with pytest.raises(ScheduleError, match=reason):
            call()
    with pytest.raises(SplitError, match="unknown policy 'best'"):
        partition_chunks(layers, "zb-v", policy="best")
    assert list(partition_chunks(layers, "zb-v", policy="balanced", weights=[1, 1, 1, 1])) == [[0, 3], [1, 2]][rank]
    assert list(partition_chunks(layers, "zb-v", policy="balanced", costs="parameters")) == [[0, 3], [1, 2]][rank]
    chunks = Chunks(layers, "zb-v")
    with pytest.raises(PipelineError, match=r"gives rank \d 2 stage\(s\).*fwd_fn must be a list of 2|rank \d of the"):
        forward_backward(None, chunks.stages[rank], None, None, 2, schedule="zb-v")
    dist.barrier()
    assert chunks.step(torch.randn(4, 6).double(), torch.randn(4, 6).double(), 2).isfinite()
    shared = nn.Parameter(torch.ones(2))
    tie_parameters("by hand", shared)


def test_wrong_use():
    run_distributed(wrong_use, 2)
