"""1F1B written by hand over isend and irecv: what a step costs if nothing is general.

These loops know the model (one tensor in, one out, its shape and dtype), check nothing and could not report a failure.
They differ in when they wait: "at once" pairs each send with the receive that follows it, as most runtimes do; "late"
waits for sends at the end of the step; "ahead" also posts every receive of the step at its beginning. "none" sends
nothing and takes what lies at hand: the computation alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

mse = nn.functional.mse_loss


class _Messages:
    """The four calls that a 1F1B loop needs."""

    def __init__(self, group: dist.ProcessGroup, like: Tensor, when: str, m: int) -> None:
        self.group, self.like, self.when, self.m = group, like, when, m
        self.rank, self.last = group.rank(), group.size() - 1

    def begin(self) -> None:
        self.sent, self.posted = [], {}
        if self.when == "ahead":
            for peer in (self.rank - 1, self.rank + 1):
                if 0 <= peer <= self.last:
                    self.posted[peer] = [self._post(peer) for _ in range(self.m)][::-1]

    def receive(self, peer: int) -> Tensor:
        if self.when == "none":
            return self.like.clone()
        buffer, work = self.posted[peer].pop() if self.posted else self._post(peer)
        work.wait()
        return buffer

    def send(self, tensor: Tensor, peer: int) -> None:
        if self.when != "none":
            self.sent.append((self.group.send([tensor], peer, 0), tensor))

    def send_and_receive(self, tensor: Tensor, peer: int) -> Tensor:
        if self.when != "at once":
            self.send(tensor, peer)
            return self.receive(peer)
        buffer = torch.empty_like(self.like)
        ops = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer)]
        ops.append(dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer))
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return buffer

    def end(self) -> None:
        for work, _ in self.sent:
            work.wait()

    def _post(self, peer: int) -> tuple[Tensor, dist.Work]:
        buffer = torch.empty_like(self.like)
        return buffer, self.group.recv([buffer], peer, 0)


def bare_step(when: str) -> Callable[..., Callable[[], None]]:
    """Makes one training step of that kind."""

    def make(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], None]:
        group = dist.group.WORLD
        rank, size = group.rank(), group.size()
        own, targets = x.chunk(m), y.chunk(m)
        messages = _Messages(group, torch.zeros_like(own[0]), when, m)
        first, last = rank == 0, rank == size - 1

        def forward(i: int, received: Tensor | None) -> tuple[Tensor | None, Tensor]:
            leaf = None if received is None else received.requires_grad_()
            output = stage(own[i] if leaf is None else leaf)
            return leaf, mse(output, targets[i]) / m if last else output

        def backward(saved: tuple[Tensor | None, Tensor], gradient: Tensor | None) -> Tensor | None:
            torch.autograd.backward(saved[1], gradient)
            return None if saved[0] is None else saved[0].grad

        def step() -> None:
            messages.begin()
            saved = []
            warm_up = min(m, size - 1 - rank)
            for i in range(warm_up):
                saved.append(forward(i, None if first else messages.receive(rank - 1)))
                messages.send(saved[-1][1].detach(), rank + 1)
            received = None if first or warm_up == m else messages.receive(rank - 1)
            for i in range(warm_up, m):
                saved.append(forward(i, received))
                gradient = None if last else messages.send_and_receive(saved[-1][1].detach(), rank + 1)
                back = backward(saved.pop(0), gradient)
                if back is not None and i < m - 1:
                    received = messages.send_and_receive(back, rank - 1)
                elif back is not None:
                    messages.send(back, rank - 1)
            for _ in range(warm_up):
                back = backward(saved.pop(0), messages.receive(rank + 1))
                if back is not None:
                    messages.send(back, rank - 1)
            messages.end()

        return step

    return make
