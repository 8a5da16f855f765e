"""Ends the waits of process groups from another thread, which torch offers for NCCL only.

A wait in a collective of gloo ends with its message, its time-out, or its connection: `abort` and `shutdown` of the
group leave it waiting. So the sockets that gloo opens for a group are noted when it is made, and shut down when a wait
must end. The socket's inode is noted, too, so that a number that has been given to another file since is left alone.
Where the system has no `/proc` nothing is noted, and such a wait lasts until the group's time-out.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["interrupt", "note_sockets", "sockets_of"]

_noted: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, int]] = weakref.WeakKeyDictionary()


@contextmanager
def note_sockets() -> Iterator[list[dist.ProcessGroup]]:
    """Surrounds the making of a group, which is then put into the list: the sockets that are new belong to it."""
    made: list[dist.ProcessGroup] = []
    before = _open_sockets()
    yield made
    after = _open_sockets()
    for group in made:
        _noted[group] = {number: inode for number, inode in after.items() if before.get(number) != inode}


def sockets_of(group: dist.ProcessGroup) -> dict[int, int]:
    """File descriptor -> inode, of the sockets that were opened for a group."""
    return dict(_noted.get(group, {}))


def interrupt(groups: Iterable[dist.ProcessGroup]) -> None:
    """Ends what waits in these groups, here and on the other ranks. They cannot be used again."""
    for group in groups:
        for number, inode in sockets_of(group).items():
            _shut_down(number, inode)
        if torch.cuda.is_available() and "cuda:nccl" in dist.get_backend_config(group):
            abort = getattr(group._get_backend(torch.device("cuda")), "abort", None)
            if abort is not None:
                abort()


def _open_sockets() -> dict[int, int]:
    """File descriptor -> inode of all sockets of this process."""
    found = {}
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return {}
    for number in numbers:
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the directory's own, which is closed by now
        if name.startswith("socket:["):
            found[number] = int(name[8:-1])
    return found


def _shut_down(number: int, inode: int) -> None:
    try:
        if os.fstat(number).st_ino != inode:
            return
        with socket.socket(fileno=os.dup(number)) as end:
            end.getpeername()  # gloo aborts the process if its listener is shut down: that has no peer
            end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already
