"""Values that do not change between micro-batches travel once a step, and only those."""

import copy
import weakref

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, on_every_rank, plain_loop, run_step, stage_inputs
from torch import nn

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.message import Kind, flatten
from torchdistpackage.schedule import build

MASK = 100_000  # numbers: a message that has them is easy to tell from one that has not


class Edge:
    """Both ends of an edge, and the length of every frame that was sent on it."""

    def __init__(self):
        self.a, self.b = loopback(2)
        self.lengths = []
        outlet = self.a.outlet(1)
        outlet._slots, outlet._bulk = self._noted(outlet._slots), self._noted(outlet._bulk)

    def _noted(self, move):
        def noting(buffer):
            self.lengths.append(buffer.numel())
            return move(buffer)

        return noting

    def step(self, messages, training=True):
        """Sends them, and gives back what arrives and the frames' lengths."""
        for transport in (self.a, self.b):
            transport.begin_step("s", training=training)
        arrived, self.lengths = [], []
        for number, tree in enumerate(messages):
            tree = tree() if callable(tree) else tree
            self.a.outlet(1).send(Kind.FORWARD, 0, number, 8, *flatten(tree))
            message = self.b.inlet(0).take(Kind.FORWARD, 0, number)
            arrived.append(message.layout.tree(message.tensors))
        for transport in (self.a, self.b):
            transport.finish_step(None, None)
        return arrived, sum(length > MASK for length in self.lengths)


def test_a_shared_mask_travels_once_a_step():
    edge, mask = Edge(), torch.randn(MASK)
    for times in (2, 1, 1):  # the first step has to learn that it repeats
        arrived, long = edge.step([(torch.full((4,), float(i)), mask) for i in range(5)])
        assert long == times
        for i, (hidden, received) in enumerate(arrived):
            assert torch.equal(hidden, torch.full((4,), float(i)))
            assert torch.equal(received, mask)
        assert len({id(received) for _, received in arrived[1:]}) == 1


def test_it_is_one_message_for_each_micro_batch_in_the_steady_state():
    edge, mask = Edge(), torch.randn(MASK)
    for _ in range(3):
        edge.step([{"h": torch.randn(4), "mask": mask, "note": "x"} for _ in range(5)])
    assert len(edge.lengths) == 5


@pytest.mark.parametrize("change", ["in place", "through data", "through numpy", "another object"])
def test_a_changed_value_travels_again(change):
    edge, mask = Edge(), torch.zeros(MASK)

    def change_it():
        nonlocal mask
        if change == "in place":
            mask.add_(1)
        elif change == "through data":
            mask.data.add_(1)
        elif change == "through numpy":
            mask.numpy()[:] += 1
        else:
            mask = mask + 1
        return torch.zeros(4), mask

    for _ in range(2):
        edge.step([lambda: (torch.zeros(4), mask)] * 3)
    arrived, _ = edge.step([lambda: (torch.zeros(4), mask)] * 2 + [change_it] * 2)
    assert [received[7].item() for _, received in arrived] == [0.0, 0.0, 1.0, 2.0]


def test_a_tensor_that_wants_a_gradient_always_travels():
    edge, table = Edge(), torch.randn(MASK, requires_grad=True)
    for _ in range(3):
        assert edge.step([(torch.zeros(4), table)] * 4)[1] == 4


def test_values_that_are_new_each_time_are_not_held():
    edge, alive = Edge(), []

    def make():
        tensor = torch.randn(MASK)
        alive.append(weakref.ref(tensor))
        return torch.zeros(4), tensor

    for _ in range(2):
        arrived, long = edge.step([make] * 4)
        assert long == 4
    del arrived
    assert not any(reference() is not None for reference in alive)


def test_nothing_is_kept_between_steps():
    edge = Edge()
    mask = torch.randn(MASK)
    arrived, _ = edge.step([(torch.zeros(4), mask)] * 3)
    received, sent = weakref.ref(arrived[2][1]), weakref.ref(mask)
    del arrived, mask
    assert received() is None
    assert sent() is None


def test_inference_tensors_travel():
    edge = Edge()
    with torch.inference_mode():
        mask = torch.randn(MASK)
        for _ in range(2):
            arrived, long = edge.step([(torch.zeros(4), mask)] * 3, training=False)
            assert long == 3
    assert all(torch.equal(received, mask) for _, received in arrived)


