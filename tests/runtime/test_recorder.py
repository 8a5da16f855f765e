"""What a recorder notes of a step: who waited, computed and sent, and what a stage holds and sends on."""

from itertools import pairwise

import torch
from loopback_pipeline import mse, on_every_rank, stage_functions, stage_inputs
from torch import nn

from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.schedule import Op, build


def recorded(name, *, memory=False):
    """A recorder for each of two ranks, after one step of four rows in two micro-batches."""
    plan = build(name, 2, 2)
    functions = stage_functions([nn.Linear(3, 5), nn.Linear(5, 2)], mse)
    inputs = stage_inputs(2, torch.randn(4, 3), torch.randn(4, 2))

    def rank_step(rank, transport):
        recorder = Recorder(torch.device("cpu"), memory=memory)
        Executor(plan, transport).run([ChunkWork(functions[rank], inputs=inputs[rank])], recorder=recorder)
        return recorder

    return plan, on_every_rank(2, rank_step)


def test_every_compute_action_has_its_span_in_order():
    plan, recorders = recorded("zb-h1")
    for row, recorder in zip(plan.actions, recorders, strict=True):
        spans = recorder.spans()
        assert [span.action for span in spans if span.action.op.is_compute] == [a for a in row if a.op.is_compute]
        assert all(span.start <= span.end for span in spans)
        assert all(before.end <= after.start for before, after in pairwise(spans))


def test_waiting_and_sending_are_spans_of_their_own():
    first, last = (recorder.spans() for recorder in recorded("1f1b")[1])
    assert {span.action.op for span in first if not span.action.op.is_compute} == {
        *(Op.SEND_F, Op.RECV_B, Op.REDUCE_GRAD)
    }
    assert [str(span.action) for span in last if span.action.op is Op.RECV_F] == ["1RECV_F0", "1RECV_F1"]
    assert [str(span.action) for span in last if span.action.op is Op.SEND_B] == ["1SEND_B0", "1SEND_B1"]


def test_bytes_are_those_of_one_micro_batch():
    first, last = recorded("1f1b", memory=True)[1]
    row = 4  # bytes of a float
    assert (first.message_bytes, last.message_bytes) == ({0: 2 * 5 * row}, {})
    assert first.activation_bytes == {0: 2 * 3 * row}  # two rows of the input, whatever the batch has
    arrived, targets, output = 64 + 64, 2 * 2 * row, 2 * 2 * row  # a message has a header and is padded
    assert last.activation_bytes == {1: arrived + targets + output}
