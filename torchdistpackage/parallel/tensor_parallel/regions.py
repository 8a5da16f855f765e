"""How activations change between the layouts of tensor parallelism, with the right way back for their gradients.

With t ranks in the tensor group, a tensor of shape (batch, sequence, features) is at any place one of::

    whole      every rank has all of it, and the same
    share      every rank has all of it, as one of t summands that make the value
    part       rank r has (batch, sequence / t, features): the r-th part of the sequence ("sequence parallel")

    function                                       forward                  backward
    enter_tensor_parallel_region                   whole -> whole           share -> whole    sum
    leave_tensor_parallel_region                   share -> whole  sum      whole -> whole
    gather_from_sequence_parallel_region           part  -> whole  gather   share -> part     sum and split
      (..., tensor_parallel_output_grad=False)     part  -> whole  gather   whole -> part     split
    reduce_scatter_to_sequence_parallel_region     share -> part   sum+split  part -> whole   gather
    maybe_split_into_sequence_parallel             whole -> part   split    part -> whole     gather

What arrives as the gradient of a whole tensor is a share where each rank has used it for something else (columns of its
own), and whole where all ranks have computed the same. Nothing is changed in place: autograd may need it.

Activations are plain tensors here, only parameters are DTensors. Neighbours: `layers.py` and `transformer.py` are made
of these; `group.py` knows the group. The pictures follow Shoeybi et al., "Megatron-LM", 2019 and Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh

__all__ = [
    "enter_tensor_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_tensor_model_parallel_world_size",
    "is_sequence_parallel_tensor",
    "is_squence_parallel_tensor",
    "leave_tensor_parallel_region",
    "maybe_gather_from_sequence_parallel",
    "maybe_split_into_sequence_parallel",
    "own_random_numbers",
    "reduce_scatter_to_sequence_parallel_region",
    "set_sequence_parallel_attr",
]

# torch 2.15 has new names for two of them, and warns of the old ones
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor

Group = dist.ProcessGroup | DeviceMesh | None
_Change = Callable[[Tensor], Tensor]


def get_tensor_model_parallel_world_size(group: Group = None) -> int:
    """The number of ranks in the tensor group.

    Args:
        group: None for the present one, see `get_tp_group`.

    Raises:
        TopologyError: torch.distributed is not initialised, or this rank is not in the group.

    Example:
        >>> get_tensor_model_parallel_world_size()  # on one rank
        1
    """
    return tensor_mesh(group).size()


def enter_tensor_parallel_region(x: Tensor, group: Group = None) -> Tensor:
    """Hands a whole tensor to what each rank does differently: the gradients of all ranks are added on the way back.

    Args:
        x: The same on every rank, any shape.
        group: None for the present tensor group.

    Example:
        >>> x, own_columns = torch.ones(2, 3, 4), torch.ones(4, 6)
        >>> local = enter_tensor_parallel_region(x) @ own_columns
    """
    mesh = tensor_mesh(group)
    return _move(x, mesh, _same, partial(_sum, mesh))


def leave_tensor_parallel_region(x: Tensor, group: Group = None) -> Tensor:
    """The sum of what the ranks give, on every rank.

    Args:
        x: This rank's summand, any shape, equal on all ranks.
        group: None for the present tensor group.

    Example:
        >>> local, own_rows = torch.ones(2, 3, 6), torch.ones(6, 4)
        >>> leave_tensor_parallel_region(local @ own_rows)[0, 0]  # on one rank; 12 on two with 6 columns each
        tensor([6., 6., 6., 6.])
    """
    mesh = tensor_mesh(group)
    return _move(x, mesh, partial(_sum, mesh), _same)


def gather_from_sequence_parallel_region(
    x: Tensor, tensor_parallel_output_grad: bool = True, *, dim: int = -2, group: Group = None
) -> Tensor:
    """The whole sequence on every rank, from the parts that the ranks hold.

    Args:
        x: This rank's part, (batch, sequence / t, features); all parts have one size.
        tensor_parallel_output_grad: True if each rank goes on with something else (a tensor-parallel layer): gradients
            are then added over the ranks. False if all ranks go on with the same (a loss of the whole output).
        dim: The sequence.
        group: None for the present tensor group.

    Returns:
        (batch, sequence, features), marked as not sequence parallel.

    Example:
        >>> part, target = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
        >>> torch.nn.functional.mse_loss(gather_from_sequence_parallel_region(part, False), target)
        tensor(1.)
    """
    mesh = tensor_mesh(group)
    back = _scattered_sum if tensor_parallel_output_grad else _part
    return set_sequence_parallel_attr(_move(x, mesh, partial(_whole, mesh, dim), partial(back, mesh, dim)), False)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, *, dim: int = -2, group: Group = None) -> Tensor:
    """This rank's part of the sequence of the sum of what the ranks give.

    Args:
        x: This rank's summand, (batch, sequence, features).
        dim: The sequence, which the number of ranks must divide.
        group: None for the present tensor group.

    Returns:
        (batch, sequence / t, features), marked as sequence parallel.

    Raises:
        SplitError: The ranks cannot share the sequence equally.

    Example:
        >>> local, own_rows = torch.ones(2, 6, 8), torch.ones(8, 4)
        >>> part = reduce_scatter_to_sequence_parallel_region(local @ own_rows)
        >>> part.shape, is_sequence_parallel_tensor(part)  # on one rank; (2, 3, 4) on each of two
        (torch.Size([2, 6, 4]), True)
    """
    mesh = tensor_mesh(group)
    _check_shares(x, mesh, dim)
    return set_sequence_parallel_attr(_move(x, mesh, partial(_scattered_sum, mesh, dim), partial(_whole, mesh, dim)))


def maybe_split_into_sequence_parallel(x: Tensor, *, dim: int = -2, group: Group = None) -> Tensor:
    """This rank's part of the sequence of a whole tensor; a tensor that is marked as a part stays as it is.

    Args:
        x: (batch, sequence, features), the same on every rank.
        dim: The sequence, which the number of ranks must divide.
        group: None for the present tensor group.

    Returns:
        (batch, sequence / t, features), marked as sequence parallel.

    Raises:
        SplitError: The ranks cannot share the sequence equally.

    Example:
        >>> part = maybe_split_into_sequence_parallel(torch.ones(2, 6, 4))
        >>> part.shape, is_sequence_parallel_tensor(part)  # on one rank; (2, 3, 4) on each of two
        (torch.Size([2, 6, 4]), True)
    """
    if is_sequence_parallel_tensor(x):
        return x
    mesh = tensor_mesh(group)
    _check_shares(x, mesh, dim)
    return set_sequence_parallel_attr(_move(x, mesh, partial(_part, mesh, dim), partial(_whole, mesh, dim)))


def maybe_gather_from_sequence_parallel(
    x: Tensor, tensor_parallel_output_grad: bool = True, *, dim: int = -2, group: Group = None
) -> Tensor:
    """`gather_from_sequence_parallel_region` for a tensor that is marked as a part; any other stays as it is.

    Args:
        x: A part, if marked so; else whole.
        tensor_parallel_output_grad: As there.
        dim: The sequence.
        group: None for the present tensor group.

    Example:
        >>> part = maybe_split_into_sequence_parallel(torch.ones(2, 6, 4))
        >>> maybe_gather_from_sequence_parallel(part).shape
        torch.Size([2, 6, 4])
    """
    if not is_sequence_parallel_tensor(x):
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad, dim=dim, group=group)


def set_sequence_parallel_attr(x: Tensor, value: bool = True) -> Tensor:
    """Marks a tensor as this rank's part of a sequence, or (False) as whole; returns it.

    The mark is an attribute of this very tensor object. Every operation makes a new tensor, which does not have it
    (`x + 1`, a view, a message of the pipeline): mark again what you know to be a part. The layers of this library do
    not rely on it; only the two `maybe_` functions read it.

    Example:
        >>> part = set_sequence_parallel_attr(torch.zeros(2, 3, 4))
        >>> is_sequence_parallel_tensor(part), is_sequence_parallel_tensor(part + 1)
        (True, False)
    """
    x.sequence_parallel = value  # type: ignore[attr-defined]
    return x


def is_sequence_parallel_tensor(x: Tensor) -> bool:
    """Whether the tensor is marked as this rank's part of a sequence; see `set_sequence_parallel_attr`.

    Example:
        >>> is_sequence_parallel_tensor(torch.zeros(2, 3, 4))
        False
    """
    return getattr(x, "sequence_parallel", False) is True


is_squence_parallel_tensor = is_sequence_parallel_tensor
"""The spelling of the original."""


@contextmanager
def own_random_numbers(x: Tensor, mesh: DeviceMesh) -> Iterator[None]:
    """Random numbers of the device of `x` differ from rank to rank inside; after it the ranks agree as before.

    All ranks with equal seeds draw one number and each derives from it a seed of its own, so that the generators stand
    at the same place on all ranks afterwards, and a checkpointed function gets the same numbers again.

    Args:
        x: Where random numbers are needed.
        mesh: The tensor group.

    Example:
        >>> x = torch.ones(2, 3)
        >>> with own_random_numbers(x, tensor_mesh()):
        ...     x = torch.nn.functional.dropout(x, 0.5)
    """
    seed = int(torch.randint(1 << 62, (), device="cpu")) + mesh.get_local_rank()
    index = x.device.index
    with torch.random.fork_rng(devices=[index] if x.is_cuda else []):
        generator = torch.cuda.default_generators[index] if x.is_cuda else torch.default_generator
        generator.manual_seed(seed)
        yield


class _Move(torch.autograd.Function):
    """One change of layout forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Change, back: _Change) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


