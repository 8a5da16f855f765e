"""The activations that a rank holds under each schedule: predicted by the plan, measured, and beside torch's runtime.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/memory/bench.py

Every rank has the same number of [Linear, GELU] layers, in one chunk or in several. "saved" is what autograd saves of
one micro-batch in one chunk, parameters apart; the prediction is that times the plan's peak of live micro-batches.
Measured are the bytes that a step has allocated and not freed yet, at their most: on CPU every allocation and free
that the profiler saw, on CUDA the allocator's counter. Parameters have their gradients before, and keep them.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.profiler import ProfilerActivity, profile, record_function

from torchdistpackage import forward_backward, setup_distributed, tpc
from torchdistpackage.schedule import Placement, Plan, build, describe, names, peak_activations

TORCH = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved-1f1b": "Interleaved1F1B"}
TORCH |= {"interleaved-zb": "InterleavedZeroBubble", "zb-v": "ZBVZeroBubble"}
WARM_UP = 2
mse = nn.functional.mse_loss
Step = Callable[[], Any]
Modules = dict[int, nn.Module]


class Reading(NamedTuple):
    """Bytes on one rank."""

    peak: int  # the most above the start of the step
    kept: int  # between steps: what the runtime has beside the parameters and their gradients
    left: int  # what the step left behind: 0 if the measurement is whole


class Copied(nn.Module):
    """Gives the first stage an input of its own, so that it holds as much as any other."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def make_modules(placement: Placement, rank: int, layers: int, width: int, device: torch.device) -> Modules:
    """This rank's stages, with gradients."""
    modules: Modules = {}
    for stage in placement.local_stages(rank):
        count = layers // len(placement.local_stages(rank))
        body = [module for _ in range(count) for module in (nn.Linear(width, width), nn.GELU())]
        modules[stage] = nn.Sequential(*([Copied()] if stage == 0 else []), *body).to(device)
        for parameter in modules[stage].parameters():
            parameter.grad = torch.zeros_like(parameter)
    return modules


def saved_bytes(module: nn.Module, microbatch: Tensor) -> int:
    """What autograd saves of one micro-batch: every memory once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(microbatch.clone().requires_grad_())
    del output
    return sum(size for at, size in sizes.items() if at not in own)


def ours(plan: Plan, modules: Modules, x: Tensor, y: Tensor) -> Step:
    """One training step with this library."""
    last = plan.placement.num_stages - 1

    def forward(stage: int) -> Callable[[Any], Any]:
        if stage < last:
            return modules[stage]
        return lambda received: mse(modules[stage](received[0]), received[1])

    functions = [forward(stage) for stage in modules]
    inputs = [x if stage == 0 else y if stage == last else None for stage in modules]
    return lambda: forward_backward(None, functions, None, inputs, plan.num_microbatches, schedule=plan)


def torchs(name: str, m: int, placement: Placement, modules: Modules, x: Tensor, y: Tensor) -> Step:
    """One training step with torch's runtime."""
    rank, device = tpc.get_pp_rank(), x.device
    pieces = [
        PipelineStage(module, stage, placement.num_stages, device, group=tpc.get_group("pipe"))
        for stage, module in modules.items()
    ]
    schedule = get_schedule_class(name)(pieces[0] if len(pieces) == 1 else pieces, m, loss_fn=mse)
    arguments = (x,) if rank == placement.owner(0) else ()
    target = {"target": y} if rank == placement.loss_rank else {}
    return lambda: schedule.step(*arguments, **target, return_outputs=False)


def measure(make: Callable[[], Step], device: torch.device) -> Reading:
    """Makes a runtime, warms it up, and measures one step."""
    gc.collect()
    if device.type == "cuda":
        return measure_cuda(make, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step = make()
        with measured_step(step):
            pass
        gc.collect()
        with record_function("end"):
            pass
    step()  # what the runtime still holds of a profiled step, such as sends, must not outlive the profiler
    events = profiler.profiler.kineto_results.events()
    marks = {event.name(): event.start_ns() for event in events if event.name() in ("begin", "end")}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    kept = sum(size for at, size in changes if at < marks["begin"])
    live = list(accumulate((size for at, size in changes if marks["begin"] <= at <= marks["end"]), initial=0))
    return Reading(max(live), kept, live[-1])


def measure_cuda(make: Callable[[], Step], device: torch.device) -> Reading:
    """The same with the allocator's own counters."""
    before = torch.cuda.memory_allocated(device)
    step = make()
    with measured_step(step):
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    gc.collect()
    return Reading(
        torch.cuda.max_memory_allocated(device) - start, start - before, torch.cuda.memory_allocated(device) - start
    )


@contextmanager
def measured_step(step: Step) -> Iterator[None]:
    """Warms up, does what the block says, then runs one step."""
    for _ in range(WARM_UP):
        step()
    dist.barrier()
    gc.collect()
    yield
    with record_function("begin"):
        pass
    step()


def compare(name: str, m: int, layers: int, rows: int, width: int, device: torch.device) -> None:
    """Measures one schedule and prints its line on rank 0."""
    rank, size = tpc.get_pp_rank(), tpc.get_pp_size()
    plan = build(name, size, m)
    x, y = (torch.randn(rows * m, width, device=device) for _ in range(2))
    modules = make_modules(plan.placement, rank, layers, width, device)
    saved = saved_bytes(next(iter(modules.values())), x[:rows])
    readings = [measure(lambda: ours(plan, modules, x, y), device)]
    if name in TORCH:
        placement = describe(name).place(size, describe(name).chunks)
        readings.append(measure(lambda: torchs(TORCH[name], m, placement, modules, x, y), device))
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, (saved, readings))
    if rank:
        return
    live = peak_activations(plan)
    worst = max(range(size), key=lambda r: everyone[r][1][0].peak)
    saved, (reading, *_) = everyone[worst]
    line = (
        f"{name:<17} {live[worst]:5} {saved / 2**20:9.2f} {reading.peak / 2**20:9.2f} "
        f"{reading.peak / (live[worst] * saved):8.2f} {reading.peak / saved - live[worst]:7.2f} "
        f"{reading.kept / saved:6.2f} {max(abs(r.left) for _, found in everyone for r in found) / 1024:9.1f}"
    )
    if name in TORCH:
        peaks = [max(found[i].peak for _, found in everyone) for i in (0, 1)]
        alls = [max(found[i].peak + found[i].kept for _, found in everyone) for i in (0, 1)]
        line += f" {peaks[0] / peaks[1]:8.2f} {alls[0] / alls[1]:8.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=16, help="[Linear, GELU] a rank")
    parser.add_argument("--rows", type=int, default=512, help="rows of a micro-batch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--schedules", nargs="+", default=names(), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed()
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dist.get_rank() == 0:
        print(
            f"p={tpc.get_pp_size()} m={args.microbatches} on {device.type}; the worst rank; MiB, and micro-batches",
            flush=True,
        )
        print(
            "schedule           live  saved,MiB peak,MiB  measured  beyond   kept  left,KiB  ours / torch  with kept",
            flush=True,
        )
    for name in args.schedules:
        compare(name, args.microbatches, args.layers, args.rows, args.width, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