def test_a_mask_goes_through_three_stages_and_the_gradients_are_the_plain_loops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    reference = copy.deepcopy(model)
    mask = (torch.arange(6) % 2).float()
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    functions = [
        lambda x: (model[0](x) * mask, mask),
        lambda xs: (model[1](xs[0]) * xs[1], xs[1]),
        lambda xs: mse(model[2](xs[0]) * xs[1], xs[2]),
    ]
    results = run_step(build("1f1b", 3, 4), functions, stage_inputs(3, x, y), steps=1)
    assert not any(isinstance(result, Exception) for result in results)
    plain = lambda x: reference[2](reference[1](reference[0](x) * mask) * mask) * mask  # noqa: E731
    plain_loop(plain, x, y, 4)
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "gpipe"])
def test_an_output_is_freed_when_it_has_been_sent(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    alive = [[], []]

    def forward(stage):
        def fwd_fn(x):
            assert not any(reference() is not None for reference in alive[stage])
            output = model[stage](x if stage == 0 else x[0])
            if stage == 0:
                alive[stage].append(weakref.ref(output))
            return output if stage == 0 else mse(output, x[1])

        return fwd_fn

    x = torch.randn(8, 4)
    for result in run_step(build(name, 2, 4), [forward(0), forward(1)], [x, x]):
        assert not isinstance(result, Exception), result
    assert len(alive[0]) == 4


def test_an_output_that_the_user_keeps_stays_as_it_is():
    held = []
    w = torch.ones(3, requires_grad=True)

    def first(x):
        held.append(x * w)
        return held[-1]

    def rank_step(rank, transport):
        work = ChunkWork(first, inputs=torch.arange(6.0).view(2, 3)) if rank == 0 else ChunkWork(lambda h: h.sum())
        Executor(build("1f1b", 2, 2), transport).run([work])

    assert on_every_rank(2, rank_step) == [None, None]
    assert [tensor.tolist() for tensor in held] == [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]


def test_a_stage_may_end_in_a_custom_function_or_return_a_parameter():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    w, v = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    functions = [lambda x: (Double.apply(x * w), v), lambda xs: (xs[0] * xs[1]).sum()]
    for result in run_step(build("1f1b", 2, 2), functions, [torch.ones(2, 3), None], mean=False):
        assert not isinstance(result, Exception), result
    assert w.grad.tolist() == [4.0] * 3
    assert v.grad.tolist() == [4.0] * 3


def test_a_value_that_repeats_keeps_its_place_when_leaves_before_it_change_their_type():
    edge = Edge()
    mask, other, more = torch.ones(2), torch.full((2,), 3.0), torch.zeros(2)
    edge.step([(None, mask)] * 2)
    arrived, _ = edge.step([(None, mask), (more, other), (more, other), (None, other)])
    assert [tree[1].tolist() for tree in arrived] == [[1.0, 1.0]] + [[3.0, 3.0]] * 3


@pytest.mark.parametrize("values", [[0.0, -0.0, 0.0], [complex(0.0, -0.0), 0j], [float("nan"), 1.0, float("nan")]])
def test_constants_keep_their_sign_and_their_kind(values):
    arrived, _ = Edge().step([(torch.ones(1), value) for value in values])
    assert [repr(tree[1]) for tree in arrived] == [repr(value) for value in values]


def test_a_value_that_repeats_must_not_be_changed_by_who_gets_it():
    edge, mask = Edge(), torch.randn(MASK)
    edge.step([(torch.ones(4), mask) for _ in range(3)])
    for transport in (edge.a, edge.b):
        transport.begin_step("s", training=True)
    for number in range(2):
        edge.a.outlet(1).send(Kind.FORWARD, 0, number, 8, *flatten((torch.ones(4), mask)))
    hidden, received = edge.b.inlet(0).take(Kind.FORWARD, 0, 0).tensors
    hidden.add_(1)  # what does not repeat is the receiver's own
    received.add_(1)
    with pytest.raises(PipelineError, match="value that stage 0 sends with every micro-batch.* change a clone"):
        edge.b.inlet(0).take(Kind.FORWARD, 0, 1)


def test_what_came_in_the_same_frame_may_be_changed():
    edge, mask = Edge(), torch.randn(MASK)
    for _ in range(2):
        for transport in (edge.a, edge.b):
            transport.begin_step("s", training=True)
        for number in range(3):
            edge.a.outlet(1).send(Kind.FORWARD, 0, number, 8, *flatten((torch.ones(4), mask)))
            hidden, received = edge.b.inlet(0).take(Kind.FORWARD, 0, number).tensors
            hidden.add_(1)
            assert torch.equal(received, mask)
        for transport in (edge.a, edge.b):
            transport.finish_step(None, None)


def test_a_repeating_value_that_gives_way_to_another_is_forgotten():
    """A tensor that comes later may get the address of the first one, and has versions of its own."""
    edge, mask = Edge(), torch.zeros(MASK)
    edge.step([(torch.ones(4), mask) for _ in range(3)])
    for transport in (edge.a, edge.b):
        transport.begin_step("s", training=True)
    inlet, held = edge.b.inlet(0), []
    for number in range(8):
        if number % 3 == 1:
            mask.add_(1)  # each value is sent three times: the second time it is kept, in place of the last
        edge.a.outlet(1).send(Kind.FORWARD, 0, number, 8, *flatten((torch.ones(4), mask)))
        hidden, received = inlet.take(Kind.FORWARD, 0, number).tensors
        hidden.add_(1)
        assert torch.equal(received, mask)
        held.append(received)
    assert len({id(received) for received in held}) > 1
    assert set(inlet._versions) <= {id(kept) for places in inlet._kept.values() for kept in places.values()}
