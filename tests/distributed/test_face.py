"""The public API over gloo with real processes: what users call, against the plain loop on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchdistpackage import (
    DDP,
    PipelineError,
    ScheduleError,
    TopologyError,
    clip_grad_norm_,
    forward_backward,
    forward_eval,
    partition_uniform,
    setup_distributed,
    tie_parameters,
    tpc,
)
from torchdistpackage.schedule import names

mse = nn.functional.mse_loss


def start(pipe, **more):
    setup_distributed(backend="gloo")
    config = [("data", dist.get_world_size() // pipe), ("pipe", pipe)]
    tpc.setup_process_groups(more.get("config", config))
    torch.manual_seed(0)


def make_layers(count=4, width=6):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]).double()


def own_inputs(x, y):
    if tpc.get_pp_size() == 1:
        return [x, y]
    return x if tpc.is_first_in_pipeline_group() else [y] if tpc.is_last_in_pipeline_group() else None


def loss_step(stage):
    def fwd_fn(arguments):
        if tpc.is_last_in_pipeline_group():
            return mse(stage(arguments[0]), arguments[1])
        return stage(arguments)

    return fwd_fn


def close(parameters, others):
    return all(torch.allclose(p.grad, q.grad) for p, q in zip(parameters, others, strict=True))


def train_everywhere(rank, world, pipe):
    start(pipe)
    reference = make_layers()
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=pipe, stage=tpc.get_pp_rank()))
    for name in names():
        for rows, m in ((8, 4), (10, 4), (3, 4), (32, 2)):
            x, y = torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
            reference.zero_grad()
            stage.zero_grad()
            whole = mse(reference(x), y)
            whole.backward()
            fwd_fn = loss_step(stage)
            loss = forward_backward(
                fwd_fn=fwd_fn, inputs=own_inputs(x, y), num_microbatches=m, schedule=name, broadcast_loss=True
            )
            assert torch.allclose(loss, whole.detach())
            assert close(stage.parameters(), part.parameters())
            out = forward_backward(
                None, stage, None, x if tpc.is_first_in_pipeline_group() else [], num_microbatches=m, forward_only=True
            )
            if tpc.is_last_in_pipeline_group():
                assert torch.allclose(out, reference(x))
                assert not out.requires_grad
            else:
                assert out is None


@pytest.mark.parametrize("pipe", [1, 2, 3, 4])
def test_training_and_evaluation_of_any_batch(pipe):
    run_distributed(train_everywhere, pipe, pipe)


def data_parallel_steps(rank, world, m, options):
    start(pipe=2)
    d, r = tpc.get_dp_size(), tpc.get_dp_rank()
    reference = make_layers()
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=2, stage=tpc.get_pp_rank()))
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    wrapped = DDP(stage, **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    for _ in range(3):
        x, y = torch.randn(d, 5, 6).double(), torch.randn(d, 5, 6).double()
        reference.zero_grad()
        for j in range(d):
            (mse(reference(x[j]), y[j]) / d).backward()
        forward_backward(optimizer, loss_step(wrapped), None, own_inputs(x[r], y[r]), num_microbatches=m)
        assert close(stage.parameters(), part.parameters())
        norm = clip_grad_norm_(wrapped.parameters(), 0.1)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        assert close(stage.parameters(), part.parameters())
        out = forward_backward(None, wrapped, None, x[r] if tpc.is_first_in_pipeline_group() else [], 4, True)
        assert out is None or torch.allclose(out, reference(x[r]))
    assert wrapped.require_backward_grad_sync


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_ddp_is_reduced_once_and_equals_the_full_batch(m, options):
    run_distributed(data_parallel_steps, 4, m, options)


def count_reductions(rank, world):
    start(pipe=1)
    model = DistributedDataParallel(nn.Linear(4, 4), process_group=tpc.get_group("data"))
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    for _ in range(3):
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
    with model.no_sync():
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4)
    forward_backward(
        fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=4, data_parallel=model
    )
    return len(calls)


def test_one_reduction_a_step_and_none_under_no_sync():
    assert run_distributed(count_reductions, 2) == [4, 4]


def unused_in_the_last_microbatch(rank, world):
    """A parameter that only some micro-batches use is reduced all the same."""
    start(pipe=1)
    net = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)]).double()
    reference = copy.deepcopy(net)

    class Chooser(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, which):
            return self.net[which](x).mean()

    model = DDP(Chooser(), find_unused_parameters=True)
    x = torch.randn(2, 8, 4).double()
    for _ in range(2):
        order = iter([0, 1, 1, 0])
        net.zero_grad()
        forward_backward(fwd_fn=lambda a, order=order: model(a, next(order)), inputs=x[rank], num_microbatches=4)
    for j in range(2):
        for part, which in zip(x[j].split(2), [0, 1, 1, 0], strict=True):
            (reference[which](part).mean() / 8).backward()
    assert close(net.parameters(), reference.parameters())


def test_find_unused_parameters_over_microbatches():
    run_distributed(unused_in_the_last_microbatch, 2)


def static_graph(rank, world):
    start(pipe=1)
    model = DDP(nn.Linear(4, 4), static_graph=True)
    forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=1)
    with pytest.raises(PipelineError, match="static_graph=True"):
        forward_backward(fwd_fn=lambda x: model(x).mean(), inputs=torch.randn(8, 4), num_microbatches=2)
    assert model.require_backward_grad_sync


def test_static_graph_is_refused_in_words():
    run_distributed(static_graph, 2)


def stages_without_parameters(rank, world):
    start(pipe=2)
    linear = nn.Linear(4, 4)
    stage = DDP(linear if tpc.is_first_in_pipeline_group() else nn.ReLU())
    last = tpc.is_last_in_pipeline_group()
    x = torch.randn(2, 8, 4)
    forward_backward(
        fwd_fn=lambda a: stage(a).mean() if last else stage(a), inputs=None if last else x[tpc.get_dp_rank()]
    )
    norm = clip_grad_norm_(stage.parameters(), 1e9)
    reference = copy.deepcopy(linear)
    reference.zero_grad()
    reference(x.flatten(0, 1)).relu().mean().backward()
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 1e9))


def test_a_stage_without_parameters_takes_part():
    run_distributed(stages_without_parameters, 4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle[1](self.middle[0](self.embedding(ids))))


def tied_weights(rank, world, pipe, by_hand):
    start(pipe)
    model = Tied().double()
    reference = copy.deepcopy(model)
    if by_hand:
        cut = copy.deepcopy([model.embedding, *model.middle, nn.Linear(4, 7, bias=False).double()])
        stage = nn.Sequential(*partition_uniform(cut))
        ends = {0: cut[0].weight, pipe - 1: cut[-1].weight}
        tie_parameters("embedding", ends.get(tpc.get_pp_rank()))
    else:
        stage = nn.Sequential(*partition_uniform([model.embedding, *model.middle, model.head]))
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.1)
    other = torch.optim.Adam(reference.parameters(), lr=0.1)
    ce = nn.functional.cross_entropy
    last = tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        return ce(stage(a[0]), a[1]) if last else stage(a)

    for _ in range(3):
        ids, targets = torch.randint(0, 7, (8,)), torch.randint(0, 7, (8,))
        optimizer.zero_grad()
        other.zero_grad()
        for _ in range(2):  # gradients accumulate over two calls
            loss = forward_backward(None, fwd_fn, None, own_inputs(ids, targets), num_microbatches=3)
            whole = ce(reference(ids), targets)
            whole.backward()
        assert loss is None or torch.allclose(loss, whole.detach())
        norm = clip_grad_norm_(stage.parameters(), 0.5)
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
        optimizer.step()
        other.step()
    weights = {0: reference.embedding.weight, pipe - 1: reference.embedding.weight}
    if tpc.get_pp_rank() in weights:
        mine = next(p for p in stage.parameters() if p.shape == (7, 4))
        assert torch.allclose(mine, weights[tpc.get_pp_rank()])


@pytest.mark.parametrize("pipe", [2, 3])
@pytest.mark.parametrize("by_hand", [False, True])
def test_tied_weights_are_one_parameter(pipe, by_hand):
    run_distributed(tied_weights, pipe, pipe, by_hand)


def tensor_group_transfer(rank, world):
    start(pipe=2, config=[("pipe", 2), ("tensor", 2)])
    reference = make_layers(2)
    stage = copy.deepcopy(reference[tpc.get_pp_rank()])
    for rows in (8, 5):
        x, y = torch.randn(rows, 6).double(), torch.randn(rows, 6).double()
        stage.zero_grad()
        reference.zero_grad()
        for _ in range(2):
            forward_backward(
                fwd_fn=loss_step(stage), inputs=own_inputs(x, y), num_microbatches=3, scatter_gather_tensors=True
            )
            mse(reference(x), y).backward()
        assert close(stage.parameters(), reference[tpc.get_pp_rank()].parameters())


def test_scatter_gather_over_the_tensor_group_is_exact():
    run_distributed(tensor_group_transfer, 4)


def wrong_use(rank, world):
    setup_distributed(backend="gloo")
    layer, x = nn.Linear(4, 4), torch.randn(4, 4)
    with pytest.raises(TopologyError, match="setup_process_groups"):
        forward_backward(fwd_fn=layer, inputs=x)
    tpc.setup_process_groups([("pipe", world)])
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        return layer(a[0] if isinstance(a, list) else a).mean() if last else layer(a)

    own = x if first else None
    with pytest.raises(ScheduleError, match="at least 1, got 0"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=0)
    with pytest.raises(ScheduleError, match="known schedules: 1f1b, gpipe"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, schedule="zigzag")
    with pytest.raises(PipelineError, match="loss_reduction must be"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, loss_reduction="median")
    with pytest.raises(PipelineError, match="fwd_fn is missing"):
        forward_backward(inputs=own)
    for wrong in (None, [], [3]):
        with pytest.raises(PipelineError, match="the first stage got no input"):
            forward_backward(fwd_fn=fwd_fn, inputs=wrong if first else None, num_microbatches=2)
    with pytest.raises(PipelineError, match="4 rows on the first stage"):
        forward_backward(fwd_fn=fwd_fn, inputs=x if first else torch.randn(3, 4) if last else None)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=2 if first else 4)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=4, schedule="gpipe" if last else "1f1b")
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=4, forward_only=not last)
    with pytest.raises(PipelineError, match="ranks disagree about the step"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, loss_reduction="sum" if last else "mean")
    with pytest.raises((PipelineError, ScheduleError), match="zigzag"):
        forward_backward(fwd_fn=fwd_fn, inputs=own, schedule="zigzag" if last else "1f1b")
    layer.zero_grad()
    forward_backward(fwd_fn=fwd_fn, inputs=own, num_microbatches=2)  # after all of that the next step works
    assert layer.weight.grad is not None


@pytest.mark.parametrize("world", [2, 3])
def test_wrong_use_is_one_clear_error_on_every_rank_and_loses_nothing(world):
    run_distributed(wrong_use, world, timeout=40)


def a_rank_that_leaves(rank, world):
    start(pipe=3)
    if rank == 1:
        return None
    layer = nn.Linear(4, 4)
    x = torch.randn(4, 4)
    with pytest.raises(PipelineError):
        forward_backward(
            fwd_fn=lambda a: layer(a[0]).mean() if rank == 2 else layer(a), inputs=x if rank == 0 else None
        )
    return "raised"


def one_process(rank, world):
    tpc.setup_process_groups([("data", 1), ("pipe", 1)]) if dist.is_initialized() else start(pipe=1)
    net = nn.Linear(4, 1)
    x = torch.randn(7, 4)
    loss = forward_backward(fwd_fn=lambda a: net(a).mean(), inputs=x, num_microbatches=3)
    assert torch.allclose(loss, net(x).mean())
    assert torch.allclose(forward_eval(net, x), net(x))
    assert torch.allclose(forward_eval(net, x, num_microbatches=3), net(x))


def test_one_process_needs_no_partner():
    run_distributed(one_process, 1)


def autocast_step(rank, world):
    start(pipe=2)
    net = make_layers(2).float()[tpc.get_pp_rank()]
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    last = tpc.is_last_in_pipeline_group()

    def fwd_fn(a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mse(net(a[0]).float(), a[1]) if last else net(a)

    loss = forward_backward(None, fwd_fn, None, own_inputs(x, y), num_microbatches=4, dtype=torch.bfloat16)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert loss is None or loss.dtype == torch.float32


def test_autocast_and_a_dtype_on_the_wire():
    run_distributed(autocast_step, 2)


def one_replica(rank, world, options):
    start(pipe=2)
    reference = make_layers()
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=2, stage=tpc.get_pp_rank()))
    wrapped = DistributedDataParallel(stage, process_group=tpc.get_group("data"), **options)
    for _ in range(2):
        x, y = torch.randn(9, 6).double(), torch.randn(9, 6).double()
        reference.zero_grad()
        wrapped.zero_grad()
        mse(reference(x), y).backward()
        forward_backward(fwd_fn=loss_step(wrapped), inputs=own_inputs(x, y), num_microbatches=4)
        assert close(stage.parameters(), part.parameters())


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_a_wrapper_around_the_only_replica(options):
    run_distributed(one_replica, 2, options)


def eight_ranks(rank, world):
    start(pipe=4)
    reference = make_layers(5)
    stage = nn.Sequential(*partition_uniform(list(copy.deepcopy(reference))))
    part = nn.Sequential(*partition_uniform(list(reference), num_stages=4, stage=tpc.get_pp_rank()))
    wrapped = DDP(stage)
    x, y = torch.randn(2, 7, 6).double(), torch.randn(2, 7, 6).double()
    for j in range(2):
        (mse(reference(x[j]), y[j]) / 2).backward()
    d = tpc.get_dp_rank()
    forward_backward(fwd_fn=loss_step(wrapped), inputs=own_inputs(x[d], y[d]), num_microbatches=5)
    assert close(stage.parameters(), part.parameters())
    assert torch.allclose(
        clip_grad_norm_(wrapped.parameters(), 1e9), nn.utils.get_total_norm(reference_grads(reference))
    )


def reference_grads(model):
    return [p.grad for p in model.parameters()]


def test_four_stages_and_two_replicas():
    run_distributed(eight_ranks, 8)
