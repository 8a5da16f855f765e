"""A small mixture of experts, whole and spread over the ranks of an expert-parallel group."""

import copy

import torch
import torch.distributed as dist
from distributed_pipeline import mse
from torch import nn
from torch.distributed.nn.functional import all_to_all_single

from torchdistpackage import tpc
from torchdistpackage.parallel.moe_data_parallel import create_moe_dp_hooks
from torchdistpackage.parallel.naive_ddp import NaiveDDP

EXPERTS, WIDTH = 4, 6


class Mixture(nn.Module):
    """Sends every token to one expert; with a group, which holds the experts together, by all-to-all."""

    def __init__(self, group=None):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)])
        self.group = group

    def spread(self, group):
        """This rank's part of a whole mixture."""
        mine = copy.deepcopy(self)
        count, rank = EXPERTS // dist.get_world_size(group), dist.get_rank(group)
        mine.experts = mine.experts[rank * count : (rank + 1) * count]
        mine.group = group
        return mine

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        order = choice.argsort(stable=True)
        there = self.dispatched(x[order], choice[order])
        back = torch.empty_like(there).index_copy(0, order, there)
        return x + back * weight.unsqueeze(-1)

    def dispatched(self, x, choice):
        if self.group is None:
            return self.run(x, choice.bincount(minlength=EXPERTS).tolist())
        ranks = dist.get_world_size(self.group)
        counts = choice.bincount(minlength=EXPERTS).reshape(ranks, -1)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, got = counts.sum(1).tolist(), theirs.sum(1).tolist()
        came = all_to_all_single(x.new_empty(sum(got), WIDTH), x, got, sent, group=self.group)
        number = torch.arange(theirs.shape[1]).repeat(ranks).repeat_interleave(theirs.reshape(-1))
        order = number.argsort(stable=True)
        done = self.run(came[order], theirs.sum(0).tolist())
        done = torch.empty_like(done).index_copy(0, order, done)
        return all_to_all_single(torch.empty_like(x), done, sent, got, group=self.group)

    def run(self, x, counts):
        parts = zip(self.experts, x.split(counts), strict=True)
        return torch.cat([x[:0], *[expert(part) for expert, part in parts if len(part)]])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mixture = nn.Linear(WIDTH, WIDTH), Mixture()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.mixture(self.first(x).tanh()))


def spread(plain, op="sum", group=None, **options):
    """A replica of the model with this rank's experts, its wrapper, and what reduces the experts."""
    model = copy.deepcopy(plain)
    model.mixture = plain.mixture.spread(tpc.get_group("moe_ep"))
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    model._ddp_params_and_buffers_to_ignore = list(experts)
    before = [p.detach().clone() for p in experts.values()]
    wrapped = NaiveDDP(model, reduce_op=op)
    assert all(map(torch.equal, before, experts.values()))  # the other expert ranks' are others
    create_moe_dp_hooks(experts, group, tpc.get_ranks_in_group("moe_dp")[0], reduce_op=op, **options)
    return wrapped


def plain_step(plain, batches, targets, parts=1):
    for x, y in zip(batches, targets, strict=True):
        for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            (mse(plain(a), b) * len(a) / len(x) / len(batches)).backward()


def batch(iteration, replicas):
    """Of replica 1, all tokens are equal and go to one expert."""
    generator = torch.Generator().manual_seed(iteration)
    x = torch.randn(replicas, 8, WIDTH, generator=generator, dtype=torch.float64)
    x[1] = x[1, 0]
    return x if iteration != 2 else x[:, :1, :].expand(-1, 8, -1).clone()
