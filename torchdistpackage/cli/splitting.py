"""split: how would a model be cut, and how even are its stages? Or, for a directory of weights, see `parts.py`."""

from __future__ import annotations

import importlib
import os
import sys
from inspect import signature
from typing import TYPE_CHECKING, Any

import click

from torchdistpackage.cli.output import one_message
from torchdistpackage.cli.parts import BY_TRACING, ON_DISK, parts_options, split_directory, wants_parts
from torchdistpackage.errors import SplitError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["split_model"]


@click.command("split")
@click.argument("model")
@click.option("-p", "--stages", type=click.IntRange(1), help="Stages to cut into: ranks times chunks.")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE",
    help="Of a micro-batch, such as 4x3x224x224; of whole numbers below n: 4x128<n. Once for each argument.",
)
@click.option("--costs", type=click.Choice(["time", "flops", "parameters"]), help="What to balance.")
@click.option("--meta", is_flag=True, help="Build the model on the meta device: any size, and FLOPs instead of time.")
@click.option("--layout", help="Megatron-LM's spelling of where to cut, such as 'Et*3|t*4|t*4L'.")
@click.option("--code", is_flag=True, help="Also print what each stage runs.")
@parts_options
@one_message
def split_model(
    model: str,
    stages: int | None,
    inputs: tuple[str, ...],
    costs: str | None,
    meta: bool,
    layout: str | None,
    code: bool,
    **parts: Any,
) -> None:
    """Cut a model by tracing and print the stages, or split saved weights into the files of three parties.

    By tracing, it prints what each stage holds, costs and sends. MODEL is timm:NAME, torchvision:NAME, or
    PACKAGE.MODULE:FUNCTION for a function without arguments that builds it; -p and -i are needed.

    \b
    torchdistpackage split timm:vit_small_patch16_224 -p 4 -i 4x3x224x224
    torchdistpackage split torchvision:resnet50 -p 2 -i 4x3x224x224 --costs flops --code
    torchdistpackage split my.models:build_gpt -p 8 -i "2x1024<50257" --meta

    On disk, MODEL is a directory with config.json and the safetensors files of a language model, of any size: the
    tensors are copied to bottom, trunk and top.safetensors, a few MiB at a time. --at and --out are needed. The same
    command goes on after it was cut short.

    \b
    torchdistpackage split ./Llama-3.1-8B --at 2,30 --dry-run
    torchdistpackage split ./Llama-3.1-8B --at 2,30 --out ./parts
    """  # noqa: D301
    if wants_parts(model, **parts):
        by_tracing = {"-p": stages, "-i": inputs, "--costs": costs, "--meta": meta, "--layout": layout, "--code": code}
        split_directory(model, **parts, foreign={name: bool(value) for name, value in by_tracing.items()})
        return
    if stages is None or not inputs:
        missing = " and ".join(name for name, value in (("-p", stages), ("-i", inputs)) if not value)
        raise click.UsageError(
            f"without {missing}, {model} cannot be cut by tracing: {BY_TRACING}\n"
            f"A directory with saved weights, which {model} is not, is split by: {ON_DISK}"
        )
    import torch

    from torchdistpackage.split import split

    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        built = _built(model)
    pipe = split(built, tuple(map(_example, inputs)), stages, costs=costs, layout=layout)  # type: ignore[arg-type]
    click.echo(str(pipe.report))
    for source, target in pipe.skips:
        click.echo(f"values go from stage {source} straight to stage {target}")
    if code:
        for stage in range(stages):
            click.echo(f"\n# stage {stage}\n{pipe.get_stage_module(stage).generated_code().strip()}")


def _built(name: str) -> nn.Module:
    """The model that a name stands for."""
    home, _, what = name.partition(":")
    if not what:
        raise SplitError(f"{name!r} is no model: write timm:NAME, torchvision:NAME or PACKAGE.MODULE:FUNCTION")
    try:
        if home == "timm":
            made: Any = importlib.import_module("timm").create_model(what)
        elif home == "torchvision":
            build = importlib.import_module("torchvision.models").get_model_builder(what)
            made = build(**({"weights_backbone": None} if "weights_backbone" in signature(build).parameters else {}))
        else:
            sys.path.insert(0, os.getcwd())
            made = getattr(importlib.import_module(home), what)()
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise SplitError(f"{name!r} cannot be built: {error}") from error
    return made  # type: ignore[no-any-return]


def _example(shape: str) -> Tensor:
    import torch

    sizes, _, bound = shape.partition("<")
    try:
        numbers = [int(size) for size in sizes.split("x")]
        return torch.randint(int(bound), numbers) if bound else torch.randn(numbers)
    except (ValueError, RuntimeError) as error:
        raise SplitError(f"{shape!r} is no shape: write 4x3x224x224, or 4x128<1000 for whole numbers") from error
