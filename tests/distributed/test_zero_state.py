"""Checkpoints of sharded optimizers: whole ones load anywhere, shards without communication, and no bit changes."""

import copy
import functools
import io

import pytest
import torch
from distributed_harness import run_distributed
from test_zero import Net, adafactor, adamw, data, momentum, own_gradients, plain_gradients, same_weights

from torchdistpackage import CheckpointError, PipelineError, setup_distributed
from torchdistpackage.parallel.zero import Bf16ZeroOptimizer


def saved(state):
    """As a file would give it back, without programs in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def whole(rank, world, make, options):
    """The whole state is the plain optimizer's, and goes on there."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    reference = Net()
    model = copy.deepcopy(reference)

    def groups(net):
        first = list(net.first.parameters())
        known = set(first)
        return [{"params": first, "lr": 0.02}, {"params": [p for p in net.parameters() if p not in known]}]

    plain, optimizer = make(groups(reference)), Bf16ZeroOptimizer(make(groups(model)), **options)
    for _ in range(3):
        batches = data(world)
        plain_gradients(reference, batches, world)
        own_gradients(model, optimizer, batches, rank)
        plain.step()
        optimizer.step()
    expected = plain.state_dict()
    assert optimizer.state_dict() == {} or rank == 0
    found = saved(optimizer.state_dict(to="all"))
    order = [id(p) for group in plain.param_groups for p in group["params"]]
    expected["state"].pop(order.index(id(reference.empty)), None)
    turned = order.index(id(reference.turned))
    sums_rows = "row_var" in found["state"][turned]  # Adafactor: over memory laid out otherwise, in another order
    if sums_rows:
        mine, theirs = found["state"][turned], expected["state"].pop(turned)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        expected["state"][turned] = mine
    assert equal(found, expected)
    fresh = make(groups(reference))
    fresh.load_state_dict(found)
    plain_gradients(reference, batches, world)
    own_gradients(model, optimizer, batches, rank)
    fresh.step()
    optimizer.step()
    if sums_rows:
        torch.testing.assert_close(model.turned, reference.turned, rtol=1e-6, atol=0)
        reference.turned.data.copy_(model.turned)
    assert same_weights(model, reference, exactly=True)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(adamw, {"bucket_size": 30}, id="adamw"),
        pytest.param(momentum, {"stage": 1}, id="momentum"),
        pytest.param(adamw, {"partition": "parameters"}, id="whole-parameters"),
        pytest.param(adafactor, {"partition": "parameters"}, id="adafactor"),
    ],
)
def test_the_whole_state_is_the_plain_optimizers(make, options):
    if make is None:
        pytest.skip("this torch has no Adafactor")
    run_distributed(whole, 2, make, options)


def first_half(rank, world, dtype, options):
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), **options)
    torch.manual_seed(1)
    trained(model, optimizer)
    return saved(model.state_dict()), saved(optimizer.state_dict())


def trained(model, optimizer):
    """The same batch on every rank: the number of ranks does not matter."""
    for _ in range(3):
        x, y = torch.randn(4, 6).to(next(model.parameters()).dtype), torch.randn(4, 3)
        optimizer.zero_grad()
        (model(x).float() - y).square().mean().backward()
        optimizer.step()


def second_half(rank, world, dtype, options, files, model_last):
    setup_distributed(backend="gloo")
    model = Net().to(dtype)
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters(), lr=0.5), **options)
    weights, state = files[0]
    steps = [lambda: model.load_state_dict(weights), lambda: optimizer.load_state_dict(state)]
    for step in reversed(steps) if model_last else steps:
        step()
    torch.manual_seed(2)
    trained(model, optimizer)
    return [p.detach().float() for p in model.parameters()], optimizer.state_dict(to="all")


