"""What an action costs under each schedule, beside 1F1B's, on stages that compute next to nothing.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/schedules/bench.py

Every stage is a Linear(8, 8), every micro-batch has 4 rows. All schedules run in the same processes, in alternating
blocks of steps; a step's time is divided by the compute actions of a rank, so that schedules with more chunks or with
split backwards can be compared. With --torch, the schedules of torch.distributed.pipelining run in the same blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from torchdistpackage import forward_backward, setup_distributed, tpc
from torchdistpackage.schedule import Plan, build, describe, names

ROWS, WIDTH = 4, 8
TORCH = {"1F1B": "1f1b", "Interleaved1F1B": "interleaved-1f1b", "InterleavedZeroBubble": "interleaved-zb"}
TORCH |= {"ZBVZeroBubble": "zb-v"}
mse = nn.functional.mse_loss


def ours(plan: Plan, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """One training step with this library."""
    last = plan.placement.num_stages - 1
    stages = plan.placement.local_stages(tpc.get_pp_rank())
    modules = {stage: nn.Linear(WIDTH, WIDTH) for stage in stages}

    def forward(stage: int) -> Callable[[Any], Any]:
        if stage < last:
            return modules[stage]
        return lambda received: mse(modules[stage](received[0]), received[1])

    functions = [forward(stage) for stage in stages]
    inputs = [x if stage == 0 else y if stage == last else None for stage in stages]
    return lambda: forward_backward(None, functions, None, inputs, plan.num_microbatches, schedule=plan)


def torchs(name: str, m: int, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """One training step with torch's runtime."""
    rank, size = tpc.get_pp_rank(), tpc.get_pp_size()
    placement = describe(TORCH[name]).place(size, describe(TORCH[name]).chunks)
    pieces = [
        PipelineStage(
            nn.Linear(WIDTH, WIDTH), s, placement.num_stages, torch.device("cpu"), group=tpc.get_group("pipe")
        )
        for s in placement.local_stages(rank)
    ]
    cls = get_schedule_class(name)
    schedule = cls(pieces[0] if len(pieces) == 1 else pieces, m, loss_fn=mse)
    arguments = (x,) if rank == placement.owner(0) else ()
    target = {"target": y} if rank == placement.loss_rank else {}
    return lambda: schedule.step(*arguments, **target)


def block(step: Callable[[], Any], steps: int) -> float:
    """Seconds a step, from barrier to barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--torch", action="store_true", help="torch's schedules, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    m = args.microbatches
    x, y = torch.randn(ROWS * m, WIDTH), torch.randn(ROWS * m, WIDTH)
    plans = {name: build(name, tpc.get_pp_size(), m) for name in names()}
    runs = {name: ours(plan, x, y) for name, plan in plans.items()}
    actions = {name: sum(a.op.is_compute for a in plan.actions[0]) for name, plan in plans.items()}
    if args.torch:
        for name, like in TORCH.items():
            runs[f"torch {name}"], actions[f"torch {name}"] = torchs(name, m, x, y), actions[like]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.blocks + 1):
        for name in sorted(runs, reverse=bool(number % 2)):
            seconds = block(runs[name], args.steps)
            if number:  # the first block warms up
                times[name].append(seconds)
    if dist.get_rank() == 0:
        base = [seconds / actions["1f1b"] for seconds in times["1f1b"]]
        print(f"p={tpc.get_pp_size()} m={m}: cost of an action, 1f1b of this library = 1")
        for name in runs:
            per_action = [seconds / actions[name] for seconds in times[name]]
            ratio = statistics.median(a / b for a, b in zip(per_action, base, strict=True))
            step = 1e3 * statistics.median(times[name])
            print(f"{name:<28} {ratio:5.2f}   {step:8.2f} ms a step of {actions[name]} actions", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
