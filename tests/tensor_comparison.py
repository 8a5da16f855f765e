"""What the tests of tensor-parallel layers share: set-up, dense counterparts, and the comparison with them."""

import os
from functools import partial

import torch
import torch.distributed as dist
from distributed_pipeline import start

from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh

near = partial(torch.allclose, rtol=1e-10, atol=1e-10)


def setup(tensor, seed_by_rank=True, pipe=1):
    data = int(os.environ["WORLD_SIZE"]) // (tensor * pipe)
    start(pipe, config=[("data", data), ("pipe", pipe), ("tensor", tensor)])
    torch.manual_seed(dist.get_rank() if seed_by_rank else 0)


def drawn(*shape, seed=1):
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(whole, dim, mesh):
    """What a rank has of a whole tensor: all of it, or its part of a dim."""
    return whole if dim is None else whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def dense_name(name):
    return ".".join(part for part in name.split(".") if part != "linear")


def assert_same_parameters(parallel, dense, what=lambda p: p, within=near):
    wanted = dict(dense.named_parameters())
    found = {dense_name(name): what(p).full_tensor() for name, p in parallel.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert within(value.reshape(wanted[name].shape), what(wanted[name])), name


def assert_equal_steps(dense, parallel, x, into=None, out=None, mesh=None, run=None, within=near):
    """One forward and backward of both; `into` and `out` are the dims of which each rank has its part."""
    mesh = mesh or tensor_mesh()
    whole, own = x.clone().requires_grad_(), cut(x, into, mesh).clone().requires_grad_()
    wanted = dense(whole)
    slope = drawn(*wanted.shape, seed=2).to(x)
    (wanted * slope).sum().backward()
    found = (run or parallel)(own)
    assert within(found, cut(wanted, out, mesh))
    (found * cut(slope, out, mesh)).sum().backward()
    assert within(own.grad, cut(whole.grad, into, mesh))
    assert_same_parameters(parallel, dense, lambda p: p.grad, within)


def dense_like(kind, *sizes):
    """A dense layer with the same numbers on every rank."""
    torch.manual_seed(5)
    made = kind(*sizes).double()
    torch.manual_seed(dist.get_rank())
    return made


def zeroed(module):
    module.zero_grad()
    return module
