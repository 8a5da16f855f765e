"""split: how would a model be cut, and how even are its stages?"""

from __future__ import annotations

import importlib
import os
import sys
from inspect import signature
from typing import TYPE_CHECKING, Any

import click

from torchdistpackage.cli.output import one_message
from torchdistpackage.errors import SplitError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["split_model"]


@click.command("split")
@click.argument("model")
@click.option("-p", "--stages", type=click.IntRange(1), required=True, help="Stages to cut into: ranks times chunks.")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="SHAPE",
    help="Of a micro-batch, such as 4x3x224x224; of whole numbers below n: 4x128<n. Once for each argument.",
)
@click.option("--costs", type=click.Choice(["time", "flops", "parameters"]), help="What to balance.")
@click.option("--meta", is_flag=True, help="Build the model on the meta device: any size, and FLOPs instead of time.")
@click.option("--layout", help="Megatron-LM's spelling of where to cut, such as 'Et*3|t*4|t*4L'.")
@click.option("--code", is_flag=True, help="Also print what each stage runs.")
@one_message
def split_model(
    model: str, stages: int, inputs: tuple[str, ...], costs: str | None, meta: bool, layout: str | None, code: bool
) -> None:
    """Cut a model by tracing and print what each stage holds, costs and sends.

    MODEL is timm:NAME, torchvision:NAME, or PACKAGE.MODULE:FUNCTION for a function without arguments that builds it.

    \b
    torchdistpackage split timm:vit_small_patch16_224 -p 4 -i 4x3x224x224
    torchdistpackage split torchvision:resnet50 -p 2 -i 4x3x224x224 --costs flops --code
    torchdistpackage split my.models:build_gpt -p 8 -i "2x1024<50257" --meta
    """  # noqa: D301
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
