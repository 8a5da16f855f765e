"""Several stages a rank over gloo: every schedule, ties, clipping; replicas are in `test_split_data_parallel.py`."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, make_layers, mse, start
from torch import nn

from torchdistpackage import (
    PipelineError,
    ScheduleError,
    SplitError,
    clip_grad_norm_,
    flatten_sequence,
    forward_backward,
    partition_chunks,
    tie_parameters,
    tpc,
    whole_model_names,
    whole_model_state_dict,
)
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.schedule import Placement, build, describe, names


class Chunks:
    """This rank's stages of a model under a schedule, with what a step and an evaluation need."""

    def __init__(self, layers, schedule, **options):
        self.schedule = schedule
        self.stages = partition_chunks(layers, schedule, **options)
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


def every_schedule(rank, world, schedules, same_host=True):
    start(world, same_host=same_host)
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
        everyone = [None] * world
        dist.all_gather_object(everyone, list(found))
        assert sorted(itertools.chain(*everyone)) == sorted(theirs), schedule
        assert all(torch.equal(value, theirs[name]) for name, value in found.items()), schedule
        assert found.keys() == set(whole_model_names(nn.ModuleList(chunks.stages.values())).values())
        mine = partition_chunks(list(reference), schedule)
        assert close(chunks.parameters(), itertools.chain.from_iterable(m.parameters() for m in mine.values())), (
            schedule
        )


@pytest.mark.parametrize("same_host", [True, False])
def test_every_schedule_on_two_ranks(same_host):
    run_distributed(every_schedule, 2, names(), same_host, timeout=120)


def test_a_sample_on_four_ranks():
    run_distributed(every_schedule, 4, ["interleaved-1f1b", "zb-v", "dualpipe-v", "zb-h2", "v-min"], timeout=120)


class Head(nn.Linear):
    """A head that shares its weight with the first layer."""

    def __init__(self, first):
        super().__init__(6, 6, bias=False)
        self.weight = first[0].weight


def tied(rank, world, schedules):
    start(world)
    counts = []
    for schedule in schedules:
        before = len(ties()._ties)
        layers = make_layers(2 * world - 1)
        layers.append(Head(layers[0]).double())
        reference = copy.deepcopy(layers)
        assert reference[-1].weight is reference[0][0].weight
        chunks = Chunks(list(layers), schedule)
        for _ in range(2):
            x, y = torch.randn(7, 6).double(), torch.randn(7, 6).double()
            chunks.step(x, y, 3)
            mse(reference(x), y).backward()
        norm = clip_grad_norm_([*chunks.parameters(), *chunks.parameters()], 0.1)
        assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)), schedule
        for stage, position in ((0, 0), (chunks.last, -1)):
            if stage in chunks.stages:
                found, expected = next(layers[position].parameters()), next(reference[position].parameters())
                assert torch.allclose(found.grad, expected.grad), schedule
        counts.append(len(ties()._ties) - before)
    return counts


def test_a_tie_on_one_rank_shares_the_tensor_and_sends_nothing():
    assert run_distributed(tied, 2, ["zb-v", "hanayo", "dualpipe-v"]) == [[0, 0, 0]] * 2


def test_a_tie_over_ranks_is_summed():
    assert run_distributed(tied, 4, ["interleaved-zb", "zb-h1", "zb-v"]) == [[1, 1, 0], [0] * 3, [0] * 3, [1, 1, 0]]


def cut_by_hand(rank, world):
    """The same lines under any placement: each rank makes its stages, and one copy of what they share."""
    start(world)
    for schedule in ("v-half", "interleaved-1f1b"):
        placement = describe(schedule).place(world, 2)
        torch.manual_seed(1)
        reference = make_layers(3)
        reference.append(Head(reference[0]).double())
        mine, stages = placement.local_stages(rank), copy.deepcopy(reference)
        if 0 not in mine:  # another value at first: that of the lowest rank counts
            stages[3].weight = nn.Parameter(torch.zeros_like(stages[3].weight))
        tie_parameters("weight", stages[0][0].weight if 0 in mine else stages[3].weight if 3 in mine else None)
        x, y = torch.randn(5, 6).double(), torch.randn(5, 6).double()
        last = partial(lambda head, a: mse(head(a[0]), a[1]), stages[3])
        functions = [last if s == 3 else stages[s] for s in mine]
        for _ in range(2):
            forward_backward(None, functions, None, [{0: [x], 3: [y]}.get(s) for s in mine], 3, schedule=schedule)
            mse(reference(x), y).backward()
        own = [p for s in mine for p in stages[s].parameters()]
        assert close(own, [p for s in mine for p in reference[s].parameters()]), schedule
        assert torch.allclose(clip_grad_norm_(own, 1.0), nn.utils.clip_grad_norm_(reference.parameters(), 1.0))
    with pytest.raises(SplitError, match="'nothing' must be on at least one rank"):
        tie_parameters("nothing", None)


def test_ties_of_models_that_are_cut_by_hand():
    run_distributed(cut_by_hand, 2)


def cut_again(rank, world):
    """One model under one placement after the other: a weight on three stages changes the ranks that it is on."""
    start(world)
    layers = make_layers(8)
    layers[4], layers[7] = Head(layers[0]).double(), Head(layers[0]).double()
    reference = copy.deepcopy(layers)
    for schedule, weights in (
        ("1f1b", [1] * 8),
        ("1f1b", [9, 1, 1, 9, 1, 1, 9, 1]),
        ("zb-v", [1] * 8),
        ("hanayo", [1] * 8),
    ):
        for p in [*layers.parameters(), *reference.parameters()]:
            p.grad = None
        chunks = Chunks(list(layers), schedule, policy="balanced", weights=weights)
        x, y = torch.randn(5, 6).double(), torch.randn(5, 6).double()
        chunks.step(x, y, 3)
        mse(reference(x), y).backward()
        norm = clip_grad_norm_(chunks.parameters(), 1e9)
        assert torch.allclose(norm, nn.utils.get_total_norm([p.grad for p in reference.parameters()])), schedule
        held = [p for p in chunks.parameters() if p is layers[0][0].weight]
        assert all(torch.allclose(p.grad, reference[0][0].weight.grad) for p in held), schedule


def test_a_model_that_is_cut_again():
    run_distributed(cut_again, 4)


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
    with pytest.raises(SplitError, match="policy 'uniform' takes extra_len, not weights"):
        partition_chunks(layers, "zb-v", weights=[1, 1, 1, 1])
    with pytest.raises(SplitError, match="pass one of them"):
        partition_chunks(layers, "zb-v", policy="balanced", weights=[1, 1, 1, 1], costs="time")
    own = [[0, 3], [1, 2]][rank]
    for given in (build("zb-v", 2, 4), Placement(2, (0, 1, 1, 0)), "auto-v"):
        assert list(partition_chunks(layers, given)) == own
    for options in ({"weights": [1, 1, 1, 1]}, {"costs": "parameters"}):
        assert list(partition_chunks(layers, "zb-v", policy="balanced", **options)) == own
    assert list(partition_chunks(layers, "1f1b")) == [rank]
    chunks = Chunks(layers, "zb-v")
    with pytest.raises(PipelineError, match=r"gives rank \d 2 stage\(s\).*fwd_fn must be a list of 2|rank \d of the"):
        forward_backward(None, chunks.stages[rank], None, None, 2, schedule="zb-v")
    dist.barrier()
    assert chunks.step(torch.randn(4, 6).double(), torch.randn(4, 6).double(), 2).isfinite()


def test_wrong_use():
    run_distributed(wrong_use, 2)
