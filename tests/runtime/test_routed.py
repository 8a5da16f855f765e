"""Values that are used on several stages: the model with skips is the plain model, whatever the schedule."""

import copy
import gc
import itertools
import random
import weakref

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, on_every_rank, run_step, stage_inputs
from routed_model import WIDTH, Model, star
from torch import nn

from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.message import Kind
from torchdistpackage.runtime.microbatch import microbatch_sizes, weighted_sum
from torchdistpackage.runtime.program import compile_program
from torchdistpackage.schedule import Action, Op, Routed, build, names


def plain_loop(model, x, y, m):
    losses, weights = [], []
    sizes = [size for size in microbatch_sizes(len(x), m) if size]
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = mse(model(a), b)
        (loss * (len(a) / len(x))).backward()
        losses.append(loss)
        weights.append(len(a) / len(x))
    return weighted_sum(losses, weights)


def checked(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def train(plan, model, x, y, **options):
    results = checked(run_step(plan, model.functions(), stage_inputs(model.count, x, y), **options))
    last = results[plan.placement.loss_rank]
    return weighted_sum(last.outputs, last.weights)


def batch(rows, dtype=torch.float64):
    return torch.randn(rows, WIDTH, dtype=dtype), torch.randn(rows, WIDTH, dtype=dtype)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_training_is_the_plain_loop_bitwise(name, p):
    for m in sorted({1, 2, p, 2 * p + 1}):
        plan = build(name, p, m)
        for rows in sorted({1, m, 2 * m + 1, 7}):
            model = Model(plan.placement.num_stages)
            reference, (x, y) = copy.deepcopy(model), batch(rows)
            assert torch.equal(train(plan, model, x, y), plain_loop(reference, x, y, m))
            assert_same_gradients(model, reference)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("seed", range(4))
def test_any_table(name, seed):
    draw = random.Random(seed)
    plan = build(name, draw.randint(2, 4), draw.randint(1, 6))
    count = plan.placement.num_stages
    pairs = [pair for pair in itertools.combinations(range(count), 2) if pair[1] > pair[0] + 1]
    model = Model(count, table=tuple(pair for pair in pairs if draw.random() < 0.4))
    reference, (x, y) = copy.deepcopy(model), batch(draw.randint(1, 12))
    train(plan, model, x, y, steps=2)
    for _ in range(2):
        plain_loop(reference, x, y, plan.num_microbatches)
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("name", names())
def test_a_plan_that_knows_its_skips_is_the_same(name):
    plain = build(name, 3, 5)
    model = Model(plain.placement.num_stages)
    plan = plain.with_skips(star(model.count))
    reference, (x, y) = copy.deepcopy(model), batch(12)
    train(plan, model, x, y, steps=2)
    for _ in range(2):
        plain_loop(reference, x, y, 5)
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("name", names())
def test_evaluation_returns_every_row(name):
    for m in (1, 4, 10):
        plan = build(name, 3, m, forward_only=True)
        model, (x, _) = Model(plan.placement.num_stages), batch(9)
        with torch.no_grad():
            results = checked(run_step(plan, model.functions(True), stage_inputs(model.count, x)))
            assert torch.allclose(results[plan.placement.loss_rank].merged, model(x))


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-v", "zb-h1"])
def test_batches_of_changing_size(name):
    plan, sizes = build(name, 2, 4), [8, 3, 9, 1, 8]
    model = Model(plan.placement.num_stages)
    reference, batches = copy.deepcopy(model), [batch(size) for size in sizes]

    def steps(rank, transport):
        executor = Executor(plan, transport)
        for x, y in batches:
            inputs, functions = stage_inputs(model.count, x, y), model.functions()
            executor.run([ChunkWork(functions[s], inputs=inputs[s]) for s in plan.placement.local_stages(rank)])
        return executor.plan.skips

    assert set(checked(on_every_rank(2, steps))) == {star(model.count)}
    for x, y in batches:
        plain_loop(reference, x, y, 4)
    assert_same_gradients(model, reference)


def learnt(name, p, m, functions, inputs, steps=3, **options):
    """Each rank's executor and transport after some steps."""

    def rank_steps(rank, transport):
        executor = Executor(build(name, p, m, **options), transport)
        for _ in range(steps):
            chunks = executor.plan.placement.local_stages(rank)
            executor.run([ChunkWork(functions[s], inputs=inputs[s]) for s in chunks])
        return executor

    return checked(on_every_rank(p, rank_steps))


def test_frames_of_skips_are_used_again_within_a_step_once_the_table_is_learnt():
    m, model = 32, Model(4)
    executors = learnt("1f1b", 4, m, model.functions(), stage_inputs(4, *batch(2 * m)))
    proved = [key for at in executors[0]._program.instructions for _, key in at.proves]
    assert {(Kind.SKIP, 0 * 4 + to, i) for to in (2, 3) for i in range(m)} <= set(proved)
    proved = [key for at in executors[3]._program.instructions for _, key in at.proves]
    assert {(Kind.SKIP, 3 * 4 + 0, i) for i in range(m - 4)} <= set(proved)


def ancestors(plan, action):
    """All that must have run before an action: what stands before it, and the neighbours' results it waits for."""
    rows = [[a for a in row if a.op.is_compute] for row in plan.actions]
    place = {a: (rank, index) for rank, row in enumerate(rows) for index, a in enumerate(row)}
    found, stack = set(), [action]
    while stack:
        stage, op, i = at = stack.pop()
        rank, index = place[at]
        others = [Action(stage - 1, op, i)] if op is Op.FORWARD else []
        if op in (Op.BACKWARD, Op.INPUT_GRAD):
            others = [Action(stage + 1, half, i) for half in (Op.BACKWARD, Op.INPUT_GRAD)]
        for other in (*rows[rank][index - 1 : index], *others):
            if other in place and other not in found:
                found.add(other)
                stack.append(other)
    return found


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("evaluation", [False, True])
def test_what_an_arrival_proves_has_been_taken(name, evaluation):
    plan = build(name, 3, 4, forward_only=evaluation)
    count = plan.placement.num_stages
    plan = plan.with_skips((a, b) for a, b in itertools.combinations(range(count), 2) if b > a + 1)
    skips = 0
    for rank in range(3):
        for at in compile_program(plan, rank, 0).instructions:
            past = (
                {(a.stage, a.microbatch, a.op is Op.FORWARD) for a in ancestors(plan, at.action)} if at.proves else ()
            )
            for peer, (kind, number, i) in at.proves:
                maker, user = divmod(number, count) if kind == Kind.SKIP else (number, number + (-1) ** kind)
                assert plan.placement.owner(user) == peer
                assert (user, i, maker < user) in past
                skips += kind == Kind.SKIP
    assert skips > 0 or evaluation


def test_what_a_model_needs_no_more_is_forgotten():
    """The same executors run a model with skips, one without, and one with others."""
    plan, model = build("1f1b", 3, 3), Model(3)
    (x, y), chain = batch(6), nn.Sequential(*[nn.Linear(WIDTH, WIDTH).double() for _ in range(3)])
    plain = [chain[0], chain[1], lambda ins: mse(chain[2](ins[0]), ins[1])]
    reference = copy.deepcopy(model)

    def steps(rank, transport):
        executor, seen = Executor(plan, transport), []
        for functions in (model.functions(), plain, model.functions(), plain):
            executor.run([ChunkWork(functions[rank], inputs=stage_inputs(3, x, y)[rank])])
            seen.append(executor.plan.skips)
        return seen

    assert checked(on_every_rank(3, steps)) == [[((0, 2),), (), ((0, 2),), ()]] * 3
    for _ in range(2):
        plain_loop(reference, x, y, 3)
    assert_same_gradients(model, reference)


def test_one_tensor_for_neighbour_and_far_stages_is_summed_as_in_the_plain_loop():
    torch.manual_seed(0)
    w, x = [torch.randn(WIDTH, requires_grad=True) for _ in range(4)], torch.randn(6, WIDTH)
    table = ((0, 2), (0, 3))
    functions = [
        lambda x: (h := x * w[0]) is None or Routed({1: (h,), 2: (h,), 3: (h, h.detach(), "text")}, table),
        lambda h: Routed({2: ((h * w[1]).exp(),)}, table),
        lambda ins: Routed({3: [ins[0] * w[2] * ins[1]]}, table),
        lambda ins: (ins[3] * w[3] * ins[0] - ins[1]).square().mean() if ins[2] == "text" else None,
    ]
    checked(run_step(build("zb-h1", 4, 3), functions, stage_inputs(4, x)))
    found = [v.grad.clone() for v in w]
    for v in w:
        v.grad = None
    for part in x.split(2):
        h = part * w[0]
        made = (h * w[1]).exp()
        last = h * w[2] * made
        ((last * w[3] * h - h.detach()).square().mean() / 3).backward()
    assert all(torch.equal(mine, v.grad) for mine, v in zip(found, w, strict=True))


def test_a_custom_backward_gets_gradients_by_destination():
    seen, plan = [], build("interleaved-1f1b", 2, 2)
    w = torch.ones(3, requires_grad=True)

    def backward(output, gradients):
        seen.append({to: [gradient.tolist() for gradient in each] for to, each in gradients.items()})
        torch.autograd.backward(
            [h for to in gradients for h in output.values[to][:1]], [g for [g] in gradients.values()]
        )

    functions = [
        lambda x: (h := x * w) is None or Routed({1: (h,), 3: (h, h > 0)}, ((0, 3),)),
        lambda h: Routed({2: (h * 2,)}, ((0, 3),)),
        lambda h: Routed({3: (h * 3,)}, ((0, 3),)),
        lambda ins: (ins[2] + 10 * ins[0]).sum(),
    ]

    def step(rank, transport):
        work = [
            ChunkWork(functions[s], backward if s == 0 else None, torch.ones(2, 3) if s == 0 else None)
            for s in plan.placement.local_stages(rank)
        ]
        return Executor(plan, transport).run(work, mean=False)

    checked(on_every_rank(2, step))
    assert seen == [{3: [[[10.0] * 3]], 1: [[[6.0] * 3]]}] * 2
    assert w.grad.tolist() == [32.0] * 3


def test_a_stage_that_gets_nothing_from_its_neighbour():
    w, table = torch.ones(3, requires_grad=True), ((0, 2),)
    functions = [
        lambda x: Routed({2: (x * w,)}, table),
        lambda nothing: Routed({}, table) if nothing == [] else None,
        lambda h: h.square().sum(),
    ]
    for name in ("1f1b", "zb-h1"):
        checked(run_step(build(name, 3, 2), functions, stage_inputs(3, torch.ones(2, 3)), mean=False))
        assert w.grad.tolist() == [4.0] * 3
        w.grad = None


def test_a_stage_on_one_way_may_return_nothing_that_can_be_trained():
    """The index of the largest entry has no gradient: the plain model trains over the other way."""
    w, table = torch.randn(3, requires_grad=True), ((0, 2),)
    functions = [
        lambda x: (h := x * w) is None or Routed({1: (h,), 2: (h,)}, table),
        lambda h: Routed({2: (h.argmax(1),)}, table),
        lambda ins: (ins[0].sum(1) * ins[1]).mean(),
    ]
    for name in ("1f1b", "zb-h1"):
        x = torch.randn(4, 3)
        checked(run_step(build(name, 3, 2), functions, stage_inputs(3, x)))
        expected = torch.autograd.grad(((x * w).sum(1) * (x * w).argmax(1)).mean(), w)[0]
        assert torch.allclose(w.grad, expected)
        w.grad = None


def test_wire_dtype_and_recorder():
    from torchdistpackage.runtime.recorder import Recorder

    model, plan = Model(4, torch.float32), build("1f1b", 4, 2)
    reference, (x, y) = copy.deepcopy(model), batch(4, torch.float32)
    recorder = Recorder(torch.device("cpu"))
    train(plan, model, x, y, wire_dtype=torch.bfloat16)
    plain_loop(reference, x, y, 2)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=0.03)
    one = build("interleaved-1f1b", 1, 2, chunks=3)
    train(one, Model(3), *batch(4), recorder=recorder)
    assert {str(span.action) for span in recorder.spans()} >= {"0F0", "1F0", "2F0", "2B1", "0B1"}


