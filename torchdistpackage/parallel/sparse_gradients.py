"""Sparse gradients (`nn.Embedding(sparse=True)`) over replicas: each rank gathers the rows of all.

Every replica has other rows, so that they have no fixed place in a bucket. They are reduced at the end of a reduction,
one parameter after the other: two gathers and the sizes before. All replicas add up in the same order and get the same
bits. Neighbours: `gradient_reduction.py` calls it, `gradient_buckets.py` reduces all others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchdistpackage.parallel.gradient_buckets import Slot

__all__ = ["reduce_sparse_gradient", "sparse_parameters"]


def sparse_parameters(module: nn.Module) -> set[int]:
    """The ids of parameters whose gradients will be sparse: those of embeddings that were asked for it.

    Example:
        >>> table = nn.Embedding(10, 4, sparse=True)
        >>> sparse_parameters(nn.Sequential(table, nn.Linear(4, 4))) == {id(table.weight)}
        True
    """
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(inner.weight) for inner in module.modules() if isinstance(inner, kinds) and inner.sparse}


def reduce_sparse_gradient(slot: Slot, group: Any) -> None:
    """Reduces one gradient; None where nobody has one. Collective over the replicas.

    Args:
        slot: The parameter.
        group: The replicas.
    """
    amount, parameter = slot.amount_to_send(), slot.parameter
    if parameter is None:
        return
    if amount is None:
        nowhere = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        amount = torch.sparse_coo_tensor(nowhere, parameter.new_zeros((0, *parameter.shape[1:])), parameter.shape)
    elif not amount.is_sparse or amount.sparse_dim() != 1:
        amount = (amount.to_dense() if amount.is_sparse else amount).to_sparse(1)
    amount = amount.coalesce()
    sizes = _gathered(torch.tensor([amount._nnz(), int(slot.new)], device=parameter.device), group)
    counts, somewhere = [int(size[0]) for size in sizes], any(int(size[1]) for size in sizes)
    if not somewhere:
        return
    most = max(counts)
    indices = _gathered(_padded(amount.indices()[0], most), group)
    values = _gathered(_padded(amount.values(), most), group)
    together = torch.sparse_coo_tensor(
        torch.cat([each[:count] for each, count in zip(indices, counts, strict=True)]).unsqueeze(0),
        torch.cat([each[:count] for each, count in zip(values, counts, strict=True)]),
        parameter.shape,
    ).coalesce()
    result = slot.add_base(together if slot.sums else together / len(sizes))
    if parameter.grad is not None and not parameter.grad.is_sparse:  # it met a dense gradient on the way
        parameter.grad.copy_(result.to_dense() if result.is_sparse else result)
    else:
        parameter.grad = result


def _padded(tensor: Tensor, rows: int) -> Tensor:
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return padded


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """The tensors of all replicas, of one shape; complex numbers travel as pairs."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    found = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, numbers.contiguous(), group=group)
    return [torch.view_as_complex(each) for each in found] if tensor.is_complex() else found
