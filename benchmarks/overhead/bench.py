"""What a step costs beside the user's computation, beside other runtimes and beside loops written by hand.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/overhead/bench.py

The model is next to nothing (8 x Linear(8, 8) in all, 4 rows a micro-batch), so that a step is overhead. Everything
runs in the same processes, in alternating blocks of steps: this library, on its links between ranks of one machine and
on gloo; Schedule1F1B of torch.distributed.pipelining; the loops of `bare.py`, which know nothing but this one model.
What is reported is the ratio to torch's median, and the spread of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from bare import bare_step
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from torchdistpackage import forward_backward, setup_distributed, tpc
from torchdistpackage.parallel.pipeline_state import current_state
from torchdistpackage.runtime import ChunkWork, Executor
from torchdistpackage.runtime.p2p import DistributedTransport
from torchdistpackage.schedule import build

ROWS, WIDTH, LAYERS = 4, 8, 8
mse = nn.functional.mse_loss
Step = Callable[[], object]


def ours(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Step:
    """One training step with this library."""
    fwd_fn, inputs = function_and_inputs(stage, x, y)
    return lambda: forward_backward(None, fwd_fn, None, inputs, num_microbatches=m)


def ours_on_gloo(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Step:
    """The same step, every message over gloo as between two machines."""
    fwd_fn, inputs = function_and_inputs(stage, x, y)
    transport = DistributedTransport(tpc.get_control_group("pipe"), device=torch.device("cpu"))
    executor = Executor(build("1f1b", tpc.get_pp_size(), m), transport)
    return lambda: executor.run([ChunkWork(fwd_fn, inputs=inputs)])


def function_and_inputs(stage: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[..., Tensor], Tensor | None]:
    """What a user hands over."""
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def fwd_fn(received):
        return mse(stage(received[0]), received[1]) if last else stage(received)

    return fwd_fn, x if first else y if last else None


def torchs(stage: nn.Module, x: Tensor, y: Tensor, m: int) -> Step:
    """One training step with torch's runtime."""
    rank, size = tpc.get_pp_rank(), tpc.get_pp_size()
    piece = PipelineStage(stage, rank, size, torch.device("cpu"), group=tpc.get_group("pipe"))
    schedule = Schedule1F1B(piece, m, loss_fn=mse)
    arguments = (x,) if rank == 0 else ()
    target = {"target": y} if rank == size - 1 else {}
    return lambda: schedule.step(*arguments, **target)


RUNS = {
    "torch Schedule1F1B": torchs,
    "this library": ours,
    "this library, gloo only": ours_on_gloo,
    "bare gloo, sends waited at once": bare_step("at once"),
    "bare gloo, sends waited late": bare_step("late"),
    "bare gloo, receives posted ahead": bare_step("ahead"),
    "no communication at all": bare_step("none"),
}


def block(step: Step, steps: int) -> float:
    """Seconds a step, from barrier to barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def compare(m: int, steps: int, blocks: int) -> None:
    """Alternates blocks of all and prints the ratios on rank 0."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS * m, WIDTH), torch.randn(ROWS * m, WIDTH)
    stage = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(max(1, LAYERS // tpc.get_pp_size()))])
    runs = {name: make(stage, x, y, m) for name, make in RUNS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(blocks + 1):
        for name in sorted(runs, reverse=bool(number % 2)):
            seconds = block(runs[name], steps)
            if number:  # the first block warms up
                times[name].append(seconds)
    if dist.get_rank() == 0:
        base = times["torch Schedule1F1B"]
        bare = min(statistics.median(seconds) for name, seconds in times.items() if name.startswith("bare"))
        print(f"p={tpc.get_pp_size()} m={m}: beside torch's (spread of blocks), and beside the best bare gloo loop")
        for name, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
            middle = statistics.median(seconds)
            print(
                f"{name:<33} {middle / statistics.median(base):5.2f}  ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
                f"  {middle / bare:5.2f}   {1e3 * middle:7.2f} ms",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=5, help="steps a block")
    parser.add_argument("--blocks", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    current_state()
    for m in args.microbatches:
        compare(m, args.steps, args.blocks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
