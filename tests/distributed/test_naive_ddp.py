"""NaiveDDP over gloo: gradients are those of all replicas, in bits torch's own where torch can do it, in every case."""

import copy
import gc
import itertools
import logging
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from replicated_nets import SMALL, backward, batch, equal, everywhere, grads, net, world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage import PipelineError, TopologyError, flatten_model, setup_distributed, tpc, whole_model_state_dict
from torchdistpackage.parallel.gradient_buckets import Slot, bucket_layout
from torchdistpackage.parallel.naive_ddp import NaiveDDP


def like_torchs(rank, size):
    world()
    for sync, cap, as_view, k, none in itertools.product(
        (False, True), (25, SMALL), (False, True), (1, 2), (True, False)
    ):
        ours = NaiveDDP(net(), sync, cap, as_view, num_grad_acc_iter=k)
        theirs = DistributedDataParallel(net(), gradient_as_bucket_view=as_view)
        pair = [(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) for model in (ours, theirs)]
        for iteration in range(4):
            for step in range(k - 1):
                backward(ours, batch(10 * iteration + step, rank))
                with theirs.no_sync():
                    backward(theirs, batch(10 * iteration + step, rank))
            for model, _ in pair:
                backward(model, batch(10 * iteration + 9, rank))
            ours.reduce_gradients()
            ours.reduce_gradients()
            assert equal(grads(ours), grads(theirs)), (sync, cap, as_view, k, none, iteration)
            for model, optimizer in pair:
                optimizer.step()
                if iteration != 2:  # once, what is reduced stays and is added to
                    model.zero_grad(set_to_none=none)
        assert equal([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()])


def test_bits_are_those_of_torchs_wrapper():
    run_distributed(like_torchs, 2, timeout=120)


def sums(rank, size):
    world()
    for cap, as_view, sync in itertools.product((25, SMALL), (False, True), (False, True)):
        ours = NaiveDDP(net(), sync, cap, as_view, reduce_op="sum").eval()
        plain = net().eval()
        for iteration, clear in enumerate((False, False, True, "zero", False)):
            backward(ours, batch(iteration, rank))
            ours.reduce_gradients()
            ours.reduce_gradients()
            for other in range(size):
                backward(plain, batch(iteration, other))
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads(ours), grads(plain), strict=True))
            if clear:
                ours.zero_grad(set_to_none=clear is True)
                plain.zero_grad()
        assert everywhere(ours)


def test_a_sum_is_a_sum_and_what_was_summed_before_is_not_multiplied():
    run_distributed(sums, 3)


def scaled_sum(rank, size):
    world()
    ours = NaiveDDP(nn.Linear(6, 2), reduce_op="sum", sync=True)
    backward(ours, batch(0, rank))
    ours.reduce_gradients()
    backward(ours, batch(0, rank))
    ours.weight.grad.mul_(2)
    with pytest.raises(PipelineError, match="a sum over the replicas to which this replica has added"):
        backward(ours, batch(0, rank))


def test_a_sum_that_was_scaled_halfway_is_an_error():
    run_distributed(scaled_sum, 2)


