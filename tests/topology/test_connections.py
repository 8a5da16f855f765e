"""Waits in process groups that another thread ends, and the time-out that all groups share."""

import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed

from torchdistpackage import setup_distributed, tpc
from torchdistpackage.topology.connections import interrupt, sockets_of


def interrupted(rank, world):
    """One rank waits for the other in a group that its own second thread closes."""
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2)])
    group = tpc.get_group("data")
    dist.all_reduce(torch.ones(1), group=group)
    assert sockets_of(group)
    raised = ""
    if rank == 0:
        threading.Timer(0.3, interrupt, [[group]]).start()
        with pytest.raises(RuntimeError, match="Connection closed") as caught:
            dist.all_reduce(torch.ones(1), group=group)
        raised = str(caught.value)
    value = torch.ones(1)
    dist.all_reduce(value)  # the world is as it was
    tpc.setup_process_groups([("data", 2)])
    dist.all_reduce(value, group=tpc.get_group("data"))
    return value.item(), bool(raised)


def test_a_wait_ends_and_other_groups_go_on():
    assert run_distributed(interrupted, 2) == [(4.0, True), (4.0, False)]


def a_number_that_is_another_file_now(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2)])
    group = tpc.get_group("data")
    ours, theirs = os.pipe()
    for number in sockets_of(group):
        dist.barrier()
        os.dup2(theirs, number)  # as if gloo had closed it and the system had given its number to a pipe
    interrupt([group])
    os.write(theirs, b"x")
    return os.read(ours, 1)


def test_a_file_that_has_a_sockets_old_number_is_left_alone():
    assert run_distributed(a_number_that_is_another_file_now, 2) == [b"x", b"x"]


def timeouts(rank, world, given):
    setup_distributed(backend="gloo", timeout=77)
    tpc.setup_process_groups([("data", 2)], timeout=given)
    return tpc.get_group("data")._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize(("given", "found"), [(None, 77), (33, 33)])
def test_groups_have_the_worlds_time_out_unless_they_get_their_own(given, found):
    assert run_distributed(timeouts, 2, given) == [timedelta(seconds=found)] * 2
