"""NaiveDDP with parameters of every kind: unfrozen, of several types, sparse, tensor-parallel."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import start
from replicated_nets import SMALL, backward, batch, everywhere, net, world
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchdistpackage import PipelineError, TopologyError, create_moe_dp_hooks
from torchdistpackage.parallel.naive_ddp import NaiveDDP


def unfrozen(rank, size):
    world()
    for as_view in (False, True):
        inner = net().eval()
        inner[3].requires_grad_(False)
        ours, plain = NaiveDDP(inner, False, SMALL, as_view), net().eval()
        for iteration, trained in enumerate((False, True, True, False)):
            inner[3].requires_grad_(trained)
            inner.to(torch.float64 if iteration > 1 else torch.float32)
            plain.to(torch.float64 if iteration > 1 else torch.float32)
            ours.zero_grad()
            plain.zero_grad()
            x = [batch(iteration, other).to(inner[0].weight.dtype) for other in range(size)]
            backward(ours, x[rank])
            ours.reduce_gradients()
            (sum(plain(each).square().mean() for each in x) / size).backward()
            assert (inner[3].weight.grad is not None) is trained
            for p, q in zip(inner.parameters(), plain.parameters(), strict=True):
                assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)


def test_parameters_are_unfrozen_and_change_their_type():
    run_distributed(unfrozen, 2)


class Kinds(nn.Module):
    """A convolution that is stored channels last, a complex parameter, and others of half precision."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.short = nn.Parameter(torch.randn(7).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        y = self.conv(x).mean() + (self.turned * x.mean()).square().sum() + (self.complex * x.mean()).abs().sum()
        return y * self.scalar + (self.short * x.mean().to(self.short.dtype)).square().sum().float()


def kinds(rank, size):
    world()
    for dtype, as_view in itertools.product((torch.float16, torch.bfloat16, torch.float64), (False, True)):
        ours, theirs = NaiveDDP(Kinds(dtype), gradient_as_bucket_view=as_view), Kinds(dtype)
        for _ in range(3):
            x = torch.randn(size, 2, 3, 4, 4)
            ours.zero_grad()
            theirs.zero_grad()
            ours(x[rank]).backward()
            ours.reduce_gradients()
            for each in x:
                (theirs(each) / size).backward()
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(p.grad, q.grad, rtol=2e-2 if p.dtype.itemsize == 2 else 1e-4, atol=1e-5), p.dtype
                assert p.grad.stride() == p.stride()
        assert everywhere(ours)


def test_dtypes_and_strides():
    run_distributed(kinds, 2)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.bag = nn.Embedding(9, 4, sparse=True), nn.EmbeddingBag(9, 4, sparse=True)
        self.plain = nn.Parameter(torch.randn(9, 4))
        self.out = nn.Linear(4, 2)

    def forward(self, x, with_bag=True):
        y = self.table(x) + nn.functional.embedding(x, self.plain, sparse=True)
        return self.out(y + self.bag(x.unsqueeze(-1)) if with_bag else y)


def sparse(rank, size):
    world()
    for op in ("avg", "sum"):
        ours, plain = NaiveDDP(Table(), reduce_op=op), Table()
        for iteration in range(4):
            x = torch.randint(0, 9, (size, 3 + iteration))
            use = [iteration != 1 and other == 0 for other in range(size)]
            ours(x[rank], use[rank]).square().sum().backward()
            ours.reduce_gradients()
            ours.reduce_gradients()
            for other in range(size):
                (plain(x[other], use[other]).square().sum() / (size if op == "avg" else 1)).backward()
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or torch.allclose(p.grad.to_dense(), q.grad.to_dense(), atol=1e-4)
            assert ours.table.weight.grad.is_sparse
            if iteration != 2:
                ours.zero_grad()
                plain.zero_grad()


def test_sparse_gradients():
    run_distributed(sparse, 2)


def tensor_parallel(rank, size):
    world()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for cap, as_view in itertools.product((25, 1e-5), (False, True)):
        torch.manual_seed(0)
        plain = nn.Linear(4, 6)
        inner = copy.deepcopy(plain)
        inner.weight = nn.Parameter(distribute_tensor(inner.weight.detach(), mesh["tensor"], [Shard(0)]))
        inner.bias = nn.Parameter(distribute_tensor(inner.bias.detach(), mesh["tensor"], [Replicate()]))
        ours = NaiveDDP(inner, False, cap, as_view, process_group=mesh["data"].get_group())
        for _ in range(2):
            x = torch.randn(2, 3, 4)
            ours.zero_grad()
            plain.zero_grad()
            whole = distribute_tensor(x[mesh["data"].get_local_rank()], mesh["tensor"], [Replicate()])
            ours(whole).square().sum().full_tensor().backward()
            ours.reduce_gradients()
            (plain(x).square().sum() / 2).backward()
            assert torch.allclose(inner.weight.grad.full_tensor(), plain.weight.grad, atol=1e-5)
            assert torch.allclose(inner.bias.grad.full_tensor(), plain.bias.grad, atol=1e-5)


def test_tensor_parallel_parameters():
    run_distributed(tensor_parallel, 4)


def several_backwards_into_views(rank, world):
    """Views of one buffer share what torch counts as changes: a neighbour's gradient is no change."""
    start(pipe=1)
    model = nn.Linear(3, 1).double()
    reference = copy.deepcopy(model)
    ddp = NaiveDDP(model, reduce_op="sum", gradient_as_bucket_view=True, num_grad_acc_iter=2)
    x = torch.randn(world, 2, 3).double()
    for _ in range(3):
        ddp.zero_grad(set_to_none=False)
        reference.zero_grad()
        for _ in range(2):
            ddp(x[rank]).sum().backward()
            reference(x.flatten(0, 1)).sum().backward()
        ddp.reduce_gradients()
        assert all(
            torch.allclose(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
        )


def test_sums_of_several_backwards_live_in_buckets():
    run_distributed(several_backwards_into_views, 2)


def two_owners(rank, world):
    start(pipe=1)
    model = nn.Linear(2, 2)
    wrapped = NaiveDDP(model)
    with pytest.raises(
        PipelineError, match="weight is reduced by a NaiveDDP already, and would be by this MoEDP again"
    ):
        create_moe_dp_hooks(dict(model.named_parameters()), dist.group.WORLD)
    with pytest.raises(TopologyError, match="the process group is a str"):
        NaiveDDP(model, process_group="data")
    return wrapped is not None


def test_one_owner_a_parameter():
    run_distributed(two_owners, 2)
