"""What stages hand to each other in real models, and what other runtimes trip over."""

import copy

import pytest
import torch
from loopback_pipeline import assert_same_gradients, mse, on_every_rank, plain_loop, run_step, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage.errors import PipelineError, TransportError
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.schedule import build, names


def step_of(functions, inputs, m=2, plan=None, **options):
    results = run_step(plan or build("1f1b", len(functions), m), functions, inputs, **options)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, PipelineError):
            raise result
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("name", names())
def test_two_tensors_and_a_value_used_two_stages_later(name):
    torch.manual_seed(0)
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(6, 4)
    plan = build(name, 3, 3)
    functions = [tuple] * plan.placement.num_stages  # hands on what it gets
    functions[0] = lambda x: (a(x), x.relu() * a.bias)
    functions[1] = lambda xs: (b(xs[0]), xs[1])
    functions[-1] = lambda xs: (c(xs[0]) * xs[1]).mean()
    step_of(functions, [x, *[None] * (len(functions) - 1)], plan=plan)
    mine = [p.grad.clone() for layer in (a, b, c) for p in layer.parameters()]
    for layer in (a, b, c):
        layer.zero_grad()
    (c(b(a(x))) * (x.relu() * a.bias)).mean().backward()
    theirs = [p.grad for layer in (a, b, c) for p in layer.parameters()]
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(mine, theirs, strict=True))


def test_a_dict_is_one_entry_and_a_tuple_is_spread():
    seen = []
    step_of(
        [
            lambda x: {"h": x * w, "k": 3},
            lambda d: (d["h"], d["k"], None),
            lambda xs: (seen.append(xs[1:]), xs[0].sum())[1],
        ],
        [torch.ones(2, 1), None, None],
    )
    assert seen == [[3, None], [3, None]]


w = torch.ones(1, requires_grad=True)


def test_an_in_place_operation_may_begin_a_stage():
    stages = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    reference = copy.deepcopy(stages)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    train("1f1b", stages, x, y, 2)
    plain_loop(reference, x, y, 2)
    assert_same_gradients(stages, reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    stages = nn.Sequential(nn.Linear(4, 4), Checkpointed(), nn.Linear(4, 4))
    reference = copy.deepcopy(stages)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    train("1f1b", stages, x, y, 2)
    plain_loop(reference, x, y, 2)
    assert_same_gradients(stages, reference)


def test_integer_ids_and_masks_travel_and_index_downstream():
    emb = nn.Embedding(7, 3)
    ids = torch.randint(0, 7, (4, 5))
    step_of(
        [lambda i: (i, i > 3, w * 1.0), lambda xs: (emb(xs[0]) * xs[1][..., None]).sum() + xs[2].sum()], [ids, None]
    )
    mine = emb.weight.grad.clone()
    emb.zero_grad()
    ((emb(ids) * (ids > 3)[..., None]).sum() / 2).backward()
    assert torch.allclose(mine, emb.weight.grad)


def test_a_view_as_output():
    a, b = nn.Linear(4, 6), nn.Linear(3, 1)
    x = torch.randn(4, 4)
    step_of([lambda x: a(x)[:, ::2], lambda h: b(h).mean()], [x, None])
    mine = a.weight.grad.clone()
    a.zero_grad()
    b(a(x)[:, ::2]).mean().backward()
    assert torch.allclose(mine, a.weight.grad, atol=1e-7)


def test_a_frozen_first_stage_expects_no_gradient():
    a, b = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1)
    step_of([a, lambda h: b(h).mean()], [torch.randn(4, 4), None])
    assert a.weight.grad is None
    assert b.weight.grad is not None


def test_a_frozen_middle_stage_passes_gradients_on():
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1)
    step_of([a, b, lambda h: c(h).mean()], [torch.randn(4, 4), None, None])
    assert a.weight.grad is not None
    assert b.weight.grad is None


def test_a_stage_without_parameters():
    a = nn.Linear(4, 4)
    step_of([a, nn.ReLU(), lambda h: h.mean()], [torch.randn(4, 4), None, None])
    assert a.weight.grad is not None


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_that_detaches_its_input_is_an_error_not_zero_gradients(stage):
    layers = [nn.Linear(4, 4) for _ in range(3)]
    functions = [layers[0], layers[1], lambda h: layers[2](h).mean()]
    functions[stage] = (lambda h: layers[1](h.detach())) if stage == 1 else (lambda h: layers[2](h.detach()).mean())
    with pytest.raises(PipelineError, match="Does the stage detach its input|Does it detach its input"):
        step_of(functions, [torch.randn(4, 4), None, None])


