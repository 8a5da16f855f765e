"""What in a batch is what: the model's arguments, the labels, the number of rows.

======================================  ==============================================================
a batch                                 what it is read as
======================================  ==============================================================
`{"input_ids": a, "labels": y, ...}`    `model(a, **the_rest)`, labels y; any Mapping, or a dataclass
`(a, y)`, `(a, b, y)`                   `model(a)`, `model(a, b)`, labels y
`({"x": a, "mask": m}, y)`              `model(a, mask=m)`, labels y
`a`, `(a,)`                             `model(a)`, no labels
======================================  ==============================================================

Neighbours: `batches.py` makes the batches, `steps.py` runs them through the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from torchdistpackage.errors import TrainerError

__all__ = ["Batch", "default_collator", "read_batch"]

_MAIN = ("input_ids", "pixel_values", "inputs_embeds", "inputs", "x")
_IGNORED = -100  # what cross-entropy passes over


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch, taken apart.

    Attributes:
        args: The model's positional arguments.
        kwargs: Its named ones.
        labels: What the loss compares with; None if there are none.
        rows: Rows of the batch.
        real: False where all rows are padding: they must not count.
        most_microbatches: The most into which it may be cut, where replicas must run as many; None for any number.

    Example:
        >>> batch = read_batch((torch.zeros(4, 2), torch.ones(4)))
        >>> [each.shape for each in batch.args], batch.labels.shape, batch.rows
        ([torch.Size([4, 2])], torch.Size([4]), 4)
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Any = None
    rows: int = 0
    real: bool = True
    most_microbatches: int | None = None


def read_batch(raw: Any, label_names: Sequence[str] = ("labels",), default_labels: bool = False) -> Batch:
    """Takes a batch apart; see the table above.

    The main input of a dict is `input_ids`, `pixel_values`, `inputs_embeds`, `inputs`, `x` or else the first tensor; it
    becomes the one positional argument. Values that are None are left out.

    Args:
        raw: As a collator or a DataLoader makes it.
        label_names: Where a dict has its labels: the first of them that is there.
        default_labels: A causal language model: if there are no labels, they are the inputs, without what
            `attention_mask` says is padding.

    Raises:
        TrainerError: There is no tensor in it, or the labels have another number of rows; the message shows what is.

    Example:
        >>> batch = read_batch({"input_ids": torch.zeros(2, 3), "mask": torch.ones(2, 3), "labels": torch.ones(2)})
        >>> batch.rows, list(batch.kwargs), batch.labels
        (2, ['mask'], tensor([1., 1.]))
        >>> read_batch((torch.zeros(4, 2), torch.ones(4))).rows
        4
    """
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        raw = {each.name: getattr(raw, each.name) for each in dataclasses.fields(raw)}
    labels = None
    if isinstance(raw, (tuple, list)):
        *inputs, labels = raw if len(raw) > 1 else [*raw, None]
        raw = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else tuple(inputs)
    if isinstance(raw, Mapping):
        kwargs = {str(name): value for name, value in raw.items() if value is not None}
        for name in label_names if labels is None else ():
            if name in kwargs:
                labels = kwargs.pop(name)
                break
        args = (kwargs.pop(_main(kwargs)),)
    else:
        args, kwargs = raw if isinstance(raw, tuple) else (raw,), {}
    rows = _rows([*args, *kwargs.values()])
    if rows is None:
        raise TrainerError(f"a batch needs a tensor with rows for the model; found {_shown(raw)}")
    if labels is None and default_labels:
        labels = _inputs_as_labels(args[0], kwargs.get("attention_mask"))
    if isinstance(labels, Tensor) and _rows(labels) != rows:
        raise TrainerError(
            f"labels must have a row for each of the {rows} rows of the inputs; found labels {_shown(labels)} beside "
            f"{_shown(args)}"
        )
    return Batch(args, kwargs, labels, rows)


def default_collator(rows: list[Any]) -> Any:
    """Makes a batch of rows: dicts key by key, anything else as torch's `default_collate` does.

    In dicts tensors and arrays are stacked, numbers and lists of numbers become tensors (whole ones int64, others
    float32), and whatever is no number stays a list. Labels keep their name.

    Args:
        rows: As the dataset yields them.

    Raises:
        TrainerError: Rows have different keys, or values of different lengths.

    Example:
        >>> default_collator([{"input_ids": [1, 2], "label": 0}, {"input_ids": [3, 4], "label": 1}])
        {'input_ids': tensor([[1, 2],
                [3, 4]]), 'label': tensor([0, 1])}
    """
    if isinstance(rows[0], Mapping):
        keys = list(rows[0])
        for row in rows:
            if set(row) != set(keys):
                raise TrainerError(
                    f"rows of one batch have different keys, {sorted(keys)} and {sorted(row)}: pass data_collator=..."
                )
        return {key: _stacked(key, [row[key] for row in rows]) for key in keys}
    try:
        return default_collate(rows)
    except (RuntimeError, TypeError) as error:
        raise TrainerError(f"{len(rows)} rows cannot be put into one batch: {error}; pass data_collator=...") from error


def _stacked(key: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return default_collator(values)
    try:
        if isinstance(first, Tensor):
            return torch.stack(values)
        if isinstance(first, (np.ndarray, np.generic)):
            return torch.from_numpy(np.stack(values))
        if _is_number(first) or (isinstance(first, (list, tuple)) and _is_number(_innermost(first))):
            return torch.tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        lengths = [len(value) if hasattr(value, "__len__") else value for value in values[:4]]
        raise TrainerError(
            f"the rows' values of {key!r} do not make one tensor (lengths {', '.join(map(str, lengths))}"
            f"{', ...' if len(values) > 4 else ''}): pass data_collator=..., such as transformers' "
            "DataCollatorWithPadding"
        ) from error
    return None if all(value is None for value in values) else values


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _innermost(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


def _main(kwargs: Mapping[str, Any]) -> str:
    for name in (*(name for name in _MAIN if name in kwargs), *kwargs):
        if isinstance(kwargs[name], Tensor):
            return name
    raise TrainerError(
        f"a batch needs a tensor for the model beside its labels; found {_shown(kwargs)}: call it one of "
        f"{', '.join(_MAIN)}, or look at label_names"
    )


def _rows(values: Any) -> int | None:
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return None


def _inputs_as_labels(inputs: Any, mask: Any) -> Any:
    if not isinstance(inputs, Tensor) or inputs.is_floating_point():
        raise TrainerError(
            f"a batch has no labels, and its inputs ({_shown(inputs)}) are no tokens that could be: add labels to it"
        )
    return inputs.masked_fill(mask == 0, _IGNORED) if isinstance(mask, Tensor) else inputs


def _shown(value: Any) -> str:
    """What is in a batch, in short."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_shown(item) for item in value[:6]) + (", ...)" if len(value) > 6 else ")")
    return type(value).__name__
