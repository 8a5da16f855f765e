"""What a step costs beside the user's computation: this library against torch.distributed.pipelining's Schedule1F1B.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/overhead/bench.py

The model is nothing (a Linear(8, 8) per stage, 4 rows a micro-batch), so that a step is overhead alone. Both runtimes
run in the same processes over the same gloo group, in alternating blocks of steps; what is reported is the ratio of the
medians, and the spread of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from torchdistpackage import forward_backward, setup_distributed, tpc

ROWS, WIDTH = 4, 8
mse = nn.functional.mse_loss


def ours(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], None]:
    """One training step with this library."""
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()
    inputs = x if first else y if last else None

    def fwd_fn(received):
        return mse(stage(received[0]), received[1]) if last else stage(received)

    return lambda: forward_backward(None, fwd_fn, None, inputs, num_microbatches=m)


def torchs(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Callable[[], None]:
    """One training step with torch's runtime."""
    rank, size = tpc.get_pp_rank(), tpc.get_pp_size()
    piece = PipelineStage(stage, rank, size, torch.device("cpu"), group=tpc.get_group("pipe"))
    schedule = Schedule1F1B(piece, m, loss_fn=mse)
    arguments = (x,) if rank == 0 else ()
    target = {"target": y} if rank == size - 1 else {}
    return lambda: schedule.step(*arguments, **target)


def block(step: Callable[[], None], steps: int) -> float:
    """Seconds a step, from barrier to barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def compare(m: int, steps: int, blocks: int) -> None:
    """Alternates blocks of both and prints the ratio on rank 0."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS * m, WIDTH), torch.randn(ROWS * m, WIDTH)
    runs = {name: make(nn.Linear(WIDTH, WIDTH), x, y, m) for name, make in (("torch", torchs), ("ours", ours))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(blocks + 1):
        for name in sorted(runs, reverse=bool(number % 2)):
            seconds = block(runs[name], steps)
            if number:  # the first block warms up
                times[name].append(seconds)
    if dist.get_rank() == 0:
        ratios = sorted(a / b for a, b in zip(times["ours"], times["torch"], strict=True))
        ratio = statistics.median(times["ours"]) / statistics.median(times["torch"])
        milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        print(
            f"p={tpc.get_pp_size()} m={m:<3} ours/torch = {ratio:.2f}  (blocks {ratios[0]:.2f} .. {ratios[-1]:.2f};"
            f" medians {milliseconds['ours']:.2f} ms and {milliseconds['torch']:.2f} ms)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--blocks", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    for m in args.microbatches:
        compare(m, args.steps, args.blocks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
