"""Ranks of one machine send past the network; ranks that have no door, and long or many messages."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from distributed_pipeline import close, loss_step, make_layers, mse, own_inputs, start
from torch import nn

from torchdistpackage import PipelineError, forward_backward, tpc
from torchdistpackage.parallel.pipeline_state import current_state
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.p2p import DistributedTransport
from torchdistpackage.schedule import build


def train_wide(rank, world, rows_of_steps):
    start(world)
    layers = make_layers(world, width=48)
    reference = copy.deepcopy(layers)
    torch.manual_seed(1)
    for rows in rows_of_steps:
        x, y = torch.randn(rows, 48).double(), torch.randn(rows, 48).double()
        loss = forward_backward(
            None, loss_step(layers[rank]), None, own_inputs(x, y), num_microbatches=4, broadcast_loss=True
        )
        whole = mse(reference(x), y)
        whole.backward()
        assert torch.allclose(loss, whole)
    assert close(layers[rank].parameters(), reference[rank].parameters())
    transport = current_state().transport
    segments = [len(link._segments) for link in transport._sending.values()]
    return sorted(transport._sending), segments


def test_long_messages_of_changing_length():
    """From below what goes inline to a megabyte, up and down, several lengths in a row and back."""
    results = run_distributed(train_wide, 3, [4, 40, 4000, 8, 900, 4000, 100, 7, 3, 2600, 2600, 4000, 5])
    assert [peers for peers, _ in results] == [[1], [0, 2], [1]]
    assert all(count <= 16 for _, counts in results for count in counts)


def far_ahead(rank, world):
    """The first rank makes a thousand messages before the second one looks at the first."""
    start(world)
    layer = nn.Linear(4, 4).double()
    calls = []

    def fwd_fn(x):
        calls.append(1)
        if len(calls) == (1000 if rank == 0 else 1):
            dist.barrier()
        return layer(x).mean() if rank else layer(x)

    executor = Executor(build("gpipe", 2, 1000), current_state().transport)
    executor.run([ChunkWork(fwd_fn, inputs=torch.randn(1000, 4).double() if rank == 0 else None)])
    return layer.weight.grad.abs().sum().item() > 0


def test_a_rank_may_be_a_thousand_messages_ahead():
    assert run_distributed(far_ahead, 2, timeout=60) == [True, True]


def mixed_doors(rank, world):
    """Rank 1 has no door, as if it were on another machine: its edges are gloo's, the others are links."""
    start(world)
    door = tpc.links.pipe.door
    door.notices = [notice if at != 1 else None for at, notice in enumerate(door.notices)]
    board = None if rank == 1 else door
    transport = DistributedTransport(tpc.get_control_group("pipe"), device=torch.device("cpu"), switchboard=board)
    layers = make_layers(world)
    reference = copy.deepcopy(layers)
    x, y = torch.randn(9, 6).double(), torch.randn(9, 6).double()
    executor = Executor(build("1f1b", world, 4), transport)
    for _ in range(3):
        executor.run([ChunkWork(loss_step(layers[rank]), inputs=own_inputs(x, y))])
        mse(reference(x), y).backward()
    assert close(layers[rank].parameters(), reference[rank].parameters())
    return sorted(transport._sending)


def test_links_and_gloo_in_one_pipeline():
    assert run_distributed(mixed_doors, 4) == [[], [], [3], [2]]


def count_messages(rank, world, same_host):
    start(world, same_host=same_host)
    layers = make_layers(world)
    x, y = torch.randn(16, 6).double(), torch.randn(16, 6).double()
    calls = []

    def step(forward_only):
        def fwd_fn(arguments):
            calls.append(1)
            return loss_step(layers[rank])(arguments)

        forward_backward(None, fwd_fn, None, own_inputs(x, y), num_microbatches=4, forward_only=forward_only)

    for forward_only in (False, True, False, True):
        step(forward_only)
    counts, sizes = [], []
    for outlet in current_state().transport._outlets.values():

        def noted(buffer, move=outlet._slots):
            sizes.append(buffer.numel())
            return move(buffer)

        def never(buffer):
            raise AssertionError("the steady state has no second message")

        outlet._slots, outlet._bulk = noted, never
    for forward_only in (True, False, False, True, False):
        calls.clear(), sizes.clear()
        step(forward_only)
        counts.append((len(calls), len(sizes)))
    return counts


@pytest.mark.parametrize("same_host", [True, False])
def test_switching_between_training_and_evaluation_costs_nothing(same_host):
    """No forward but one for each of the 4 micro-batches, one message for each, and the token of the step's end."""
    evaluation, training = [(4, 4), (4, 5), (4, 1)], [(4, 5), (4, 9), (4, 4)]
    for rank, counts in enumerate(run_distributed(count_messages, 3, same_host)):
        e, t = evaluation[rank], training[rank]
        assert counts == [e, t, t, e, t], rank


def fail_then_work(rank, world, same_host):
    start(world, same_host=same_host)
    layers = make_layers(world)
    reference = copy.deepcopy(layers)
    x, y = torch.randn(12, 6).double(), torch.randn(12, 6).double()
    said = []
    for bad in (0, 2, 1, 1):
        seen = []

        def fwd_fn(arguments, bad=bad, seen=seen):
            seen.append(1)
            if rank == bad and len(seen) == 2:
                raise ValueError(f"planted on {bad}")
            return loss_step(layers[rank])(arguments)

        try:
            forward_backward(None, fwd_fn, None, own_inputs(x, y), num_microbatches=4)
        except (PipelineError, ValueError) as error:
            said.append(f"planted on {bad}" in str(error))
        for parameter in layers.parameters():
            parameter.grad = None
        reference.zero_grad()
        forward_backward(None, loss_step(layers[rank]), None, own_inputs(x, y), num_microbatches=4)
        mse(reference(x), y).backward()
        assert close(layers[rank].parameters(), reference[rank].parameters())
    return said


@pytest.mark.parametrize("same_host", [True, False])
def test_failures_leave_nothing_behind(same_host):
    assert run_distributed(fail_then_work, 3, same_host) == [[True] * 4] * 3
