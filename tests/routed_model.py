"""A model whose stages send values past each other: as a plain module, and as the function of each stage."""

import torch
from torch import nn

from torchdistpackage.schedule import Routed

mse = nn.functional.mse_loss
WIDTH = 5


def star(count):
    """Stage 0 to all stages further on, and stage 1 to the last one."""
    skips = {(0, to) for to in range(2, count)} | ({(1, count - 1)} if count > 3 else set())
    return tuple(sorted(skips))


class Model(nn.Module):
    """A chain of layers; what a layer makes goes to every user in the table, from the first one together with a mask.

    `layer(s, h, far)` is one stage: `far` holds, in the order of their stages, the values that came past the neighbour.
    """

    def __init__(self, count, dtype=torch.float64, table=None):
        super().__init__()
        torch.manual_seed(count)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(count))
        self.count, self.table = count, star(count) if table is None else table

    def layer(self, s, h, far):
        for value in far:
            h = h + value.sin() if value.is_floating_point() else h * value
        return torch.tanh(self.layers[s](h))

    def forward(self, x):
        mask, made = (x > 0), []
        h = x
        for s in range(self.count):
            far = [value for maker, user in self.table if user == s for value in self.given(maker, made[maker], mask)]
            h = self.layer(s, h, far)
            made.append(h)
        return h

    def given(self, maker, h, mask):
        return (h, mask) if maker == 0 else (h,)

    def functions(self, evaluation=False):
        """fwd_fn of every stage."""
        return [self._function(s, evaluation) for s in range(self.count)]

    def _function(self, s, evaluation):
        last = s == self.count - 1
        many = sum(2 if maker == 0 else 1 for maker, user in self.table if user == s)

        def fwd_fn(arguments):
            arguments = arguments if isinstance(arguments, list) else [arguments]
            far, h = arguments[:many], arguments[many]
            mask = h > 0
            h = self.layer(s, h, far)
            if last:
                return h if evaluation else mse(h, arguments[many + 1])
            values = {to: self.given(s, h, mask) for maker, to in self.table if maker == s}
            return Routed({s + 1: (h,), **values}, self.table)

        return fwd_fn
