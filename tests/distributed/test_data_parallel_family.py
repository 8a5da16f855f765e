"""The data-parallel family in a pipeline: gradients and updated weights are the plain loop's, reduced once a step."""

import copy
import importlib
import itertools

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import mse, start
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from torchdistpackage import DDP, PipelineError, clip_grad_norm_, forward_backward, partition_chunks, tpc
from torchdistpackage.parallel.naive_ddp import NaiveDDP
from torchdistpackage.schedule import describe

SMALL = 2e-4  # MiB: about 25 numbers of 8 bytes, so that there are several buckets a stage


def replicate(stage):
    return importlib.import_module("torch.distributed._composable.replicate").replicate(
        stage, process_group=tpc.get_group("data"), find_unused_parameters=True
    )


def replicate_with_fsdp(stage):
    found = importlib.import_module("torch.distributed._composable.replicate_with_fsdp")
    return found.replicate(stage, mesh=tpc.mesh["data"])


FAMILY = {
    "ddp": lambda stage: DDP(stage, find_unused_parameters=True),
    "naive": NaiveDDP,
    "naive-sync": lambda stage: NaiveDDP(stage, sync=True),
    "naive-buckets": lambda stage: NaiveDDP(stage, bucket_cap_mb=SMALL, gradient_as_bucket_view=True),
    "fully_shard": lambda stage: fully_shard(stage, mesh=tpc.mesh["data"]),
    "replicate": replicate,
    "replicate-fsdp": replicate_with_fsdp,
}


SHARDED = ("fully_shard", "replicate-fsdp")


class Layer(nn.Module):
    """With a frozen parameter, one that nobody uses, and one that only some micro-batches of some replicas use."""

    def __init__(self, even=False):
        super().__init__()
        self.even = even  # torch's fully_shard wants every replica to use the same parameters in a step
        self.linear, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)
        self.never, self.sometimes = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        y = self.frozen(self.linear(x)).tanh()
        return y * self.sometimes if self.even or x.sum() > 0 else y


def make(tied=False, even=False):
    torch.manual_seed(0)
    layers = nn.Sequential(*[Layer(even) for _ in range(4)]).double()
    if tied:
        layers[3].linear.weight = layers[0].linear.weight
    return layers


class Trained:
    """One replica's chunks under a schedule, next to the plain model on the whole batch."""

    def __init__(self, layers, schedule, wrap, optimizer, sums=False):
        self.plain, self.schedule, self.sums = copy.deepcopy(layers), schedule, sums
        names = {id(p): name for name, p in layers.named_parameters()}
        stages = partition_chunks(list(layers), schedule)
        self.names = {index: [names[id(p)] for p in stage.parameters()] for index, stage in stages.items()}
        self.last = describe(schedule).place(tpc.get_pp_size(), describe(schedule).chunks).num_stages - 1
        self.stages = {index: wrap(stage) for index, stage in stages.items()}
        own = {id(p): p for stage in self.stages.values() for p in stage.parameters()}
        self.optimizers = [optimizer(own.values()), optimizer(self.plain.parameters())]

    def step(self, rows=5, m=4):
        x, y = torch.randn(2, rows, 6).double(), torch.randn(2, rows, 6).double()
        mine = tpc.get_dp_rank()
        functions = [
            (lambda a, run=stage: mse(run(a[0]), a[1])) if index == self.last else stage
            for index, stage in self.stages.items()
        ]
        ends = {0: [x[mine]], self.last: [y[mine]]}
        inputs = [ends.get(index) for index in self.stages]
        one = len(functions) == 1
        forward_backward(
            *(None, functions[0] if one else functions, None, inputs[0] if one else inputs, m), schedule=self.schedule
        )
        for part, goal in zip(x, y, strict=True):
            for a, b in zip(part.tensor_split(m), goal.tensor_split(m), strict=True):
                if len(a):
                    (mse(self.plain(a), b) * len(a) / (rows if self.sums else 2 * rows)).backward()

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def check(self, gradients=True):
        theirs = dict(self.plain.named_parameters())
        for index, stage in self.stages.items():
            for name, p in zip(self.names[index], stage.parameters(), strict=True):
                mine, other = (p.grad, theirs[name].grad) if gradients else (p.detach(), theirs[name].detach())
                if mine is None or other is None:
                    assert other is None or not other.any(), name
                    assert mine is None or not whole(mine).any(), name
                else:
                    assert torch.allclose(whole(mine), other), (self.schedule, name, whole(mine) / other)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def learns(rank, world, kind, schedules):
    start(2)
    for schedule, optimizer in itertools.product(schedules, (momentum, adam)):
        trained = Trained(make(even=kind in SHARDED), schedule, FAMILY[kind], optimizer)
        for steps, m in ((1, 4), (2, 3), (1, 1), (1, 8)):
            for _ in range(steps):
                trained.step(m=m)
            trained.check()
            trained.update()
            trained.check(gradients=False)


@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_and_weights_are_the_plain_loops(kind):
    schedules = ["1f1b", "interleaved-1f1b", "zb-v"]
    if kind == "fully_shard" and torch.__version__ < "2.7":
        pytest.skip("fully_shard needs a GPU there")
    if kind == "replicate-fsdp":
        pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    if kind in SHARDED and not hasattr(torch.distributed.fsdp.FSDPModule, "set_manual_backward_finalization"):
        schedules.remove("zb-v")
    run_distributed(learns, 4, kind, schedules, timeout=120)


