"""How close plans come to the lower bound, and how long planning takes.

    python benchmarks/planner/bench.py

Stages of one unit each for F, I and W, noise of +-10 % (fixed seed), a head that makes the last stage 30 % of a full
stage heavier, 0.05 a hop, memory for p micro-batches. "closed" is the schedule as published, "planned" what the planner
makes of the same cut and the same placement. A second table has the time to build and prove the largest plans.
"""

from __future__ import annotations

import argparse
import random
import time

from torchdistpackage.schedule import CostModel, build, describe, names, planner, simulate


def uneven(p: int, chunks: int) -> CostModel:
    """Stages with noise and a heavy head."""
    rng = random.Random(0)
    sizes = [1 + 0.1 * rng.uniform(-1, 1) for _ in range(p * chunks)]
    sizes[-1] += 0.3 * chunks
    times = tuple(size / chunks for size in sizes)
    return CostModel(times, times, times, hop=0.05, activation_bytes=(1 / chunks,) * (p * chunks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8,32", "16,64", "32,128", "64,512"], help="p,m")
    args = parser.parse_args()
    print(f"{'p, m':<8} {'cut for':<6} {'closed':>8} {'planned':>8} {'ratio':>7} {'seconds':>8}  plan")
    for size in args.sizes:
        p, m = map(int, size.split(","))
        for name in ("1f1b", "zb-v"):
            facts = describe(name)
            costs = uneven(p, facts.chunks)
            began = time.perf_counter()
            found = planner.plan(costs, p, m, p, placement=facts.place(p, facts.chunks))
            seconds = time.perf_counter() - began
            closed = simulate(build(name, p, m), costs).makespan
            print(
                f"{p}, {m:<5} {name:<6} {closed:8.1f} {found.makespan:8.1f} {found.ratio:7.4f} {seconds:8.2f}  "
                f"{found.plan.name}",
                flush=True,
            )
    p, m = map(int, args.sizes[-1].split(","))
    for chunks in (1, 2):
        began = time.perf_counter()
        found = planner.plan(uneven(p, chunks), p, m, p)
        print(f"any placement, {chunks} chunk(s): {time.perf_counter() - began:.2f} s, {found.plan.name}", flush=True)
    for name in names():
        began = time.perf_counter()
        plan = build(name, p, m)
        seconds = time.perf_counter() - began
        print(f"build and prove {name:<17} p={p} m={m}: {seconds:5.2f} s, {sum(map(len, plan.actions))} actions")


if __name__ == "__main__":
    main()
