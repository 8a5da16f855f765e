"""Tensor-parallel blocks in training: pipelines, optimizers, norms, `fully_shard` and checkpoints, as dense ones."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_harness import run_distributed
from distributed_pipeline import mse
from tensor_comparison import assert_equal_steps, assert_same_parameters, dense_like, drawn, near, setup
from torch import nn
from torch.distributed.fsdp import fully_shard

from torchdistpackage import forward_backward, partition_chunks, tpc
from torchdistpackage.parallel.tensor_parallel.attn import Attention, TpAttention
from torchdistpackage.parallel.tensor_parallel.regions import (
    gather_from_sequence_parallel_region,
    maybe_split_into_sequence_parallel,
)
from torchdistpackage.parallel.tensor_parallel.transformer import Block, ParallelBlock
from torchdistpackage.schedule import describe, names


class Stages:
    """This rank's stages of a stack of blocks under a schedule, for whole inputs, outputs and losses."""

    def __init__(self, dense, schedule, sequence):
        self.schedule, self.sequence = schedule, sequence
        self.parts = partition_chunks(list(dense), schedule)
        self.stages = {s: nn.Sequential(*map(self.parallel, part)) for s, part in self.parts.items()}
        facts = describe(schedule)
        self.first, self.last = 0, facts.place(tpc.get_pp_size(), facts.chunks).num_stages - 1

    def parallel(self, dense):
        block = ParallelBlock(8, 2, 2, self.sequence).double()
        block.init_from_full(dense)
        return block

    def forward(self, s):
        def fwd_fn(arguments):
            x = arguments[0] if s == self.last else arguments
            if s == self.first and self.sequence:
                x = maybe_split_into_sequence_parallel(x)
            out = self.stages[s](x)
            if s == self.last:
                out = gather_from_sequence_parallel_region(out, False) if self.sequence else out
                return mse(out, arguments[1])
            return out

        return fwd_fn

    def step(self, x, y, m):
        functions = [self.forward(s) for s in self.stages]
        inputs = [x if s == self.first else [y] if s == self.last else None for s in self.stages]
        if len(functions) == 1:
            functions, inputs = functions[0], inputs[0]
        return forward_backward(None, functions, None, inputs, m, schedule=self.schedule, broadcast_loss=True)

    def assert_same(self, what, within):
        for s, stage in self.stages.items():
            assert_same_parameters(stage, self.parts[s], what, within)


def pipelines(rank, world, schedules):
    setup(2, pipe=2)
    x, y = drawn(3, 4, 8), drawn(3, 4, 8, seed=3)
    cases = [(s, *case) for s in schedules for case in ((False, 1), (True, 3))]
    for schedule, sequence, m in [*cases, ("zb-h1", False, 3), ("zb-v", False, 3), ("zb-v", True, 1)]:
        what, dense = f"{schedule}, {sequence}, {m}", nn.Sequential(*[dense_like(Block, 8, 2, 2) for _ in range(4)])
        chunks = Stages(dense, schedule, sequence)
        ours = torch.optim.AdamW([p for stage in chunks.stages.values() for p in stage.parameters()])
        theirs = torch.optim.AdamW(dense.parameters())
        for _ in range(2):
            whole, own = x.clone().requires_grad_(), x.clone().requires_grad_()
            ours.zero_grad()
            theirs.zero_grad()
            wanted = mse(dense(whole), y)
            wanted.backward()
            assert near(chunks.step(own, y, m), wanted), what
            chunks.assert_same(lambda p: p.grad, near)
            assert 0 not in chunks.stages or near(own.grad, whole.grad), what
            ours.step()
            theirs.step()
            chunks.assert_same(lambda p: p, near)


def test_every_schedule():
    run_distributed(pipelines, 4, names(), timeout=150)


def training(rank, world):
    setup(world)
    close = partial(torch.allclose, atol=1e-6)  # torch 2.6 adds its 1e-6 to the norm of each shard
    kinds = [
        partial(torch.optim.AdamW, foreach=True),
        partial(torch.optim.AdamW, foreach=False),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ]
    for sequence, kind in [(s, k) for s in (False, True) for k in kinds]:
        dense = dense_like(Block, 8, 2, 2)
        block = ParallelBlock(8, 2, 2, sequence).double()
        block.init_from_full(dense)
        ours, theirs, dim = kind(block.parameters()), kind(dense.parameters()), -2 if sequence else None
        for step in range(3):
            assert_equal_steps(dense, block, drawn(2, 4, 8, seed=step), dim, dim, within=close)
            norm = nn.utils.clip_grad_norm_(block.parameters(), 0.1).full_tensor()
            assert close(norm, nn.utils.clip_grad_norm_(dense.parameters(), 0.1))
            assert_same_parameters(block, dense, lambda p: p.grad, close)
            ours.step()
            theirs.step()
            assert_same_parameters(block, dense, within=close)
            if step != 1:  # gradients of two steps add up
                ours.zero_grad()
                theirs.zero_grad()


def test_optimizers_and_norms():
    run_distributed(training, 2)


def sharded(rank, world):
    setup(2)
    dense, x = dense_like(Block, 8, 2, 2), drawn(2, 2, 4, 8)
    block = ParallelBlock(8, 2, 2, True).double()
    fully_shard(block, mesh=tpc.mesh["data"])
    block.init_from_full(dense)  # also when it is sharded already
    assert_same_parameters(block, dense, within=torch.equal)
    (dense(x.flatten(0, 1)) ** 2).mean().backward()
    own = block(maybe_split_into_sequence_parallel(x[tpc.get_dp_rank()]))
    (gather_from_sequence_parallel_region(own, False) ** 2).mean().backward()
    assert_same_parameters(block, dense, lambda p: p.grad)
    norms = [nn.utils.clip_grad_norm_(module.parameters(), 0.1) for module in (block, dense)]
    assert near(norms[0].full_tensor(), norms[1])
    for module in (block, dense):
        torch.optim.AdamW(module.parameters()).step()
    assert_same_parameters(block, dense)


@pytest.mark.skipif(torch.__version__ < "2.8", reason="this torch's fully_shard needs an accelerator")
def test_fully_sharded_blocks():
    run_distributed(sharded, 4)


def checkpoints(rank, world, folder):
    setup(2)
    dense = dense_like(Attention, 8, 4, True)
    everyone = dist.new_group(range(world))
    for first, second in ((None, everyone), (everyone, None)):
        saved, loaded = (TpAttention(8, 4, True, tp_group=group).double() for group in (first, second))
        saved.init_from_full(dense)
        path = f"{folder}/{saved.mesh.size()}"
        dcp.save(saved.state_dict(), checkpoint_id=path)
        dcp.load(loaded.state_dict(), checkpoint_id=path)
        assert_same_parameters(loaded, dense, within=torch.equal)


def test_a_checkpoint_of_two_ranks_on_four_and_back(tmp_path):
    run_distributed(checkpoints, 4, str(tmp_path))
