"""What the runtime's Python costs on one rank: a step of m micro-batches here, and the plain loop over them.

    OMP_NUM_THREADS=1 python benchmarks/overhead/bookkeeping.py

There is nobody to talk to, so that slicing, the plan, the entry into autograd and the sum of the losses are left. Both
run in alternating blocks; the difference is divided by the number of forward and backward pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage import forward_backward, setup_distributed, tpc

ROWS, WIDTH, LAYERS = 4, 8, 8
mse = nn.functional.mse_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="steps a block")
    parser.add_argument("--blocks", type=int, default=41)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", 1)])
    m = args.microbatches
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    x, y = torch.randn(ROWS * m, WIDTH), torch.randn(ROWS * m, WIDTH)

    def plain() -> None:
        total = 0.0
        for samples, targets in zip(x.split(ROWS), y.split(ROWS), strict=True):
            loss = mse(model(samples), targets) / m
            loss.backward()
            total = total + loss.detach()

    def fwd_fn(received):
        return mse(model(received[0]), received[1])

    def ours() -> None:
        forward_backward(None, fwd_fn, None, [x, y], num_microbatches=m)

    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(args.blocks + 1):
        for name, step in (("plain", plain), ("ours", ours)) if number % 2 else (("ours", ours), ("plain", plain)):
            began = time.perf_counter()
            for _ in range(args.steps):
                step()
            if number:  # the first block warms up
                times[name].append((time.perf_counter() - began) / args.steps / m * 1e6)
    differences = sorted(a - b for a, b in zip(times["ours"], times["plain"], strict=True))
    print(
        f"m={m}: {statistics.median(differences):.1f} us a forward and backward pair above the plain loop (quartiles "
        f"{differences[len(differences) // 4]:.1f} .. {differences[3 * len(differences) // 4]:.1f}); the plain loop's "
        f"pair takes {statistics.median(times['plain']):.0f} us"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