class Mixed(nn.Module):
    """Uses by rank and iteration what it is told to use; some parameters nobody, some are frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(6)])
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x, use):
        for number in use:
            x = self.layers[number](x)
        return self.frozen(x)


def unused(rank, size):
    world()
    uses = [([0, 1, 2], [2, 3]), ([4], [0, 1, 2, 3, 4]), ([3, 0], [0]), ([], [1]), ([5, 1], [4, 0])]
    for cap, as_view, sync in itertools.product((25, SMALL), (False, True), (False, True)):
        ours, plain = NaiveDDP(Mixed(), sync, cap, as_view), Mixed()
        for iteration, use in enumerate(uses):
            ours.zero_grad()
            plain.zero_grad()
            out = ours(batch(iteration, rank), use[rank]).square().mean()
            if use[rank]:
                out.backward()
            ours.reduce_gradients()
            for other in range(size):
                if use[other]:
                    (plain(batch(iteration, other), use[other]).square().mean() / size).backward()
            for name, p in plain.named_parameters():
                mine = ours.module.get_parameter(name).grad
                assert (mine is None) == (p.grad is None), (iteration, name)
                assert mine is None or torch.allclose(mine, p.grad, atol=1e-6), (iteration, name)


def test_parameters_that_some_replicas_or_none_have_used():
    run_distributed(unused, 2)


def by_hand(rank, size):
    """Backwards that nobody has announced; on rank 1 there is one more in every second iteration."""
    world()
    for cap, as_view, op in itertools.product((25, SMALL), (False, True), ("avg", "sum")):
        ours, plain = NaiveDDP(net(), False, cap, as_view, reduce_op=op).eval(), net().eval()
        for iteration in range(4):
            ours.zero_grad()
            plain.zero_grad()
            for other in range(size):
                for step in range(2 + other * (iteration % 2)):
                    x = batch(10 * iteration + step, other)
                    (plain(x).square().mean() / (size if op == "avg" else 1)).backward()
                    if other == rank:
                        loss = ours(x).square().mean() / 2
                        loss.backward(retain_graph=True)
                        loss.backward()
            ours.reduce_gradients()
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads(ours), grads(plain), strict=True))
            assert everywhere(ours)


def test_any_number_of_backwards_between_two_reductions():
    run_distributed(by_hand, 2)


def without_a_batch(rank, size):
    world()
    for op, none, as_view in itertools.product(("avg", "sum"), (True, False), (True, False)):
        ours, plain = NaiveDDP(net(), False, SMALL, as_view, reduce_op=op).eval(), net().eval()
        for iteration, here in enumerate(([1], [0], [0, 1], [0], [0])):
            if rank in here:
                backward(ours, batch(iteration, rank))
            ours.reduce_gradients()
            for other in here:
                (plain(batch(iteration, other)).square().mean() / (size if op == "avg" else 1)).backward()
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads(ours), grads(plain), strict=True))
            nn.utils.clip_grad_norm_(ours.parameters(), 1e9)
            ours.reduce_gradients()
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads(ours), grads(plain), strict=True))
            ours.zero_grad(set_to_none=none)
            plain.zero_grad()


def test_a_replica_without_a_batch():
    run_distributed(without_a_batch, 2)


def quietly(rank, size):
    world()
    for as_view in (False, True):
        ours, theirs = NaiveDDP(net(), False, SMALL, as_view), DistributedDataParallel(net())
        for iteration in range(2):
            for model in (ours, theirs):
                model.zero_grad()
                with model.no_sync():
                    backward(model, batch(iteration, rank))
            ours_before = grads(ours)
            with ours.no_sync():
                ours.reduce_gradients()
            assert equal(grads(ours), ours_before)
            for model in (ours, theirs):
                backward(model, batch(iteration + 10, rank))
            with ours.no_sync():  # late, and quiet
                backward(ours, torch.zeros(5, 6))
            with theirs.no_sync():
                pass
            ours.reduce_gradients()
        with ours.no_sync():
            backward(ours, batch(7, rank))
        ours.reduce_gradients()
        assert everywhere(ours)


def test_no_sync():
    run_distributed(quietly, 2)


def overlap(rank, size):
    world()
    model = NaiveDDP(nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), False, 8 * 9 * 4 / 2**20)
    with torch.profiler.profile() as profile:
        loss = model(torch.randn(2, 8)).sum()
        with torch.profiler.record_function("backward"):
            loss.backward()
        for _ in range(2):
            model.reduce_gradients()
    begins = [event.time_range.start for event in profile.events() if event.name == "c10d::allreduce_"]
    end = next(event.time_range.end for event in profile.events() if event.name == "backward")
    return sum(begin < end for begin in begins), len(begins)


def test_buckets_go_while_the_backward_runs_and_once():
    assert run_distributed(overlap, 2) == [(3, 4)] * 2


def forgotten(rank, size):
    world()
    for as_view in (False, True):
        model = NaiveDDP(net(), False, SMALL, as_view)
        backward(model, batch(0, rank))
        model.zero_grad()
        for _ in range(2):
            with pytest.raises(PipelineError, match="call reduce_gradients"):
                backward(model, batch(0, rank))
        try:
            model.reduce_gradients()
        except PipelineError:
            assert as_view
        model.zero_grad()
        backward(model, batch(1, rank))
        model.reduce_gradients()
        assert everywhere(model)
        assert model.module[0].weight.grad is not None


def test_an_iteration_without_a_reduction_is_noticed():
    run_distributed(forgotten, 2)


def faces(rank, size):
    setup_distributed(backend="gloo")
    pair = dist.new_group([1, 2])
    if rank == 0:
        return None
    torch.manual_seed(rank)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    inner._ddp_params_and_buffers_to_ignore = ["2.weight", "1.running_var"]
    inner[1].running_mean.fill_(rank)
    inner[1].running_var.fill_(rank)
    own, inner.extra = inner[2].weight.detach().clone(), "seen through"
    model = NaiveDDP(inner, process_group=pair, dp_rank0=2)
    assert inner[1].running_mean.tolist() == [2.0] * 3
    assert inner[1].running_var.tolist() == [rank] * 3
    assert torch.equal(inner[2].weight, own)
    assert model.extra == "seen through"
    assert list(model.state_dict()) == [f"module.{name}" for name in inner.state_dict()]
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018
    with pytest.raises(PipelineError, match="its module can"):
        copy.deepcopy(model)
    inner[0].weight.data.fill_(rank)
    NaiveDDP(inner, process_group=pair)  # from the group's first
    assert inner[0].weight[0, 0].item() == 1
    x = torch.randn(4, 3)
    model(x).square().sum().backward()
    local = inner[2].weight.grad.clone()
    model.reduce_gradients()
    assert torch.equal(inner[2].weight.grad, local)
    with pytest.raises(TopologyError, match=r"rank 5.*not in the group \[1, 2\]"):
        NaiveDDP(inner, process_group=pair, dp_rank0=5)
    with pytest.raises(PipelineError, match="different trainable parameters"):
        NaiveDDP(nn.Linear(2, rank), process_group=pair)
    return None


def test_broadcast_names_and_what_is_ignored():
    run_distributed(faces, 3)


def alone(rank, size):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", 2)])
    plain, layers = net(), net()
    model = NaiveDDP(nn.Sequential(*flatten_model(layers, ["0", "1", "2", "3", "4", "5"])))  # no data dimension
    for _ in range(2):
        backward(model, batch(0, 0))
        backward(plain, batch(0, 0))
        model.reduce_gradients()
        model.sync_comm()
        with model.no_sync():
            backward(model, batch(1, 0))
        backward(plain, batch(1, 0))
        assert equal(grads(model), grads(plain))
    assert list(whole_model_state_dict(model)) == list(plain.state_dict())
    empty = NaiveDDP(nn.ReLU(), process_group=dist.group.WORLD)
    empty(torch.ones(2))
    empty.reduce_gradients()


def test_one_replica_and_no_parameters():
    run_distributed(alone, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce_op": "max"}, "'avg' or 'sum', got 'max'"),
        ({"bucket_cap_mb": 0}, "positive, got 0"),
        ({"num_grad_acc_iter": 0}, "number of backwards >= 1, got 0"),
        ({"num_grad_acc_iter": 1.5}, "number of backwards >= 1, got 1.5"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(PipelineError, match=message):
        NaiveDDP(nn.Linear(2, 2), **options)


def test_no_processes_and_no_module():
    with pytest.raises(TopologyError, match="setup_distributed"):
        NaiveDDP(nn.Linear(2, 2))
    with pytest.raises(PipelineError, match=r"wraps an nn\.Module, got a Tensor"):
        NaiveDDP(torch.ones(2))


def test_buckets_are_cut_at_the_cap():
    sizes = [4, 4, 1, 20, 4, 4]  # numbers of 4 bytes; the cap is 10 of them
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes] + [nn.Parameter(torch.zeros(3).double())]
    slots = [Slot(str(n), p, sums=False) for n, p in enumerate(parameters)]
    layout = bucket_layout(slots, 40)
    assert [[slot.name for slot in bucket] for bucket in layout] == [["0", "1", "2"], ["3"], ["4", "5"], ["6"]]


def dropped(rank, size):
    world()
    inner = net()
    model = NaiveDDP(inner, verbose=True)
    del model  # its hooks end with it
    model = NaiveDDP(inner, reduce_op="sum", verbose=True)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("torchdistpackage.parallel.gradient_reduction")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    backward(model, batch(0, rank))
    model.reduce_gradients()
    assert everywhere(model)
    gone = [weakref.ref(model._reduction), weakref.ref(inner[0].weight), weakref.ref(model._reduction._buckets[0])]
    gc.disable()
    del model, inner
    assert [of() for of in gone] == [None] * 3  # without a circle
    return len(messages), "reduce_gradients took" in messages[0]


def test_a_dropped_wrapper_leaves_its_module_alone():
    assert run_distributed(dropped, 2) == [(1, True)] * 2


def left_alone(rank, size):
    world()
    tpc.setup_process_groups([("data", 2)])
    model = NaiveDDP(net(), False, SMALL)
    backward(model, batch(0, rank))
    if rank == 1:
        os._exit(1)
    begin = time.monotonic()
    with pytest.raises(PipelineError, match=r"rank 1 of the data group.*ended.*NaiveDDP.reduce_gradients"):
        model.reduce_gradients()
    assert time.monotonic() - begin < 10
    with pytest.raises(PipelineError, match="wrap its module anew"):
        backward(model, batch(0, rank))


def test_a_replica_that_is_gone_is_named():
    run_distributed(left_alone, 2, may_die=[1])