def straight_through(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()))
    torch.manual_seed(1)
    trained(model, optimizer)
    torch.manual_seed(2)
    trained(model, optimizer)
    return [p.detach().float() for p in model.parameters()], optimizer.state_dict(to="all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "after", "model_last"), [(2, 4, True), (4, 1, False)])
def test_resumed_on_another_number_of_ranks(dtype, before, after, model_last):
    files = run_distributed(first_half, before, dtype, {})
    assert all(state == {} for _, state in files[1:])
    expected = straight_through(dtype)
    for found in run_distributed(second_half, after, dtype, {"bucket_size": 20}, files, model_last):
        assert equal(list(found), list(expected))


def shards(rank, world, options):
    """Saved and loaded without communication; another layout is refused with its numbers."""
    setup_distributed(backend="gloo")
    torch.manual_seed(0)
    model = Net().bfloat16()
    optimizer = Bf16ZeroOptimizer(adamw(model.parameters()), **options)
    torch.manual_seed(1)
    trained(model, optimizer)
    weights, shard = saved(model.state_dict()), saved(optimizer.state_dict_shard())
    torch.manual_seed(2)
    trained(model, optimizer)
    resumed = Net().bfloat16()
    again = Bf16ZeroOptimizer(adamw(resumed.parameters(), lr=0.5), **options)
    again.load_state_dict_shard(shard)
    resumed.load_state_dict(weights)
    torch.manual_seed(2)
    trained(resumed, again)
    assert same_weights(model, resumed, exactly=True)
    assert equal(optimizer.state_dict(to="all"), again.state_dict(to="all"))
    other = Bf16ZeroOptimizer(adamw(Net().bfloat16().parameters()), bucket_size=11)
    with pytest.raises(CheckpointError, match="another layout: .*buckets"):
        other.load_state_dict_shard(shard)
    shard["layout"]["ranks"] = 7
    with pytest.raises(CheckpointError, match=r"ranks 7 \(here 2\)"):
        again.load_state_dict_shard(shard)


@pytest.mark.parametrize("options", [{}, {"partition": "parameters", "bucket_size": 30}], ids=str)
def test_shards(options):
    run_distributed(shards, 2, options)


def test_an_optimizer_that_has_trained_is_wrapped():
    model = Net()
    other = copy.deepcopy(model)
    optimizer, plain = adamw(model.parameters()), adamw(other.parameters())
    for number in range(2):
        torch.manual_seed(number)
        trained(model, optimizer)
        torch.manual_seed(number)
        trained(other, plain)
        optimizer = optimizer if number else Bf16ZeroOptimizer(optimizer)
    assert same_weights(model, other, exactly=True)


def test_names_of_parameters_are_kept():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1))
    for one in (plain, optimizer):
        one.add_param_group({"params": other.named_parameters(), "lr": 0.2})
    assert equal(optimizer.state_dict(), plain.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_foreign_states_are_refused():
    optimizer = Bf16ZeroOptimizer(adamw(Net().parameters()))
    with pytest.raises(CheckpointError, match=r"it has the keys \[\]"):
        optimizer.load_state_dict({})
    with pytest.raises(CheckpointError, match=r"groups of \[1\] parameters, the optimizer of \[11\]"):
        optimizer.load_state_dict(adamw([torch.zeros(1)]).state_dict())
    with pytest.raises(PipelineError, match="'first' or 'all'"):
        optimizer.state_dict(to="last")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (lambda p: None, {}, "wraps an optimizer, got NoneType"),
        (adamw, {"stage": 3}, "fully_shard"),
        (adamw, {"bucket_size": 0}, "at least 1, got 0"),
        (adamw, {"partition": "rows"}, "'elements' or 'parameters'"),
        (adamw, {"reduce_dtype": torch.int8}, "floating torch.dtype"),
        (lambda p: Bf16ZeroOptimizer(adamw(p)), {}, "already"),
        (torch.optim.LBFGS, {}, "one direction from all parameters"),
        (torch.optim.SparseAdam, {"partition": "parameters"}, "sparse gradients"),
        (adafactor, {}, "partition='parameters'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(optimizer, options, message):
    if optimizer is None:
        pytest.skip("this torch has no Adafactor")
    with pytest.raises(PipelineError, match=message):
        Bf16ZeroOptimizer(optimizer(list(torch.nn.Linear(2, 2).parameters())), **options)


def test_parameters_that_cannot_be_sharded_are_refused():
    weight = torch.zeros(2, requires_grad=True)
    optimizer = Bf16ZeroOptimizer(functools.partial(torch.optim.SGD, lr=0.1)([weight]))
    with pytest.raises(PipelineError, match="parameters 0 and 1 of the optimizer are one tensor"):
        optimizer.add_param_group({"params": weight})
    with pytest.raises(PipelineError, match="parameter 1 of the optimizer is torch.complex64"):
        optimizer.add_param_group({"params": torch.zeros(2, dtype=torch.complex64, requires_grad=True)})
    layer = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Bf16ZeroOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(PipelineError, match="sparse=False"):
        optimizer.step()
