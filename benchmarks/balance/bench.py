"""A cut by measured time: how even its stages are, and what a step gains over as many layers on every stage.

    OMP_NUM_THREADS=1 python benchmarks/balance/bench.py
    OMP_NUM_THREADS=1 python benchmarks/balance/bench.py --meta
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/balance/bench.py

In one process: the measured load of the slowest stage over the mean, beside the best that any cut can do, for
ResNet-50 and a vision transformer in 2 and 4 stages, and the forward of all stages over that of the whole model. In
several processes: ResNet-50 cut by `split_model` and by `partition_uniform` trains in the same processes, one step each
in turn; what is reported is the median over the rounds of the one time over the other.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn

from torchdistpackage import (
    flatten_model,
    forward_backward,
    local_stages,
    partition_uniform,
    setup_distributed,
    split_model,
    tpc,
)
from torchdistpackage.split import split

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224", num_classes=10),
}


def seconds(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    """Of one call."""
    began = time.perf_counter()
    function(x)
    return time.perf_counter() - began


def evenness(rows: int, size: dict[str, int], repeats: int) -> None:
    """The table of measured cuts."""
    print("| model | p | slowest / mean | above the best cut | seconds to split | stages / model, forward |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, build in MODELS.items():
        for p in (2, 4):
            torch.manual_seed(0)
            model, x = build(), torch.randn(rows, 3, size[name], size[name])
            began = time.perf_counter()
            pipe = split(model, x, p, repeats=repeats)
            took = time.perf_counter() - began
            report = pipe.report
            worst = max(row.load for row in report.rows)
            mean = sum(row.load for row in report.rows) / p
            above = worst / report.optimum - 1 if report.optimum else 0.0
            with torch.no_grad():
                pipe(x), model(x)
                ratios = [seconds(pipe, x) / seconds(model, x) for _ in range(2 * repeats)]
            print(
                f"| {name} | {p} | {worst / mean:.3f} | {above:.1%} | {took:.1f} | {statistics.median(ratios):.3f} |",
                flush=True,
            )


def uniform_stages(model: nn.Module) -> nn.Module:
    """This rank's layers of ResNet when every stage gets as many as the others."""
    parts = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
    row = flatten_model(model, [*parts, lambda x: torch.flatten(x, 1), "fc"], return_list=True)
    return nn.Sequential(*partition_uniform(row))


def gain(rows: int, size: int, microbatches: int, rounds: int, repeats: int) -> None:
    """A step of a cut by time against one of a cut by count."""
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    torch.manual_seed(0)
    model = MODELS["resnet50"]()
    x, y = torch.randn(rows * microbatches, 3, size, size), torch.randint(10, (rows * microbatches,))
    pipe = split_model(copy.deepcopy(model), x[:rows], repeats=repeats)
    stages = {"time": next(iter(local_stages(pipe).values())), "uniform": uniform_stages(model)}
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def step(stage: nn.Module) -> Any:
        def fwd_fn(received: Any) -> Any:
            if not last:
                return stage(received)
            *values, targets = received
            return nn.functional.cross_entropy(stage(*values), targets)

        return forward_backward(None, fwd_fn, None, x if first else [y] if last else None, microbatches)

    times: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name in sorted(stages, reverse=bool(number % 2)):
            dist.barrier()
            began = time.perf_counter()
            step(stages[name])
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print(pipe.report)
        ratios = [a / b for a, b in zip(times["uniform"][1:], times["time"][1:], strict=True)]
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        about = f"ResNet-50, p={dist.get_world_size()}, m={microbatches}, {size} px"
        print(f"{about}: a uniform cut takes {statistics.median(ratios):.2f} of the time ({spread})")
    dist.destroy_process_group()


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """10 billion parameters."""

    def __init__(self, depth: int = 48, width: int = 4096, heads: int = 32, vocabulary: int = 50257) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(2048, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def without_memory() -> None:
    """A model that no machine here could hold, cut into 8 stages."""
    with torch.device("meta"):
        model = Gpt()
    size = sum(parameter.numel() for parameter in model.parameters())
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    pipe = split(model, torch.zeros(2, 1024, dtype=torch.long), 8)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(pipe.report)
    print(f"{size / 1e9:.2f} billion parameters cut in {took:.1f} s, with {(after - before) / 2**20:.3f} GiB more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--size", type=int, default=128, help="of an image's side, for ResNet-50")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a layer")
    parser.add_argument("--meta", action="store_true", help="cut a model of 10 billion parameters without memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.meta:
        without_memory()
    elif dist.is_torchelastic_launched():
        gain(args.rows, args.size, args.microbatches, args.rounds, args.repeats)
    else:
        evenness(args.rows, {"resnet50": args.size, "vit_small_patch16_224": 224}, args.repeats)


if __name__ == "__main__":
    main()
