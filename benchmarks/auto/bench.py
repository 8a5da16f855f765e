"""A planned schedule beside every fixed one, on real models whose stages cost unlike amounts.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/auto/bench.py --model vit_tiny_patch16_224
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/auto/bench.py --model resnet18 --draw step.png

The model is cut into as many layers on every stage, which is not as much work. All schedules that fit the number of
chunks and the placement train the same stages in the same processes, one step each in turn; what is reported is the
median over the rounds of each schedule's time over that of schedule="auto".
"""

from __future__ import annotations

import argparse
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
    draw_last_step,
    flatten_model,
    forward_backward,
    last_plan,
    partition_chunks,
    setup_distributed,
    tpc,
)
from torchdistpackage.schedule import describe, names


class Tokens(nn.Module):
    """What a vision transformer of timm does between its patches and its blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


def layers_of(name: str) -> list[nn.Module]:
    """The model's layers, in order."""
    torch.manual_seed(0)
    if name == "resnet18":
        model = torchvision.models.resnet18(num_classes=10)
        parts = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
        return flatten_model(model, [*parts, lambda x: torch.flatten(x, 1), "fc"], return_list=True)
    model = timm.create_model(name, num_classes=10)
    parts = ["patch_embed", Tokens(model), "blocks", "norm", lambda x: x[:, 0], "head"]
    return flatten_model(model, parts, return_list=True)


def training(stages: dict[int, nn.Module], last: int, x: torch.Tensor, y: torch.Tensor, m: int) -> Callable[[str], Any]:
    """One training step under a schedule."""

    def forward(stage: int) -> Callable[[Any], Any]:
        if stage < last:
            return stages[stage]
        return lambda received: nn.functional.cross_entropy(stages[stage](received[0]), received[1])

    functions = [forward(stage) for stage in stages]
    inputs = [x if stage == 0 else y if stage == last else None for stage in stages]
    optimizer = torch.optim.SGD([p for module in stages.values() for p in module.parameters()], lr=0.0)

    def step(schedule: str, **options: Any) -> Any:
        return forward_backward(optimizer, functions, None, inputs, m, schedule=schedule, **options)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224, help="of an image's side")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--placement", choices=["loop", "v"], default="loop")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="+", help="these fixed schedules, instead of all that fit")
    parser.add_argument("--draw", help="where the measured step is drawn, beside its simulation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", dist.get_world_size())])
    m, auto = args.microbatches, {"loop": "auto", "v": "auto-v"}[args.placement]
    fixed = [n for n in names() if (f := describe(n)).placement == args.placement and f.runs(args.chunks)]
    fixed = args.only or fixed
    placement = describe(fixed[0]).place(tpc.get_pp_size(), args.chunks)
    stages = partition_chunks(layers_of(args.model), placement)
    x = torch.randn(args.rows * m, 3, args.size, args.size)
    step = training(stages, placement.num_stages - 1, x, torch.randint(10, (args.rows * m,)), m)
    for schedule in [*fixed, *[auto] * 7]:  # warms up; auto measures in its first six steps
        step(schedule)
    planned = last_plan()
    times: dict[str, list[float]] = {schedule: [] for schedule in [*fixed, auto]}
    for number in range(args.rounds):
        for schedule in sorted(times, reverse=bool(number % 2)):
            dist.barrier()
            began = time.perf_counter()
            step(schedule)
            dist.barrier()
            times[schedule].append(time.perf_counter() - began)
    if args.draw:
        step(auto, record_timeline=True)
    if dist.get_rank() == 0:
        if args.draw:
            draw_last_step(args.draw)
        assert planned is not None
        print(f"{args.model}, p={tpc.get_pp_size()}, m={m}, {args.chunks} chunk(s): planned {planned.name!r}")
        for schedule, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, times[auto], strict=True))
            print(f"{schedule:<18} {statistics.median(seconds):7.3f} s   {ratio:5.3f} of {auto!r}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
