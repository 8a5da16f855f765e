"""Bytes on a rank and time of a step against the number of ranks: plain data parallelism, and sharded state.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/sharded-state/bench.py

One run measures 1, 2 and 4 ranks; the others wait meanwhile. All rows of one number of ranks take turns, step by step,
so that a slow moment of the machine hits all of them. Bytes are counted from the tensors that live between two steps,
and are of the rank that has most.

A row is a function in `ROWS`: it makes what it trains, and returns how a step runs and what it keeps.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchdistpackage import Bf16ZeroOptimizer, NaiveDDP, ShardedEMA, setup_distributed

MIB = 2**20
BUCKET = 4_000_000  # elements: 16 MB of float32


class Setting(NamedTuple):
    """What a row trains, and with whom."""

    group: dist.ProcessGroup
    layers: int
    width: int
    rows: int
    device: torch.device


class Kept(NamedTuple):
    """Bytes between two steps."""

    parameters: int
    gradients: int
    master: int
    state: int
    average: int = 0


class Row(NamedTuple):
    """One contestant."""

    step: Callable[[], Any]
    kept: Callable[[], Kept]


def make_model(setting: Setting, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    pairs = [(nn.Linear(setting.width, setting.width), nn.GELU()) for _ in range(setting.layers)]
    return nn.Sequential(*[module for pair in pairs for module in pair]).to(setting.device, dtype)


def train(
    model: nn.Module, optimizer: Any, setting: Setting, dtype: torch.dtype, after: Sequence[Callable[[], Any]] = ()
) -> Callable[[], Any]:
    """One step of a user's loop; `after` is what follows the backward, if not only the optimizer's step."""
    x = torch.randn(setting.rows, setting.width, device=setting.device, dtype=dtype)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for call in after or [optimizer.step]:
            call()

    return step


def size(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def plain(setting: Setting) -> Row:
    model = make_model(setting, torch.float32)
    wrapped = DistributedDataParallel(model, process_group=setting.group, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Row(train(wrapped, optimizer, setting, torch.float32), lambda: whole(model, optimizer))


def whole(model: nn.Module, optimizer: torch.optim.Optimizer, average: int = 0) -> Kept:
    """What plain data parallelism keeps on every rank."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return Kept(size(model.parameters()), size(p.grad for p in model.parameters()), 0, size(state), average)


def naive(setting: Setting) -> Row:
    model = make_model(setting, torch.float32)
    wrapped = NaiveDDP(model, process_group=setting.group, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    after = [wrapped.reduce_gradients, optimizer.step]
    return Row(train(wrapped, optimizer, setting, torch.float32, after), lambda: whole(model, optimizer))


def averaged(shards: bool) -> Callable[[Setting], Row]:
    """DDP with an average of the weights, on every rank or in shards."""

    def make(setting: Setting) -> Row:
        model = make_model(setting, torch.float32)
        wrapped = DistributedDataParallel(model, process_group=setting.group, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if shards:
            ema = ShardedEMA(model, setting.group)
            after = [optimizer.step, lambda: ema.update(model)]
            return Row(
                train(wrapped, optimizer, setting, torch.float32, after), lambda: whole(model, optimizer, ema.nbytes)
            )
        torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        after = [optimizer.step, lambda: torchs.update_parameters(model)]
        return Row(
            train(wrapped, optimizer, setting, torch.float32, after),
            lambda: whole(model, optimizer, size(torchs.module.parameters())),
        )

    return make


def sharded(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[Setting], Row]:
    def make(setting: Setting) -> Row:
        model = make_model(setting, dtype)
        optimizer = Bf16ZeroOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), setting.group, **options)

        def kept() -> Kept:
            report = optimizer.memory_report()
            return Kept(report.parameters, report.gradients, report.master, report.state)

        return Row(train(model, optimizer, setting, dtype), kept)

    return make


ROWS: dict[str, Callable[[Setting], Row]] = {
    "DDP + AdamW": plain,
    "NaiveDDP + AdamW": naive,
    "DDP + AdamW, torch's AveragedModel": averaged(False),
    "DDP + AdamW, ShardedEMA": averaged(True),
    "stage 1": sharded(stage=1, bucket_size=BUCKET),
    "stage 2": sharded(stage=2, bucket_size=BUCKET),
    "stage 2, overlapped": sharded(stage=2, bucket_size=BUCKET, overlap_comm=True),
    "stage 2, one bucket": sharded(stage=2),
    "stage 2, bfloat16": sharded(torch.bfloat16, stage=2, bucket_size=BUCKET),
}


def measure(setting: Setting, steps: int, warm_up: int = 2) -> dict[str, tuple[list[float], Kept]]:
    """Seconds of each step and bytes of each row, on this rank."""
    rows = {name: make(setting) for name, make in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(warm_up + steps):
        for name, row in rows.items():
            dist.barrier(setting.group)
            begin = time.perf_counter()
            row.step()
            if setting.device.type == "cuda":
                torch.cuda.synchronize(setting.device)
            dist.barrier(setting.group)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return {name: (seconds[name], row.kept()) for name, row in rows.items()}


def show(num_ranks: int, everyone: list[dict[str, tuple[list[float], Kept]]]) -> None:
    first = next(iter(ROWS))
    base = statistics.median(everyone[0][first][0])
    for name in ROWS:
        kept = Kept(*(max(found[name][1][at] for found in everyone) for at in range(len(Kept._fields))))
        median = statistics.median(everyone[0][name][0])
        cells = [f"{part / MIB:.1f}" for part in (*kept, sum(kept))]
        print(f"| {num_ranks} | {name} | {' | '.join(cells)} | {median / base:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=64, help="rows of a rank's batch")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchdistpackage").setLevel(logging.ERROR)  # groups are parts of the world on purpose
    setup_distributed()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        numel = args.layers * args.width * (args.width + 1)
        print(f"{numel / 1e6:.1f} M parameters, {args.rows} rows a rank, {device.type}; MiB on the fullest rank\n")
        print(
            "| ranks | | parameters | gradients | master | state | average | all | time / DDP |\n" + "| --- " * 9 + "|"
        )
    for num_ranks in [count for count in (1, 2, 4, 8) if count <= world]:
        group = dist.new_group(list(range(num_ranks)))
        if rank < num_ranks:
            found = measure(Setting(group, args.layers, args.width, args.rows, device), args.steps)
            everyone: list[Any] = [None] * num_ranks
            dist.all_gather_object(everyone, found, group=group)
            if rank == 0:
                show(num_ranks, everyone)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