def every_schedule(rank, world):
    """NaiveDDP where chunks share a parameter, with sums, which must not be taken twice."""
    start(2)
    for schedule, options in itertools.product(
        ("1f1b", "gpipe", "zb-h1", "zb-v", "dualpipe-v", "interleaved-zb"),
        ({}, {"bucket_cap_mb": SMALL, "gradient_as_bucket_view": True}, {"sync": True}),
    ):
        wrap = lambda stage, options=options: NaiveDDP(stage, reduce_op="sum", **options)  # noqa: E731
        trained = Trained(make(tied=True), schedule, wrap, momentum, sums=True)
        for m in (3, 1):
            trained.step(m=m)
            trained.check()
            trained.step(m=m)
            for stage in trained.stages.values():
                stage.reduce_gradients()
            trained.check()
            trained.update()


def test_chunks_that_share_a_parameter_are_summed_once():
    run_distributed(every_schedule, 4, timeout=120)


def counted(rank, world):
    start(1)
    model = NaiveDDP(nn.Linear(4, 4), num_grad_acc_iter=3)
    x = torch.randn(8, 4)
    found = []

    def step(m=4, **more):
        with torch.profiler.profile() as profile:
            forward_backward(fwd_fn=lambda a: model(a).mean(), inputs=x, num_microbatches=m, **more)
        found.append(reductions(profile))

    step()
    step(m=1)
    step(data_parallel=model)
    step(m=1, data_parallel=[model])
    step(schedule="zb-h1")
    with model.no_sync():
        step()
        step(m=1)
    step()
    with torch.profiler.profile() as profile:
        for _ in range(2):
            model.reduce_gradients()
    return [*found, reductions(profile)]


def reductions(profile):
    return sum(event.name == "c10d::allreduce_" for event in profile.events())


def test_one_reduction_a_step_and_none_under_no_sync_or_after_it():
    assert run_distributed(counted, 2) == [[1, 1, 1, 1, 1, 0, 0, 1, 0]] * 2


class Again(nn.Module):
    """A layer that runs twice within a reentrant checkpoint: its gradient comes twice in one backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=True)
        return x


def late(rank, world):
    start(2)
    for schedule, as_view in itertools.product(("1f1b", "zb-v"), (False, True)):
        layers = make()
        layers[1], layers[2] = Again(layers[1]), Again(layers[2])
        wrap = lambda s, v=as_view: NaiveDDP(s, bucket_cap_mb=SMALL, gradient_as_bucket_view=v)  # noqa: E731
        trained = Trained(layers, schedule, wrap, momentum)
        for _ in range(2):
            trained.step()
            trained.check()
            trained.update()


def test_a_gradient_that_comes_twice_in_the_last_backward():
    run_distributed(late, 4)


def one_module(rank, world):
    start(1)
    for as_view in (False, True):
        model = NaiveDDP(nn.Linear(4, 4), gradient_as_bucket_view=as_view)
        plain = copy.deepcopy(model.module)
        for schedule in ("interleaved-1f1b", "interleaved-zb"):
            x = torch.randn(2, 6, 4)
            model.zero_grad()
            plain.zero_grad()
            functions = [model, lambda a, run=model: run(a).square().mean()]
            forward_backward(fwd_fn=functions, inputs=[x[rank], None], num_microbatches=3, schedule=schedule)
            plain(plain(x)).square().mean().backward()
            assert torch.allclose(model.weight.grad, plain.weight.grad, atol=1e-6)


def test_one_module_runs_both_chunks():
    run_distributed(one_module, 2)


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


def failing(rank, world):
    start(2)
    for kind, schedule in itertools.product(("naive", "naive-buckets", "replicate"), ("1f1b", "zb-v")):
        trap = Fails() if rank == 1 else nn.Identity()
        trained = Trained(make(tied=True), schedule, FAMILY[kind], momentum)
        trained.step()
        trained.update()
        handle = next(iter(trained.stages.values())).register_forward_hook(lambda m, a, out, trap=trap: trap(out))
        with pytest.raises((ArithmeticError, PipelineError), match="once"):
            trained.step()
        handle.remove()
        for optimizer in trained.optimizers:
            optimizer.zero_grad()
        trained.step()
        trained.check()


def test_the_step_after_one_that_failed():
    run_distributed(failing, 4)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in the backward")


def cut_off(rank, world):
    start(1)
    model = NaiveDDP(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), bucket_cap_mb=1e-5)
    x = torch.randn(4, 4)

    def step(breaks=False):
        def fwd_fn(a):
            if breaks and rank == 0:
                a = Breaks.apply(model.module[0](a)) if len(a) else a
                return model.module[3](model.module[2](model.module[1](a))).mean() + 0 * model(a.detach()).mean()
            return model(a).mean()

        forward_backward(fwd_fn=fwd_fn, inputs=x, num_microbatches=1)
        clip_grad_norm_(model.parameters(), 1.0)

    step()
    with pytest.raises((ArithmeticError, PipelineError), match="in the backward"):
        step(breaks=True)
    start(1)
    with pytest.raises(PipelineError, match="wrap its module anew"):
        step()
    model = NaiveDDP(model.module)
    model.zero_grad()
    step()


def test_a_failure_within_the_reduction():
    run_distributed(cut_off, 2)
