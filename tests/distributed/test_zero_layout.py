"""Every element of every parameter is owned by one rank, whatever the sizes are."""

import doctest
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdistpackage.parallel import zero_layout, zero_memory
from torchdistpackage.parallel.zero_layout import by_elements, by_parameters

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(lambda found: dict(enumerate(found)))


def owned(layouts, num_ranks):
    return Counter(
        (slot.parameter, element, rank)
        for layout in layouts
        for rank in range(num_ranks)
        for slot in layout.owned(rank)
        for element in range(slot.start, slot.stop)
    )


def everything(numels):
    return sorted((number, element) for number, numel in numels.items() for element in range(numel))


@given(sizes, st.integers(1, 5), st.integers(1, 60), st.booleans())
def test_by_elements(numels, num_ranks, bucket_size, whole):
    layouts = by_elements(numels, num_ranks=num_ranks, bucket_size=bucket_size, whole=whole)
    found = owned(layouts, num_ranks)
    assert sorted(key[:2] for key in found.elements()) == everything(numels)
    total = sum(numels.values())
    counts = [sum(key[2] == rank for key in found) for rank in range(num_ranks)]
    assert max(counts) <= total / num_ranks + len(layouts)
    for layout in layouts:
        used = sum(slot.numel for slot in layout.slots)
        assert layout.even
        assert used <= layout.numel < used + num_ranks
        assert used <= bucket_size or (whole and len(layout.slots) == 1)


@given(sizes, st.integers(1, 5), st.integers(1, 60))
def test_by_parameters(numels, num_ranks, bucket_size):
    loads = [0] * num_ranks
    layouts = by_parameters(numels, bucket_size=bucket_size, loads=loads)
    found = owned(layouts, num_ranks)
    assert sorted(key[:2] for key in found.elements()) == everything(numels)
    assert len({key[::2] for key in found}) == sum(numel > 0 for numel in numels.values())  # whole
    assert loads == [sum(key[2] == rank for key in found) for rank in range(num_ranks)]
    assert max(loads) - min(loads) <= max(numels.values())


@pytest.mark.parametrize("module", [zero_layout, zero_memory])
def test_examples(module):
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
