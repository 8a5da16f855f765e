"""checkpoint inspect, export and verify: what is in a folder, is it whole, and as files that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchdistpackage.cli.checkpoint_facts import facts_of, print_facts, print_tensors, size, when
from torchdistpackage.cli.output import one_message, print_table
from torchdistpackage.errors import CheckpointError

if TYPE_CHECKING:
    from torchdistpackage.checkpoint.inspection import CheckpointInfo

__all__ = ["export", "inspect", "verify"]


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor: shape, type, and the pieces it was written in.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@one_message
def inspect(path: Path, tensors: bool, as_json: bool) -> None:
    """Print what a checkpoint holds, or which checkpoints a run has. Contents are not read, only sizes.

    \b
    torchdistpackage checkpoint inspect run
    torchdistpackage checkpoint inspect run/step-00000120 --tensors
    """  # noqa: D301
    found = _of_run(path)
    if found and tensors:
        one = next((info.path for info in found if info.fault is None), found[0].path)
        raise CheckpointError(f"{path} is the folder of a run; give one of its checkpoints, such as {one}")
    if found and as_json:
        click.echo(json.dumps([_said(info) for info in found], indent=2))
    elif found:
        rows = [
            [info.path.name, when(info.time), size(info.nbytes) if info.nbytes else "", _state(info)] for info in found
        ]
        print_table(["checkpoint", "written", "size", "state"], rows, right=[2])
    else:
        _inspect_one(path, tensors, as_json)


def _inspect_one(path: Path, tensors: bool, as_json: bool) -> None:
    from torchdistpackage.checkpoint.inspection import inspect_checkpoint, verify_checkpoint

    manifest = inspect_checkpoint(path)
    facts = facts_of(path, manifest, verify_checkpoint(path, hashes=False))
    pieces = _pieces(path) if tensors else {}
    if as_json:
        listed = {
            key: {"shape": one.shape, "dtype": one.dtype, "bytes": one.nbytes, "pieces": pieces[key]}
            for key, one in (manifest.tensors.items() if tensors else ())
        }
        click.echo(json.dumps({**facts, "tensors": listed} if tensors else facts, indent=2))
    elif tensors:
        print_tensors(manifest, pieces)
    else:
        print_facts(facts, manifest)


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@one_message
def verify(path: Path) -> None:
    """Read every file of a checkpoint, or of all checkpoints of a run, and compare sizes and hashes.

    Prints a line for each checkpoint, and ends with status 1 if one of them is torn.

    \b
    torchdistpackage checkpoint verify run/step-00000120
    torchdistpackage checkpoint verify run
    """  # noqa: D301
    from torchdistpackage.checkpoint.folder import what_it_is
    from torchdistpackage.checkpoint.inspection import verify_checkpoint

    paths = [info.path for info in _of_run(path)]
    if not paths and (reason := what_it_is(path)) is not None:
        raise CheckpointError(f"{path} is no whole checkpoint: {reason}")
    paths = paths or [path]
    width = max(len(one.name) for one in paths)
    torn = 0
    for one in paths:
        fault = verify_checkpoint(one)
        torn += fault is not None
        click.echo(f"{one.name:<{width}}  {_whole(one) if fault is None else f'torn: {fault}'}")
    if torn:
        raise click.exceptions.Exit(1)


@click.command("export")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of a file: bytes, or 500MB, 5GB, 2GiB.")
@click.option("--dtype", help="Convert floating tensors: float32, bfloat16 or float16.  [default: as they are]")
@click.option("--aliases", is_flag=True, help="Write a tied parameter under each of its names, not only the first.")
@click.option("--verify", "hashes", is_flag=True, help="Compare hashes before; else sizes.")
@one_message
def export(path: Path, out: Path, max_shard_size: str, dtype: str | None, aliases: bool, hashes: bool) -> None:
    """Write the weights of a checkpoint, or of a run's newest whole one, as safetensors in the layout of Hugging Face.

    Where the checkpoint has the config.json of a language model of transformers, from_pretrained loads OUT. Any other
    model's tensors have the names of its own state dict.

    \b
    torchdistpackage checkpoint export run out --dtype bfloat16
    torchdistpackage checkpoint export run/step-00000120 out --max-shard-size 2GB
    """  # noqa: D301
    from torchdistpackage.checkpoint.export import export_safetensors

    report = export_safetensors(path, out, max_shard_size=max_shard_size, dtype=dtype, aliases=aliases, verify=hashes)
    files = f"{len(report.files)} files" if len(report.files) > 1 else report.files[0]
    click.echo(f"wrote {out}: {files}, {report.num_tensors} tensors, {size(report.num_bytes)}")


def _of_run(path: Path) -> list[CheckpointInfo]:
    """The checkpoints of a run, the newest first; none if the path is not the folder of one."""
    from torchdistpackage.checkpoint.inspection import list_checkpoints

    return list_checkpoints(path) if path.is_dir() else []


def _state(info: CheckpointInfo) -> str:
    return "whole" if info.fault is None else f"torn: {info.fault}"


def _said(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "step": info.step,
        "time": info.time,
        "bytes": info.nbytes,
        "fault": info.fault,
    }


def _whole(path: Path) -> str:
    from torchdistpackage.checkpoint.inspection import inspect_checkpoint

    manifest = inspect_checkpoint(path)
    return f"whole: {len(manifest.files)} files, {size(manifest.nbytes)}"


def _pieces(path: Path) -> dict[str, list[str]]:
    """Key -> the pieces that a tensor was written in, as rows and columns."""
    from torchdistpackage.checkpoint.tensor_files import TensorFiles

    files = TensorFiles(path)
    found: dict[str, list[str]] = {}
    for key in files.keys:
        boxes = files.chunks(key)
        ranges = [[f"{a}:{a + n}" for a, n in zip(box.offsets, box.sizes, strict=True)] for box in boxes]
        found[key] = ["whole"] if len(boxes) == 1 else [f"[{', '.join(one)}]" for one in ranges]
    return found