def test_a_scaled_loss_scales_every_gradient():
    plan, model = build("interleaved-1f1b", 2, 3), Model(4)
    reference, (x, y) = copy.deepcopy(model), batch(6)
    functions, inputs = model.functions(), stage_inputs(4, x, y)

    def step(rank, transport):
        mine = plan.placement.local_stages(rank)
        work = [ChunkWork(functions[s], inputs=inputs[s], scale=lambda loss: loss * 1024) for s in mine]
        return Executor(plan, transport).run(work)

    checked(on_every_rank(2, step))
    plain_loop(reference, x, y, 3)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine.grad / 1024, theirs.grad)


def test_a_mask_goes_to_a_far_stage_once_a_step():
    mask, table, m, length = torch.randn(400) > 0, ((0, 2),), 8, []

    def count(transport):
        real = transport.sender

        def sender(receiver, *, bulk=False):
            send = real(receiver, bulk=bulk)
            return lambda buffer: (length.append(buffer.numel()) if receiver == 2 else None, send(buffer))[1]

        transport.sender = sender

    functions = [
        lambda x: Routed({1: (x,), 2: (mask,)}, table),
        lambda x: Routed({2: (x,)}, table),
        lambda ins: ins[1].sum() + ins[0].sum() * 0.0,
    ]

    def steps(rank, transport):
        if rank == 0:
            count(transport)
        executor = Executor(build("1f1b", 3, m, forward_only=True), transport)
        for _ in range(3):
            length.clear() if rank == 0 else None
            executor.run([ChunkWork(functions[rank], inputs=torch.ones(m, 1) if rank == 0 else None)])

    checked(on_every_rank(3, steps))
    assert sum(size > 400 for size in length) == 1


def test_nothing_is_left_behind():
    plan, model, alive = build("interleaved-1f1b", 2, 5), Model(4), []

    def watch(function):
        def forward(arguments):
            output = function(arguments)
            tensors = [output] if isinstance(output, torch.Tensor) else itertools.chain(*output.values.values())
            alive.extend(map(weakref.ref, tensors))
            return output

        return forward

    functions, inputs = [watch(function) for function in model.functions()], stage_inputs(4, *batch(10))
    executors = learnt("interleaved-1f1b", 2, 5, functions, inputs, steps=2)
    gc.collect()
    assert len(alive) == 10 * (2 + 2 * 2 + 2 + 1 + 1) - 10
    assert not any(reference() is not None for reference in alive)
    assert not any(e._skips.sent or e._skips.received or e._mail._local for e in executors)
    assert plan.placement.num_ranks == 2