def _move(x: Tensor, mesh: DeviceMesh, there: _Change, back: _Change) -> Tensor:
    moved: Tensor = _Move.apply(x, *((_same, _same) if mesh.size() == 1 else (there, back)))
    return moved


def _finished(pending: Tensor) -> Tensor:
    done: Tensor = collectives.wait_tensor(pending)  # type: ignore[no-untyped-call]
    return done


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(mesh: DeviceMesh, x: Tensor) -> Tensor:
    return _finished(collectives.all_reduce(x, "sum", (mesh, 0)))


def _whole(mesh: DeviceMesh, dim: int, x: Tensor) -> Tensor:
    return _finished(_all_gather(x.contiguous(), dim % x.ndim, (mesh, 0)))


def _scattered_sum(mesh: DeviceMesh, dim: int, x: Tensor) -> Tensor:
    return _finished(_reduce_scatter(x.contiguous(), "sum", dim % x.ndim, (mesh, 0)))


def _part(mesh: DeviceMesh, dim: int, x: Tensor) -> Tensor:
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()


def _check_shares(x: Tensor, mesh: DeviceMesh, dim: int) -> None:
    length, ranks = x.size(dim), mesh.size()
    if length % ranks:
        raise SplitError(
            f"the sequence, dim {dim} of a tensor of shape {tuple(x.shape)}, has {length} positions, which the {ranks} "
            f"ranks of the tensor group cannot share equally; pad it to {-(-length // ranks) * ranks}"
        )
