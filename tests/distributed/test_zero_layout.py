"""Every element of every parameter is owned by one rank, whatever the sizes are."""

import doctest
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchdistpackage.parallel import zero_layout, zero_memory
from torchdistpackage.parallel.zero import Bf16ZeroOptimizer
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
    for layout in layouts:
        chunks = {high - low for low, high in pairwise(layout.bounds)}
        assert layout.even == (len(chunks) == 1)


def uneven_owners(rank, world):
    """The first rank owns a third, the second one less and the last one more."""
    dist.init_process_group("gloo")
    parameters = [nn.Parameter(torch.ones(size)) for size in (5, 4, 3, 3)]
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(parameters, lr=1.0), partition="parameters")
    sum((rank + number) * each.sum() for number, each in enumerate(parameters)).backward()
    optimizer.step()
    return [each.tolist() for each in parameters]


def test_owners_of_whole_parameters_have_unlike_shares():
    wanted = [pytest.approx([1.0 - gradient] * size) for gradient, size in ((1, 5), (2, 4), (3, 3), (4, 3))]
    assert run_distributed(uneven_owners, 3) == [wanted] * 3


@pytest.mark.parametrize("module", [zero_layout, zero_memory])
def test_examples(module):
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
