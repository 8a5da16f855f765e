"""Which rows come when: for any number of replicas, after any restart, from any number of workers."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from torchdistpackage import TrainerError
from torchdistpackage.trainer import BatchSource


class Noisy(Dataset):
    """Rows with noise of all three generators; remembers what was loaded."""

    def __init__(self, rows=11):
        self.rows, self.loaded = rows, []

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.loaded.append(index)
        return index, random.random() + np.random.rand() + float(torch.rand(()))


class Stream(IterableDataset):
    def __init__(self, rows=11):
        self.rows, self.epochs = rows, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for index in range(self.rows):
            yield index, random.random() + np.random.rand() + float(torch.rand(()))


def source(data, batch_size=2, replica=0, replicas=1, **options):
    options = {"seed": 5, "shuffle": True, **options}
    return BatchSource(data, batch_size=batch_size, replica=replica, replicas=replicas, **options)


def rows(batches):
    """Row numbers of batches, without padding, and everything in them."""
    batches = list(batches)
    real = [batch.data[0].tolist()[: len(batch.data[0]) - batch.pad_rows] for batch in batches]
    return real, [(batch.data[0].tolist(), batch.data[1].tolist(), batch.pad_rows) for batch in batches]


@pytest.mark.parametrize("data", [Noisy, Stream])
def test_another_number_of_replicas_sees_the_same_global_batches(data):
    whole = [sorted(each) for each in rows(source(data(), 4).epoch(3))[0]]
    halves = [rows(source(data(), 2, replica, 2).epoch(3))[0] for replica in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole
    assert sorted(chain(*whole)) == list(range(11))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("data", [Noisy, Stream])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 12, 13])
def test_every_row_comes_once_and_every_replica_has_as_many_batches(length, data, even):
    sources = [source(data(length), 2, replica, 4, even=even) for replica in range(4)]
    batches = [list(each.epoch(0)) for each in sources]
    assert {len(each) for each in batches} == {-(-length // 8)}
    if data is Noisy:
        assert sources[0].batches_per_epoch == len(sources[0]) == len(batches[0])
    assert sorted(chain(*(row for each in batches for row in rows(each)[0]))) == list(range(length))
    sizes = {len(each[-1].data[0]) for each in batches}
    assert 0 not in sizes
    assert len(sizes) == 1 or not even


@pytest.mark.parametrize("data", [Noisy, Stream])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_goes_on_where_it_stopped(data, drop_last):
    every = rows(source(data(), 2, 1, 2, drop_last=drop_last).epoch(1))[1]
    assert len(every) == (2 if drop_last else 3)
    for done in range(len(every) + 1):
        assert rows(source(data(), 2, 1, 2, drop_last=drop_last).epoch(1, skip_rows=4 * done))[1] == every[done:]


def test_rows_that_are_passed_over_are_not_loaded():
    data = Noisy()
    taken = rows(source(data).epoch(0, skip_rows=8))[0]
    assert data.loaded == list(chain(*taken))
    assert len(data.loaded) == 3


def test_a_batch_of_another_size_goes_on_at_the_same_row():
    first = rows(source(Noisy()).epoch(2))[0][:2]
    rest = rows(source(Noisy(), 3).epoch(2, skip_rows=4))[0]
    assert [len(each) for each in rest] == [3, 3, 1]
    assert sorted(chain(*first, *rest)) == list(range(11))


@pytest.mark.parametrize("data", [Noisy, Stream])
def test_trainings_random_numbers_are_left_alone(data):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    first = rows(source(data()).epoch(0))[1]
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert rows(source(data()).epoch(0))[1] == first
    assert rows(source(data()).epoch(1))[1] != first


@pytest.mark.parametrize(("data", "workers"), [(Noisy, 2), (Stream, 2)])
def test_workers_change_nothing(data, workers):
    alone, helped = source(data()), source(data(), num_workers=workers, persistent_workers=True)
    state = torch.get_rng_state()
    for epoch, skip in ((0, 0), (1, 4)):
        assert rows(helped.epoch(epoch, skip))[1] == rows(alone.epoch(epoch, skip))[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_hears_of_the_epoch():
    data = Stream()
    streamed = source(data)
    assert streamed.batches_per_epoch is None
    for epoch in (0, 4):
        list(streamed.epoch(epoch))
    assert data.epochs == [0, 4]


def test_order_without_shuffling_and_an_own_collator():
    plain = source("abcde", shuffle=False, collator="".join)
    assert [batch.data for batch in plain.epoch(7)] == ["ab", "cd", "e"]


def test_a_dataloader_is_used_as_it_is_and_repeats_itself():
    def batches(skip=0, epoch=1, replica=0):
        loader = DataLoader(Noisy(), batch_size=3, shuffle=True)
        return rows(source(loader, 99, replica, 2).epoch(epoch, skip))[1]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    every = batches()
    assert batches(skip=6) == every[1:]
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(epoch=2) != every != batches(replica=1)


def test_a_dataloader_that_every_replica_reads_whole_is_told_of(caplog):
    source(DataLoader(TensorDataset(torch.arange(4)), batch_size=2), replicas=2)
    assert "all 4 rows in each of 2 replicas" in caplog.text


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, r"\(list\) is empty"),
        (range(3), {"batch_size": 4, "drop_last": True}, r"3 rows, less than one batch of 4 rows x 1 replicas"),
        (3, {}, "IterableDataset or a DataLoader; got int"),
        (range(3), {"replica": 1}, "replica 1"),
    ],
)
def test_what_is_no_source(data, options, message):
    with pytest.raises(TrainerError, match=message):
        source(data, **options)


def test_an_error_of_the_dataset_comes_as_it_is():
    class Broken(Noisy):
        def __getitem__(self, index):
            raise KeyError("row 3 is broken")

    with pytest.raises(KeyError, match="row 3"):
        list(source(Broken()).epoch(0))
