"""What in a batch is what."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from torchdistpackage import TrainerError
from torchdistpackage.trainer import default_collator, read_batch

IDS = torch.arange(6).reshape(2, 3)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
NAMES = ("labels", "label", "targets")


@dataclass
class Pair:
    x: Any
    labels: Any


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict(kind):
    raw = kind(labels=IDS, attention_mask=MASK, input_ids=IDS, note=["a", "b"], nothing=None)
    batch = read_batch(raw, NAMES)
    assert batch.args[0] is IDS
    assert batch.labels is IDS
    assert batch.kwargs == {"attention_mask": MASK, "note": ["a", "b"]}
    assert (batch.rows, batch.real) == (2, True)
    assert len(raw) == 5  # the user's batch is as it was


@pytest.mark.parametrize(
    ("raw", "args", "kwargs"),
    [
        ((IDS, MASK), [IDS], {}),
        ([IDS, MASK], [IDS], {}),
        ((IDS, IDS, MASK), [IDS, IDS], {}),
        (({"x": IDS, "y": IDS}, MASK), [IDS], {"y": IDS}),
        (Pair(IDS, MASK), [IDS], {}),
        ({"foo": IDS, "targets": MASK}, [IDS], {}),
    ],
)
def test_other_forms(raw, args, kwargs):
    batch = read_batch(raw, NAMES)
    assert list(batch.args) == args
    assert batch.kwargs == kwargs
    assert batch.labels is MASK


@pytest.mark.parametrize("raw", [IDS, (IDS,), [IDS], {"x": IDS}])
def test_no_labels(raw):
    batch = read_batch(raw)
    assert batch.args[0] is IDS
    assert batch.labels is None
    assert read_batch(raw, default_labels=True).labels is IDS


def test_padding_is_no_label():
    labels = read_batch({"input_ids": IDS, "attention_mask": MASK}, default_labels=True).labels
    assert labels.tolist() == [[0, 1, -100], [3, 4, 5]]
    assert IDS[0, 2] == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"text": ["a"], "labels": IDS}, r"found \{'text': list\}|'text': \(str\)"),
        ({"labels": IDS}, r"beside its labels; found \{\}"),
        ((IDS, torch.zeros(3)), r"each of the 2 rows .* float32 \(3,\)"),
        ((IDS, torch.zeros(())), "each of the 2 rows"),
        ("text", "found str"),
        ((torch.zeros(()), None), "a tensor with rows"),
    ],
)
def test_what_cannot_be_read(raw, message):
    with pytest.raises(TrainerError, match=message):
        read_batch(raw)


def test_images_are_no_labels():
    with pytest.raises(TrainerError, match="no tokens"):
        read_batch(torch.rand(2, 3), default_labels=True)


def test_collating_dicts():
    made = default_collator([{"a": [i, 2], "b": float(i), "c": "x", "d": np.ones(2), "e": None} for i in range(2)])
    assert made["a"].tolist() == [[0, 2], [1, 2]]
    assert made["a"].dtype == torch.int64
    assert (made["b"].dtype, made["c"], made["d"].shape, made["e"]) == (torch.float32, ["x", "x"], (2, 2), None)


def test_collating_tuples():
    images, labels = default_collator([(torch.ones(2), 0), (torch.zeros(2), 1)])
    assert images.shape == (2, 2)
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": [1]}, {"a": [1, 2]}], r"'a' do not make one tensor \(lengths 1, 2\): pass data_collator"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], "lengths 1, 2"),
        ([{"a": 1}, {"b": 1}], r"\['a'\] and \['b'\]"),
        ([(torch.ones(1),), (torch.ones(2),)], "2 rows cannot be put into one batch"),
    ],
)
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(TrainerError, match=message):
        default_collator(rows)
