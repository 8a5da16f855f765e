"""Tensors in whatever modules take and return, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves

__all__ = ["num_bytes", "plain_tensors", "storage", "tensors_in"]

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples, sets, mappings, dataclasses, namespaces and nodes known to pytree.

    A tensor that is in there twice comes twice. Other objects hold none, whatever their attributes are.

    Example:
        >>> len(tensors_in({"logits": torch.zeros(2), "past": [(torch.ones(1), None), 3]}))
        2
    """
    return list(_walk(value, set()))


def _walk(value: Any, above: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    inner = _inner(value)
    if inner is None or id(value) in above:  # a container in itself would never end
        return
    above.add(id(value))
    for part in inner:
        yield from _walk(part, above)
    above.discard(id(value))


def _inner(value: Any) -> Iterable[Any] | None:
    """What a container holds; None if it is none."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    if isinstance(value, SimpleNamespace):
        return vars(value).values()
    if type(value) in SUPPORTED_NODES:
        leaves: list[Any] = tree_leaves(value)
        return leaves
    return None


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with a memory of their own behind a tensor: itself, or what a sparse, nested or wrapping one holds.

    Example:
        >>> [part.numel() for part in plain_tensors(torch.eye(4).to_sparse())]
        [8, 4]
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
    elif tensor.is_nested:
        parts = list(tensor.unbind())
    elif tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in _COMPRESSED:
        parts = [*(getattr(tensor, name)() for name in _COMPRESSED[tensor.layout]), tensor.values()]
    else:
        yield tensor
        return
    for part in parts:
        if isinstance(part, torch.Tensor):
            yield from plain_tensors(part)


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Elements times their size, of each tensor once. A view counts what it shows, not what it is a view of.

    Example:
        >>> num_bytes([torch.zeros(3, dtype=torch.int8), torch.zeros(3, dtype=torch.bool), torch.zeros(2)])
        14
    """
    once = {id(tensor): tensor for tensor in tensors}.values()
    return sum(part.numel() * part.element_size() for tensor in once for part in plain_tensors(tensor))


def storage(tensor: torch.Tensor) -> Any:
    """The storage of a plain tensor as a key for dictionaries, which keeps nothing alive; its `expired()` tells more.

    The address alone would be given to the next storage as soon as this one is free.
    """
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
