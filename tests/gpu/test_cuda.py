"""CUDA: loopback on one device, host-staged gloo with two ranks on one device, NCCL where there are two devices."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import traced_models as models
from distributed_harness import run_distributed
from fault_pipeline import outcome
from loopback_pipeline import assert_same_gradients, on_every_rank, plain_loop, stage_functions, stage_inputs
from torch import nn

from torchdistpackage import forward_backward, setup_distributed, tpc
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.recorder import Recorder
from torchdistpackage.schedule import build, names
from torchdistpackage.split import split

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
mse = nn.functional.mse_loss


@pytest.mark.parametrize("name", names())
def test_loopback_on_a_device(name):
    torch.manual_seed(0)
    plan = build(name, 3, 4)
    stages = nn.Sequential(*[nn.Linear(8, 8) for _ in plan.placement.owners]).cuda()
    reference = copy.deepcopy(stages)
    functions, device = stage_functions(stages), torch.device("cuda", 0)
    inputs = stage_inputs(len(stages), torch.randn(10, 8, device="cuda"), torch.randn(10, 8, device="cuda"))

    def rank_step(rank, transport):
        transport.device = device
        recorder = Recorder(device, memory=name == "1f1b")
        work = [ChunkWork(functions[s], inputs=inputs[s]) for s in plan.placement.local_stages(rank)]
        Executor(plan, transport).run(work, recorder=recorder)
        return recorder.spans()

    for rank, spans in enumerate(on_every_rank(3, rank_step)):
        computed = [span.action for span in spans if span.action.op.is_compute]
        assert computed == [action for action in plan.actions[rank] if action.op.is_compute]
        assert all(span.start <= span.end for span in spans)
    plain_loop(reference, inputs[0], inputs[-1], 4)
    assert_same_gradients(stages, reference)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_traced_model_on_a_device(num_stages):
    torch.manual_seed(0)
    model = models.UNet().cuda()
    reference = copy.deepcopy(model)
    x, y = torch.randn(10, 6, device="cuda"), torch.randn(10, 6, device="cuda")
    pipe = split(model, x[:3], num_stages)  # timed: the device is waited for
    stages = [pipe.get_stage_module(stage) for stage in range(num_stages)]
    plan = build("1f1b", num_stages, 4, skips=pipe.skips)

    def rank_step(rank, transport):
        def forward(received):
            return mse(stages[rank](received[:-1]), received[-1]) if rank == num_stages - 1 else stages[rank](received)

        transport.device = torch.device("cuda", 0)
        own = x if rank == 0 else y if rank == num_stages - 1 else None
        Executor(plan, transport).run([ChunkWork(forward, inputs=own)])

    assert not any(on_every_rank(num_stages, rank_step))
    plain_loop(reference, x, y, 4)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def steps(rank, world, backend):
    if backend == "gloo":
        torch.cuda.set_device(0)
    setup_distributed(backend=backend)
    tpc.setup_process_groups([("pipe", world)])
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(world)]).cuda()
    reference = copy.deepcopy(layers)
    stage, last = layers[tpc.get_pp_rank()], tpc.is_last_in_pipeline_group()
    for rows in (8, 10, 3):
        x, y = (torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)).cuda() for _ in range(2))
        layers.zero_grad()
        reference.zero_grad()
        inputs = x if tpc.is_first_in_pipeline_group() else [y] if last else None
        forward_backward(
            fwd_fn=lambda a: mse(stage(a[0]), a[1]) if last else stage(a), inputs=inputs, num_microbatches=4
        )
        mse(reference(x), y).backward()
        for p, q in zip(stage.parameters(), reference[tpc.get_pp_rank()].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.cuda.synchronize()
    dist.barrier()


def test_host_staged_gloo():
    run_distributed(steps, 2, "cpu:gloo,cuda:gloo")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl():
    run_distributed(steps, 2, "cpu:gloo,cuda:nccl")


@pytest.mark.skipif(not dist.is_nccl_available() or torch.cuda.nccl.version() < (2, 30), reason="needs NCCL 2.30")
def test_nccl_with_two_ranks_on_one_device():
    """An experiment of NCCL's; what it shows is that the edges work, not how fast."""
    env = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}
    run_distributed(steps, 2, "cpu:gloo,cuda:nccl", env=env)


def failing_steps(rank, world, backend):
    """A step in which rank 1 fails, and what comes of the next one."""
    if backend.endswith("gloo"):
        torch.cuda.set_device(0)
    setup_distributed(backend=backend)
    tpc.setup_process_groups([("pipe", world)])
    stage, last = nn.Linear(8, 8).cuda(), tpc.is_last_in_pipeline_group()
    x = torch.randn(8, 8, device="cuda") if tpc.is_first_in_pipeline_group() else None
    calls = []

    def fwd_fn(h):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise ValueError("planted")
        return stage(h).mean() if last else stage(h)

    def step():
        forward_backward(None, fwd_fn, None, x, 8)
        torch.cuda.synchronize()

    return outcome(step), outcome(step)


@pytest.mark.parametrize(
    "backend",
    [
        "cpu:gloo,cuda:gloo",
        pytest.param(
            "cpu:gloo,cuda:nccl",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ),
    ],
)
def test_an_error_is_named_by_every_rank(backend):
    for rank, (found, again) in enumerate(run_distributed(failing_steps, 2, backend)):
        assert found[0] == ("ValueError" if rank == 1 else "PipelineError"), found
        assert "planted" in found[1]
        assert found[-1] < 5
        assert again[0] == "ok" or "start all ranks again" in again[1], again
        assert again[-1] < 5


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-h1", "zb-v"])
def test_a_step_never_waits_for_the_device(name):
    """torch raises at whatever would make the host wait."""
    plan = build(name, 2, 4)
    functions = stage_functions(nn.Sequential(*[nn.Linear(8, 8) for _ in plan.placement.owners]).cuda())
    inputs = stage_inputs(len(functions), torch.randn(8, 8, device="cuda"), torch.randn(8, 8, device="cuda"))
    everyone_is_warm = threading.Barrier(2, timeout=20)

    def rank_steps(rank, transport):
        transport.device = torch.device("cuda", 0)
        executor = Executor(plan, transport)
        for _ in range(2):
            work = [ChunkWork(functions[s], inputs=inputs[s]) for s in plan.placement.local_stages(rank)]
            executor.run(work)
            if everyone_is_warm.wait() == 0:
                torch.cuda.set_sync_debug_mode("error")
            everyone_is_warm.wait()

    try:
        assert on_every_rank(2, rank_steps) == [None, None]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def overlap(rank, world):
    """One rank sends a long message while it computes on; the trace shows both at the same time."""
    setup_distributed(backend="cpu:gloo,cuda:nccl")
    tpc.setup_process_groups([("pipe", world)])
    stage = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)]).cuda()
    last = tpc.is_last_in_pipeline_group()
    x = torch.randn(8 * 4096, 2048, device="cuda") if tpc.is_first_in_pipeline_group() else None

    def step():
        fwd_fn = (lambda h: stage(h).square().mean()) if last else stage
        forward_backward(fwd_fn=fwd_fn, inputs=x, num_microbatches=8)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spans = {"nccl": [], "gemm": []}
    for event in profile.events():
        for kind, found in spans.items():
            if kind in event.name.lower():
                found.append((event.time_range.start, event.time_range.end))
    return any(a < d and c < b for a, b in spans["nccl"] for c, d in spans["gemm"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_messages_travel_while_stages_compute():
    assert any(run_distributed(overlap, 2))
