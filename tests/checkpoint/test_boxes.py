"""The arithmetic of boxes: whatever the shape and the range, boxes tile exactly, in the order of the elements."""

from itertools import pairwise
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdistpackage.checkpoint.boxes import Box, boxes_of_range, tiling_fault, whole_box

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@given(ranges())
@settings(max_examples=300, deadline=None)
def test_a_range_is_a_few_boxes_of_exactly_its_elements(case):
    shape, start, stop = case
    numbers = torch.arange(prod(shape)).view(shape)
    boxes = boxes_of_range(shape, start, stop)
    found = [numbers[box.within(whole_box(shape))].reshape(-1) for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * (len(shape) - 1) + 1)


@given(shapes, st.lists(st.integers(0, 625), max_size=5))
@settings(max_examples=200, deadline=None)
def test_ranges_that_meet_tile(shape, cuts):
    numel = prod(shape)
    at = [0, *sorted(cut for cut in cuts if cut < numel), numel]
    boxes = [box for low, high in pairwise(at) for box in boxes_of_range(shape, low, high)]
    assert tiling_fault(shape, boxes) is None
    assert "of its" in tiling_fault(shape, boxes[1:])
    assert "twice" in tiling_fault(shape, [*boxes, boxes[0]])


@given(ranges(), ranges())
@settings(max_examples=200, deadline=None)
def test_an_overlap_is_what_both_have(one, other):
    shape = one[0]
    limit = prod(shape)
    others = boxes_of_range(shape, min(other[1], limit), min(other[2], limit))
    for a in boxes_of_range(*one):
        for b in others:
            marked = torch.zeros(shape, dtype=torch.int64)
            marked[a.within(whole_box(shape))] += 1
            marked[b.within(whole_box(shape))] += 1
            common = a.overlap(b)
            assert (marked == 2).sum() == (0 if common is None else common.numel)
            assert common is None or (marked[common.within(whole_box(shape))] == 2).all()


def test_faults_have_the_numbers():
    assert "outside" in tiling_fault((4,), [Box((2,), (3,))])
    assert tiling_fault((0, 3), []) is None
    assert tiling_fault((), [Box((), ())]) is None
