"""A place in the data that fits any number of replicas."""

import pytest
import torch
from torch.utils.data import DataLoader

from torchdistpackage import CheckpointError
from torchdistpackage.checkpoint import ResumableSampler


def epoch(replicas, rows=10, **options):
    return [ResumableSampler(range(rows), replicas, rank, **options) for rank in range(replicas)]


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_replicas_share_the_rows(replicas, drop_last):
    samplers = epoch(replicas, drop_last=drop_last)
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {len(samplers[0])}
    taken = [row for rows in zip(*parts, strict=True) for row in rows]
    whole = list(ResumableSampler(range(10)))
    assert taken[:10] == whole[: len(taken)]
    assert len(taken) == (10 // replicas if drop_last else -(-10 // replicas)) * replicas


@pytest.mark.parametrize("workers", [0, 2])
def test_another_number_of_replicas_goes_on_with_the_next_row(workers):
    first = ResumableSampler(range(12), 2, 0, seed=5)
    first.set_epoch(3)
    loader = iter(DataLoader(torch.arange(12), batch_size=2, sampler=first, num_workers=workers))
    seen = next(loader).tolist()
    first.advance(4)  # two replicas with two rows each, however far workers have read ahead
    whole = ResumableSampler(range(12), seed=5)
    whole.set_epoch(3)
    order = list(whole)
    assert seen == [order[0], order[2]]
    rest = []
    for sampler in epoch(4, rows=12, seed=5):
        sampler.load_state_dict(first.state_dict())
        rest.append(list(sampler))
    assert [row for rows in zip(*rest, strict=True) for row in rows] == order[4:]


def test_epochs_differ_and_begin_anew():
    sampler = ResumableSampler(range(100))
    before = list(sampler)
    sampler.advance(40)
    sampler.set_epoch(0)
    assert list(sampler) == before[40:]
    sampler.set_epoch(1)
    assert list(sampler) != before
    assert sorted(sampler) == sorted(before)
    sampler.advance(500)
    assert list(sampler) == []
    assert len(sampler) == 0


def test_a_tiny_data_set_is_repeated():
    assert [list(sampler) for sampler in epoch(5, rows=2, shuffle=False)] == [[0], [1], [0], [1], [0]]


def test_wrong_arguments():
    with pytest.raises(CheckpointError, match="rank 2 is not one of 2 replicas"):
        ResumableSampler(range(3), 2, 2)
    with pytest.raises(CheckpointError, match="'epoch' and 'rows'"):
        ResumableSampler(range(3)).load_state_dict({"epoch": 1})
    with pytest.raises(CheckpointError, match=r"'epoch' and 'rows', whole numbers; this is None"):
        ResumableSampler(range(3)).load_state_dict(None)
    with pytest.raises(CheckpointError, match="the data set has no rows"):
        ResumableSampler([])
    with pytest.raises(CheckpointError, match="does not give back"):
        ResumableSampler(range(3)).advance(-1)
