"""What is in a checkpoint beside tensors by name: values that `torch.load(weights_only=True)` reads, and nothing else.

Loading a pickle is running it. So what could not be read back without that is refused when it is saved, with its place
and its type, while the run that could fix it is still there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchdistpackage.errors import CheckpointError

__all__ = ["packed", "unpacked"]


def packed(what: str, value: Any) -> bytes:
    """A value as bytes; tensors of any device are read back to CPU memory.

    Args:
        what: What it is, for the error.
        value: Tensors, numbers, texts, None, and lists, tuples and dicts of such.

    Raises:
        CheckpointError: Something else is in it.

    Example:
        >>> unpacked(packed("extra", {"epoch": 3, "best": (0.5, None)}))
        {'epoch': 3, 'best': (0.5, None)}
        >>> packed("extra", {"model": [print]})
        Traceback (most recent call last):
        ...
        torchdistpackage.errors.CheckpointError: extra['model'][0] is a builtin_function_or_method, which ...
    """
    try:
        content = _saved(value)
        unpacked(content)
        return content
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
        place, kind = next(_culprits(what, value), (what, type(value)))
        raise CheckpointError(
            f"{place} is a {kind.__qualname__}, which torch.load(weights_only=True) does not read back; save plain "
            "values (numbers, texts, tensors, lists, dicts) instead, such as its state_dict()"
        ) from error


def unpacked(content: bytes) -> Any:
    """What `packed` was given."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _culprits(place: str, value: Any) -> Iterator[tuple[str, type]]:
    """The innermost values that cannot be read back, and where they are."""
    if isinstance(value, Mapping):
        inner = [(f"{place}[{key!r}]", one) for key, one in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [(f"{place}[{number}]", one) for number, one in enumerate(value)]
    else:
        inner = []
    found = [one for where, item in inner for one in _culprits(where, item)]
    if found:
        yield from found
    elif not _is_plain(value):
        yield place, type(value)


def _is_plain(value: Any) -> bool:
    if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, Tensor):
        return True
    try:
        unpacked(_saved(value))
    except Exception:  # whatever it is, it cannot be read back
        return False
    return True
