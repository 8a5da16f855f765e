"""Which ranks of a group share a machine, and how they reach each other without the network.

::

    set-up       every rank opens its door and tells the group where it is            one all-gather
    first use    rank a looks at b's notice: same machine?   -- calls, says who it is -->   b takes the call
                 a sends on its end of the socket                                           b reads from its end

Whether two ranks share a machine is not guessed from host names: the kernel's boot id and the network namespace, in
which the addresses live, must be the same (two containers have the same boot id but not each other's sockets), and the
user: only processes of the same one are let in. Where the system has no such sockets (they are Linux's) no rank has a
door, and every message takes the process group's way. Neighbours: `runtime/link.py` moves messages over these sockets.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import torch.distributed as dist

from torchdistpackage.topology.exchange import gather_json

__all__ = ["Door", "open_door"]

_HELLO = struct.Struct("<IQ")  # the caller's rank and epoch
_WATCHING = (1 << 64) - 1  # in the place of an epoch: a call on which nothing will be sent
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_BUFFER = 1 << 20  # bytes that the kernel may keep for a receiver, as far as it allows
_HELLO_SECONDS = 5.0  # the hello follows the connection at once, unless the caller dies in between
_ASK_SECONDS = 0.1  # how often a rank that waits for a call looks for another reason to go on

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


@final
class Door:
    """Where other ranks of this machine call at, and the way to theirs.

    Args:
        rank: This rank in the group.
        machine: What tells machines apart.

    Attributes:
        notices: What every rank has said of its door; None from one that has none.
    """

    def __init__(self, rank: int, machine: str) -> None:
        self._rank, self._machine = rank, machine
        address = f"torchdistpackage-{secrets.token_hex(16)}"
        self.notice = {"machine": machine, "address": address}
        self.notices: Sequence[dict[str, str] | None] = ()
        self._called: dict[tuple[int, int], socket.socket] = {}
        self._watched: dict[int, socket.socket] = {}
        self._listener = _socket()
        self._listener.bind(f"\0{address}")  # an abstract address: no file is left behind
        self._listener.listen(1024)

    def reaches(self, rank: int) -> bool:
        """Whether another rank is on this machine."""
        notice = self.notices[rank]
        return notice is not None and notice["machine"] == self._machine

    def call(self, rank: int, epoch: int = _WATCHING) -> socket.socket:
        """Connects to another rank of this machine, which need not have answered yet.

        Args:
            rank: The other rank.
            epoch: Connections of different epochs (counts of failures) never meet.

        Raises:
            OSError: It is gone.
        """
        end = _socket()
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            notice = self.notices[rank]
            assert notice is not None, "ask reaches() before"
            end.connect(f"\0{notice['address']}")
            end.send(_HELLO.pack(self._rank, epoch))
        except OSError:
            end.close()
            raise
        return end

    def answer(self, rank: int, epoch: int, check: Callable[[], None]) -> socket.socket:
        """Waits for another rank's call.

        Args:
            rank: The other rank.
            epoch: Calls from earlier epochs are forgotten.
            check: Is asked every now and then; raises if there is no use in waiting.

        Raises:
            OSError: The other rank's process has ended.
        """
        for caller in [caller for caller in self._called if caller[1] < epoch]:
            self._called.pop(caller).close()
        while (rank, epoch) not in self._called:
            if select.select([self._listener], [], [], _ASK_SECONDS)[0]:
                self._let_in()
                continue
            self._look_after(rank)
            check()
        return self._called.pop((rank, epoch))

    def __del__(self) -> None:
        for end in (self._listener, *self._called.values(), *self._watched.values()):
            end.close()

    def condition(self, rank: int) -> str:
        """What has become of the process of another rank of this machine; "" if it runs."""
        try:
            self._look_after(rank)
            credentials = self._watched[rank].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            process = _CREDENTIALS.unpack(credentials)[0]
        except OSError:
            return "its process has ended without a word: it was killed, or it ended early"
        try:  # the state comes after the name, which is in brackets
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
        return f"its process ({process}) is stopped" if state in "Tt" else ""

    def _look_after(self, rank: int) -> None:
        """Keeps a connection on which nothing is sent: it tells when the other process ends."""
        if rank not in self._watched:
            self._watched[rank] = self.call(rank)
        if select.select([self._watched[rank]], [], [], 0)[0] and not self._watched[rank].recv(1):
            raise ConnectionResetError(f"rank {rank} has ended")

    def _let_in(self) -> None:
        end, _ = self._listener.accept()
        _sockets.add(end)
        credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.getuid():
            end.close()
            return
        try:
            end.settimeout(_HELLO_SECONDS)
            caller = _HELLO.unpack(end.recv(_HELLO.size))
            end.settimeout(None)
        except (OSError, struct.error):
            end.close()
            return
        self._called[caller] = end


def open_door(group: dist.ProcessGroup, *, wanted: bool = True) -> Door | None:
    """Opens this rank's door and learns where the others' are. Every rank of the group calls it.

    Args:
        group: Moves CPU tensors.
        wanted: Whether this rank wants one.

    Returns:
        None if this rank has no door.
    """
    if group.size() == 1 or "fake" in dist.get_backend_config(group):
        return None
    door = _open(group.rank()) if wanted else None
    notices = gather_json(None if door is None else door.notice, group)
    if door is not None:
        door.notices = notices
    return door


def _open(rank: int) -> Door | None:
    if not (hasattr(socket, "SO_PEERCRED") and hasattr(os, "memfd_create")):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "user")]
        return Door(rank, f"{boot} {namespaces} {os.getuid()}")
    except OSError:  # not allowed here
        return None


def _socket() -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _sockets.add(end)
    return end


def _close_all() -> None:
    """A forked child (a data loader's worker) must not hold a rank's connections open after the rank has died."""
    for end in list(_sockets):
        end.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
