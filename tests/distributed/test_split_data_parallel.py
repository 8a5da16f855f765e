"""Replicas of chunks whose backward is split: every gradient is the full batch's, every parameter is reduced once."""

import copy
import itertools
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import make_layers, mse, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage import DDP, PipelineError, forward_backward, partition_chunks, tpc
from torchdistpackage.parallel.tied_parameters import ties
from torchdistpackage.schedule import describe

SPLIT = ["zb-h1", "zb-v", "dualpipe-v", "interleaved-zb", "v-half"]
OPTIONS = [
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"bucket_cap_mb": 1e-4},  # several buckets a chunk
]


class Replica:
    """This rank's chunks of one of the pipelines, each wrapped by itself or all in one, next to the plain model."""

    def __init__(self, layers, schedule, options, chunks=None, together=False):
        self.plain, self.schedule = copy.deepcopy(layers), schedule
        self.names = {id(p): name for name, p in layers.named_parameters()}
        stages = partition_chunks(list(layers), schedule, chunks)
        facts = describe(schedule)
        self.last = facts.place(tpc.get_pp_size(), chunks or facts.chunks).num_stages - 1
        self.wrapped = [DDP(Together(stages), **options)] if together else [DDP(s, **options) for s in stages.values()]
        wrapped = self.wrapped * len(stages) if together else self.wrapped
        self.stages = dict(zip(stages, wrapped, strict=True))
        self.together = together

    def parameters(self):
        return {self.names[id(p)]: p for module in self.wrapped for p in module.parameters()}

    def zero_grad(self):
        for p in [*self.parameters().values(), *self.plain.parameters()]:
            p.grad = None

    def step(self, rows=5, m=3):
        """Trains on this replica's part of a batch, and the plain model on all of it."""
        x, y = torch.randn(2, rows, 6).double(), torch.randn(2, rows, 6).double()
        mine = tpc.get_dp_rank()

        def forward(index, module):
            run = (lambda a: module(a, index)) if self.together else module
            return (lambda a: mse(run(a[0]), a[1])) if index == self.last else run

        functions = [forward(*entry) for entry in self.stages.items()]
        ends = {0: [x[mine]], self.last: [y[mine]]}
        forward_backward(None, functions, None, [ends.get(s) for s in self.stages], m, schedule=self.schedule)
        for part, goal in zip(x, y, strict=True):  # micro-batch by micro-batch, for layers that count them
            for a, b in zip(part.tensor_split(m), goal.tensor_split(m), strict=True):
                if len(a):
                    (mse(self.plain(a), b) * len(a) / (2 * rows)).backward()

    def check(self, times=1):
        theirs = dict(self.plain.named_parameters())
        for name, p in self.parameters().items():
            expected = theirs[name].grad
            same = p.grad is None if expected is None else torch.allclose(p.grad, times * expected)
            assert same, f"{self.schedule}: {name} is {p.grad} and should be {times} * {expected}"


