import pytest
import torch

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime import outlet
from torchdistpackage.runtime.loopback import LoopbackTransport, loopback
from torchdistpackage.runtime.message import Kind


class Counter:
    """Counts what an outlet gives to its streams, and passes it on."""

    def __init__(self, outlet):
        self.sizes, self._outlet = [], outlet
        outlet._slots, outlet._bulk = self._counted(outlet._slots, False), self._counted(outlet._bulk, True)

    def _counted(self, move, bulk):
        def counting(buffer):
            self.sizes.append((buffer.numel(), bulk))
            return move(buffer)

        return counting

    def take(self):
        sizes, self.sizes = self.sizes, []
        return sizes


def step(a, b, tensors, signature="s", training=True):
    for transport in (a, b):
        transport.begin_step(signature, training=training)
    for number, tensor in enumerate(tensors):
        b.inlet(0).post()
        a.outlet(1).send(Kind.FORWARD, 0, number, 8, [tensor], None)
        assert torch.equal(b.inlet(0).take(Kind.FORWARD, 0, number).tensors[0], tensor)
    for transport in (a, b):
        transport.finish_step(None, None)


def test_the_steady_state_is_one_message_and_no_metadata():
    a, b = loopback(2)
    step(a, b, [torch.randn(1000, 4) for _ in range(3)])
    counter = Counter(a.outlet(1))
    step(a, b, [torch.randn(1000, 4) for _ in range(3)])
    assert counter.take() == [(16064, False)] * 3


def test_switching_between_training_and_evaluation_costs_nothing():
    a, b = loopback(2)
    for signature, training in (("train", True), ("eval", False), ("train", True)):
        step(a, b, [torch.randn(8, 4)], signature, training)
    counter = Counter(a.outlet(1))
    for signature, training in (("eval", False), ("train", True), ("eval", False)):
        step(a, b, [torch.randn(8, 4)], signature, training)
    assert counter.take() == [(192, False)] * 3


def test_a_new_layout_spills_once_and_fits_from_the_next_step():
    a, b = loopback(2)
    step(a, b, [torch.randn(2000)])
    counter = Counter(a.outlet(1))
    step(a, b, [torch.randn(2000), torch.randn(9000), torch.randn(3), torch.randn(9000).double()])
    first = counter.take()
    step(a, b, [torch.randn(9000), torch.randn(2000), torch.randn(9000).double(), torch.randn(3)])
    assert [bulk for _, bulk in first].count(True) == 6  # description and frame of three new layouts
    assert [bulk for _, bulk in counter.take()] == [False] * 4


def test_frames_are_used_again():
    a, b = loopback(2)
    pointers = set()
    for _ in range(6):
        counter = Counter(a.outlet(1))
        step(a, b, [torch.randn(100) for _ in range(4)])
        pointers |= {
            known.spare[0].buffer.data_ptr() for ks in a.outlet(1)._known.values() for known in ks if known.spare
        }
        assert len(counter.take()) >= 4
    spare = sum(len(known.spare) for known_list in a.outlet(1)._known.values() for known in known_list)
    assert spare <= 8


def test_layout_numbers_start_again_before_the_table_grows_for_ever():
    a, b = loopback(2)
    lengths = range(1, outlet.MAX_LAYOUTS + 20)
    step(a, b, [torch.zeros(length) for length in lengths])
    step(a, b, [torch.zeros(length) for length in lengths])
    assert len(b.inlet(0)._layouts) <= outlet.MAX_LAYOUTS


def test_messages_may_be_taken_in_another_order_than_sent():
    a, b = loopback(2)
    for transport in (a, b):
        transport.begin_step("s", training=True)
    for number in range(3):
        a.outlet(1).send(Kind.FORWARD, 0, number, 8, [torch.tensor(number)], None)
    assert [int(b.inlet(0).take(Kind.FORWARD, 0, number).tensors[0]) for number in (2, 0, 1)] == [2, 0, 1]


def test_ranks_that_run_different_plans_are_told_both():
    a, b = loopback(2)
    a.begin_step("schedule '1f1b', 4 micro-batches", training=True)
    b.begin_step("schedule 'gpipe', 8 micro-batches", training=True)
    a.outlet(1).send(Kind.FORWARD, 0, 0, 8, [torch.ones(1)], None)
    with pytest.raises(
        PipelineError,
        match="rank 1 of the pipeline runs schedule 'gpipe', 8 .* rank 0 of the pipeline runs schedule '1f1b', 4",
    ):
        b.inlet(0).take(Kind.FORWARD, 0, 0)


def test_transports_are_final():
    assert LoopbackTransport.__final__