def test_the_loss_must_be_a_scalar_that_requires_grad():
    a = nn.Linear(4, 4)
    with pytest.raises(
        PipelineError, match=r"must return the loss, a scalar tensor; it returned a tensor of shape \(2, 4\)"
    ):
        step_of([a, lambda h: h * 2], [torch.randn(4, 4), None])
    with pytest.raises(PipelineError, match="it returned a tuple. Append what else you want to log to a list of yours"):
        step_of([a, lambda h: (h.mean(), h.detach())], [torch.randn(4, 4), None])
    with pytest.raises(PipelineError, match="the loss does not require a gradient"):
        step_of([a, lambda h: h.detach().mean()], [torch.randn(4, 4), None])


def test_a_custom_backward_gets_the_weighted_loss_and_the_output_gradient():
    calls = []

    def bwd_fn(output, gradient):
        calls.append((output.dim(), None if gradient is None else tuple(gradient.shape)))
        output.backward(gradient)

    a, b = nn.Linear(4, 4), nn.Linear(4, 1)
    x = torch.randn(6, 4)
    functions = [a, lambda h: b(h).mean()]

    def rank_step(rank, transport):
        return Executor(build("1f1b", 2, 2), transport).run([ChunkWork(functions[rank], bwd_fn, [x, None][rank])])

    on_every_rank(2, rank_step)
    mine = a.weight.grad.clone()
    a.zero_grad()
    b(a(x)).mean().backward()
    assert torch.allclose(mine, a.weight.grad)
    assert sorted(calls, key=str) == [(0, None), (0, None), (2, (3, 4)), (2, (3, 4))]


def test_shapes_that_differ_between_microbatches():
    """A sequence length per micro-batch: layouts change at every message."""
    a = nn.Linear(4, 4)
    lengths = iter([3, 9, 2, 5])
    step_of([lambda x: a(x)[:, : next(lengths)], lambda h: h.mean()], [torch.randn(4, 10, 4), None], m=4)
    assert a.weight.grad is not None


def test_a_larger_and_a_smaller_batch_on_later_steps():
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    reference = copy.deepcopy(stages)
    batches = [(torch.randn(n, 4), torch.randn(n, 4)) for n in (8, 32, 3, 1, 64)]
    plan = build("1f1b", 3, 4)

    def rank_steps(rank, transport):
        executor = Executor(plan, transport)
        for x, y in batches:
            own = x if rank == 0 else y if rank == 2 else None
            function = (lambda xs: mse(stages[2](xs[0]), xs[1])) if rank == 2 else stages[rank]
            executor.run([ChunkWork(function, inputs=own)])

    assert on_every_rank(3, rank_steps) == [None] * 3
    for x, y in batches:
        plain_loop(reference, x, y, 4)
    assert_same_gradients(stages, reference)


def test_evaluation_under_inference_mode_before_training():
    stages = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x, y = torch.randn(6, 4), torch.randn(6, 4)

    def rank_steps(rank, transport):
        evaluation = Executor(build("1f1b", 2, 3, forward_only=True), transport)
        training = Executor(build("1f1b", 2, 3), transport)
        for _ in range(3):
            with torch.inference_mode():
                evaluation.run([ChunkWork(stages[rank], inputs=[x, None][rank])])
            loss = (lambda xs: mse(stages[1](xs[0]), xs[1])) if rank == 1 else stages[0]
            training.run([ChunkWork(loss, inputs=[x, y][rank])])

    assert on_every_rank(2, rank_steps) == [None, None]
    assert stages[0].weight.grad is not None


def test_an_unsupported_output_is_named_and_both_ranks_raise():
    a = nn.Linear(4, 4)
    results = run_step(build("1f1b", 2, 2), [lambda x: (a(x), {1, 2}), lambda h: h.mean()], [torch.randn(4, 4), None])
    assert isinstance(results[0], TransportError)
    assert "set, which cannot travel" in str(results[0])
    assert isinstance(results[1], PipelineError)
    assert "set, which cannot travel" in str(results[1])