class Together(nn.Module):
    """All chunks of a rank in one module."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleDict({str(index): stage for index, stage in stages.items()})

    def forward(self, x, index):
        return self.stages[str(index)](x)


def tied(layers, first=0, other=-1):
    """The last layer has the weight of the first one: on one rank in a v, on two ranks in a loop."""
    layers[other][0].weight = layers[first][0].weight
    return layers


def sum_of_replicas(_, bucket):
    reduced = dist.all_reduce(bucket.buffer(), group=tpc.get_group("data"), async_op=True)
    return reduced.get_future().then(lambda future: future.value()[0])


def accumulated(rank, world):
    start(2)
    for schedule, shares, options in itertools.product(SPLIT, (False, True), OPTIONS):
        replica = Replica(tied(make_layers()) if shares else make_layers(), schedule, options)
        for _ in range(2):
            replica.zero_grad()
            with ExitStack() as stack:
                for module in replica.wrapped:
                    stack.enter_context(module.no_sync())
                replica.step()
            replica.step(rows=1)
            replica.step()
            replica.check()
    return len(ties()._ties)


def test_gradients_of_every_replica_are_the_full_batch_s():
    tied_over_two_ranks = len(["zb-h1", "interleaved-zb"]) * len(OPTIONS)
    assert run_distributed(accumulated, 4, timeout=120) == [tied_over_two_ranks] * 4


def counted(rank, world):
    start(2)
    for schedule, shares in itertools.product(SPLIT, (False, True)):
        options = {"find_unused_parameters": shares, "gradient_as_bucket_view": not shares}
        replica = Replica(tied(make_layers()) if shares else make_layers(), schedule, options)
        for module in replica.wrapped:
            module.register_comm_hook(None, sum_of_replicas)
        for _ in range(3):
            replica.zero_grad()
            replica.step()
            replica.check(times=2)  # once reduced; a second time would make it 4


def test_every_parameter_is_reduced_once():
    run_distributed(counted, 4)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
def test_one_wrapper_around_all_chunks(options):
    run_distributed(in_one_wrapper, 4, options)


def in_one_wrapper(rank, world, options):
    start(2)
    for schedule in ("zb-v", "interleaved-zb"):
        replica = Replica(tied(make_layers()), schedule, options, together=True)
        for _ in range(2):
            replica.zero_grad()
            replica.step()
            replica.check()


def in_a_row(rank, world):
    start(1)
    layers = tied(tied(make_layers(4), 0, 1), 2, 3)
    layers = nn.Sequential(layers[0], nn.Sequential(*layers[1], *layers[2]), layers[3])
    replica = Replica(layers, "interleaved-1f1b", {}, chunks=3)
    for module in replica.wrapped:
        module.register_comm_hook(None, sum_of_replicas)
    for _ in range(2):
        replica.zero_grad()
        replica.step()
        replica.check(times=2)


def test_chunks_that_are_joined_by_the_one_between_them_wait_for_each_other():
    run_distributed(in_a_row, 2)


class Sometimes(nn.Module):
    """A layer of which some parameters are used in the first micro-batch only, one never, and one is frozen."""

    def __init__(self, m):
        super().__init__()
        self.always, self.first = nn.Linear(6, 6), nn.Linear(6, 6)
        self.never, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(6), requires_grad=False)
        self.m, self.calls = m, 0

    def forward(self, x):
        self.calls += 1
        y = self.always(x) * self.frozen
        return y + self.first(x) if self.calls % self.m == 1 else y


def partly_used(rank, world):
    start(2)
    for schedule, shares in itertools.product(SPLIT, (False, True)):
        layers = tied(make_layers()) if shares else make_layers()
        for position in (0, 3):
            layers[position] = nn.Sequential(layers[position][0], Sometimes(3).double())
        layers[1][0].requires_grad_(False)
        replica = Replica(layers, schedule, {"find_unused_parameters": True})
        for _ in range(2):
            replica.zero_grad()
            replica.step()
            replica.check()
            assert replica.stages.get(0) is None or replica.parameters()["0.1.never"].grad is None


def test_frozen_parameters_and_some_that_the_last_microbatch_does_not_use():
    run_distributed(partly_used, 4)


class Checkpointed(nn.Module):
    """Runs again in the backward, which therefore cannot be split."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


def unsplit(rank, world):
    start(2)
    for schedule in SPLIT:
        layers = make_layers()
        layers[1], layers[3] = Checkpointed(layers[1]), Checkpointed(layers[3])
        replica = Replica(layers, schedule, {"gradient_as_bucket_view": True})
        for _ in range(2):
            replica.zero_grad()
            replica.step()
            replica.check()


def test_a_backward_that_ran_whole_is_reduced_with_its_weights():
    run_distributed(unsplit, 4)


class Fails(nn.Module):
    """Raises once, in the second forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            raise ArithmeticError("once")
        return x


def after_a_failure(rank, world):
    start(2)
    for schedule in SPLIT:
        layers = tied(make_layers())
        replica = Replica(layers, schedule, {"gradient_as_bucket_view": True})
        replica.step()
        layers[2].append(Fails())
        with pytest.raises((ArithmeticError, PipelineError), match="once"):
            replica.step()
        replica.zero_grad()
        replica.step()
        replica.check()


def test_the_step_after_one_that_failed():
    run_distributed(after_a_failure, 4)
