"""Step time of real models: this library beside torch.distributed.pipelining and DeepSpeed's PipelineEngine.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/throughput/bench.py --model resnet18

The model is cut once, by this library's splitter; every runtime trains copies of the same stages, with the same
micro-batches, in the same processes and over gloo, in alternating blocks of steps. Before they are timed, the gradients
of each are compared with the plain loop's over the uncut model. What each rank computes is timed in the same blocks,
without any communication, which says how near a step comes to the bound of its schedule.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from models import MODELS, Task, task
from peers import Cut, Job, deepspeed_or_reason, ours, torchs
from torch import Tensor, nn

from torchdistpackage import partition_chunks, setup_distributed, tpc
from torchdistpackage.schedule import CostModel, Placement, build, describe, simulate
from torchdistpackage.split import measured_times

OURS = ["1f1b", "eager-1f1b", "gpipe", "zb-h1"]
OURS_MORE = ["interleaved-1f1b", "interleaved-zb", "zb-v"]
TORCH = {"1F1B": "1f1b", "GPipe": "gpipe"}
TORCH_MORE = {"Interleaved1F1B": "interleaved-1f1b", "InterleavedZeroBubble": "interleaved-zb", "ZBVZeroBubble": "zb-v"}
RTOL, ATOL = 1e-4, 1e-5  # the second one of a tensor's largest gradient: deep layers have tiny ones
BASE = "torch 1F1B"


def say(*lines: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)


class Cuts:
    """The model's cut for each placement, made once, so that all who share a placement share the cut."""

    def __init__(self, work: Task, costs: str) -> None:
        example = work.batch(work.rows)[0]
        self.work, self.options = work, {"policy": "balanced", "costs": costs, "example_input": example}
        if costs == "time":  # by every rank, while the others compute as they do in a step; their medians for all
            times = in_turns(lambda: measured_times(work.layers, example, repeats=9))
            weights = [statistics.median(column) for column in zip(*times, strict=True)]
            self.options = {"policy": "balanced", "weights": weights}
        self.made: dict[Placement, Cut] = {}

    def like(self, schedule: str) -> Cut:
        """The cut for a schedule of this library."""
        placement = describe(schedule).place(tpc.get_pp_size(), describe(schedule).chunks)
        if placement not in self.made:
            self.made[placement] = Cut(placement, partition_chunks(self.work.layers, placement, **self.options))
        return self.made[placement]


class Alone:
    """This rank's forwards and backwards of one step, without communication, on inputs as they come in the pipeline."""

    def __init__(self, work: Task, cut: Cut, x: Tensor, y: Tensor, m: int) -> None:
        self.m, self.loss, (stages, self.optimizer) = m, work.loss, cut.copied()
        ((self.number, self.stage),) = stages.items()
        self.last = self.number == cut.placement.num_stages - 1
        layers, counts = nn.Sequential(*work.layers), gathered(len(self.stage))
        with torch.no_grad():
            self.x = layers[: sum(counts[: self.number])](x[: work.rows])
            self.beside = y[: work.rows] if self.last else torch.randn_like(self.stage(self.x))

    def step(self) -> tuple[float, float]:
        """Seconds of all forwards and of all backwards, the zeroing included."""
        times = [time.perf_counter()]
        self.optimizer.zero_grad()
        for _ in range(self.m):
            output = self.stage(self.x.detach().requires_grad_(self.number > 0))
            scalar = self.loss(output, self.beside) / self.m if self.last else None
            times.append(time.perf_counter())
            output.backward(self.beside) if scalar is None else scalar.backward()
            times.append(time.perf_counter())
        spans = [b - a for a, b in pairwise(times)]
        return sum(spans[0::2]), sum(spans[1::2])

    def block(self, steps: int) -> list[tuple[float, float]]:
        """Medians for every rank."""

        def steps_alone() -> tuple[float, float]:
            forward, backward = zip(*(self.step() for _ in range(steps)), strict=True)
            return statistics.median(forward), statistics.median(backward)

        return in_turns(steps_alone)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def in_turns(measure: Callable[[], Any]) -> list[Any]:
    """What every rank measures, as many ranks at a time as there are cores."""
    value = None
    for wave in range(0, dist.get_world_size(), cores()):
        dist.barrier()
        if wave <= dist.get_rank() < wave + cores():
            value = measure()
    return gathered(value)


