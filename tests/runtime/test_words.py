"""Values in words: one line, whatever there is to say."""

import collections

import pytest
import torch

from torchdistpackage.runtime.words import in_words, with_type


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "int64 (2, 3)"),
        (torch.ones(2, device="meta"), "float32 (2,) on meta"),
        ([(1, None), {"a": 2.5, 3: "x"}], "[(1, None), {a: 2.5, 3: 'x'}]"),
        (list(range(10)), "[0, 1, 2, 3, 4, 5, ...]"),
        ([[1, 2, 3, 4], [5, 6, 7], 8], "[[1, 2, 3, 4], [5, 6, ...], ...]"),
        ([[]], "[[]]"),
        ("a\n" * 100, "'" + "a\\n" * 13 + "..."),
        (collections.namedtuple("Point", "x y")(1, 2), "Point"),
    ],
)
def test_a_value_is_one_line(value, words):
    assert in_words(value) == words


def test_what_has_no_words_of_its_own_is_named_by_its_type():
    assert with_type(torch.nn.ReLU()) == "a value of type ReLU"
    assert with_type([torch.ones(2)]) == "a value of type list, [float32 (2,)]"