def cores() -> int:
    """Cores that these processes may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(jobs: Sequence[Job], work: Task, x: Tensor, y: Tensor, m: int) -> None:
    """Compares every job's gradients of one step, on every rank, with those of the plain loop over the uncut model."""
    row = nn.Sequential(*work.layers)
    row.zero_grad()
    for samples, targets in zip(x.chunk(m), y.chunk(m), strict=True):
        (work.loss(row(samples), targets) / m).backward()
    exact, wrong = [], []
    for job in jobs:
        job.optimizer.watch = True
        job.step()
        job.optimizer.watch = False
        pairs = list(zip(job.optimizer.seen, (p.grad for p in job.cut.parameters()), strict=True))
        name = f"{job.runtime} {job.schedule}"
        if not all(torch.allclose(a, b, rtol=RTOL, atol=ATOL * float(b.abs().max())) for a, b in pairs):
            worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            wrong.append(f"{name} on rank {dist.get_rank()} (by up to {worst:.2g} of a tensor's largest gradient)")
        elif all(torch.equal(a, b) for a, b in pairs):
            exact.append(name)
        job.optimizer.seen = []
    if found := [line for rank in gathered(wrong) for line in rank]:
        raise AssertionError(f"gradients differ from the plain loop's: {'; '.join(found)}")
    everywhere = set(exact).intersection(*gathered(exact))
    say(
        f"gradients of all {len(jobs)} equal the plain loop's on every rank (allclose, rtol {RTOL:g}, atol {ATOL:g} "
        f"of a tensor's largest; bit for bit: {', '.join(name for name in exact if name in everywhere) or 'none'})"
    )


def block(step: Callable[[], Any], steps: int) -> float:
    """Seconds a step, from barrier to barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def compare(cuts: Cuts, m: int, args: argparse.Namespace) -> None:
    """Alternates blocks of all runtimes and prints the table on rank 0."""
    work = cuts.work
    torch.manual_seed(1)
    x, y = work.batch(work.rows * m)
    theirs = TORCH | (TORCH_MORE if args.more else {})
    jobs = [torchs(name, like, cuts.like(like), x, y, m, work.loss) for name, like in theirs.items()]
    names = args.ours + (OURS_MORE if args.more else [])
    jobs += [ours(name, cuts.like(name), x, y, m, work.loss) for name in names]
    if args.deepspeed:
        job, reason = deepspeed_or_reason(cuts.like("1f1b"), x, y, m, work.loss)
        jobs += [job] if job else []
        if reason:
            say(f"DeepSpeed is left out: {reason}")
            args.deepspeed = False
    check(jobs, work, x, y, m)
    alone = Alone(work, cuts.like("1f1b"), x, y, m)
    runs = {f"{job.runtime} {job.schedule}": job for job in jobs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    computed: list[list[tuple[float, float]]] = []
    for number in range(args.blocks + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            seconds = block(runs[name].step, args.steps)
            if number:  # the first block warms up
                times[name].append(seconds)
        computed.append(alone.block(args.steps))
    report(runs, times, computed[1:], m)


def report(
    runs: dict[str, Job], times: dict[str, list[float]], computed: list[list[tuple[float, float]]], m: int
) -> None:
    """Prints what was measured."""
    size = tpc.get_pp_size()
    forward, backward = (
        [statistics.median(ranks[rank][half] for ranks in computed) for rank in range(size)] for half in (0, 1)
    )
    busy = [f + b for f, b in zip(forward, backward, strict=True)]
    costs = CostModel(tuple(f / m for f in forward), (0.0,) * size, (0.0,) * size, tuple(b / m for b in backward))
    shared = size > cores()
    say(f"p={size} m={m}: the ranks compute {', '.join(f'{1e3 * seconds:.1f}' for seconds in busy)} ms a step")
    if shared:
        say(f"{size} ranks share {cores()} cores: no step can take less than all their work / {cores()}")
    say("| runtime | schedule | ratio | blocks | ms | of the bound | of this cut's |", "| --- " * 7 + "|")
    base = times[BASE]
    for name, job in runs.items():
        seconds, facts = statistics.median(times[name]), describe(job.like)
        ratios = sorted(a / b for a, b in zip(times[name], base, strict=True))
        bound = cut = ""
        if not facts.split and facts.placement == "loop":
            ideal = sum(busy) / size * (m + (size - 1) / facts.chunks) / m
            bound = f"{max(ideal, sum(busy) / cores()) / seconds if shared else ideal / seconds:.2f}"
            if facts.chunks == 1 and not shared:
                cut = f"{simulate(build(job.like, size, m), costs).makespan / seconds:.2f}"
        ratio = f"{seconds / statistics.median(base):.2f} | {ratios[0]:.2f} .. {ratios[-1]:.2f}"
        say(f"| {job.runtime} | {job.schedule} | {ratio} | {1e3 * seconds:.1f} | {bound} | {cut} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--costs", choices=["flops", "time", "parameters"], help="what the cut balances")
    parser.add_argument("--ours", nargs="+", default=OURS, help="schedules of this library")
    parser.add_argument("--more", action="store_true", help="schedules with two stages a rank, too")
    parser.add_argument("--no-deepspeed", dest="deepspeed", action="store_false")
    parser.add_argument("--steps", type=int, default=2, help="steps a block")
    parser.add_argument("--blocks", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    work = task(args.model, args.size)
    costs = args.costs or work.costs
    cuts = Cuts(work, costs)
    counts = gathered(sum(map(len, cuts.like("1f1b").stages.values())))
    sizes = ", ".join(map(str, counts))
    say(f"{args.model}: {len(work.layers)} layers cut into {sizes} by {costs}; {work.rows} rows a micro-batch")
    for m in args.microbatches:
        compare(cuts, m, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
