"""What `checkpoint inspect` says of one checkpoint: facts of its manifest, as JSON and as text.

The manifest is enough for all but where the pieces of tensors lie and what the user's own values are called; only for
these torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchdistpackage.cli.output import print_table

if TYPE_CHECKING:
    from torchdistpackage.checkpoint.manifest import Manifest, TensorFacts

__all__ = ["facts_of", "print_facts", "print_tensors", "size", "when"]

_BIGGEST = 8


def size(num_bytes: float) -> str:
    """Bytes with a decimal unit.

    Example:
        >>> size(999), size(1_250_000), size(5e9)
        ('999 B', '1.2 MB', '5.0 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.95:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def when(seconds: float | None) -> str:
    """A time of this machine's clock; nothing where it is not known."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def facts_of(path: Path, manifest: Manifest, fault: str | None) -> dict[str, Any]:
    """All that `inspect` knows of a checkpoint without its tensors, as JSON can say it.

    Args:
        path: Its folder.
        manifest: Of it.
        fault: Why it is torn, if it is.
    """
    shared = _shared(path) if fault is None else {}
    kinds: dict[str, dict[str, TensorFacts]] = {}
    for key, tensor in manifest.tensors.items():
        kinds.setdefault(key.partition(".")[0], {})[key] = tensor
    return {
        "path": str(path),
        "step": manifest.step,
        "time": manifest.time,
        "fault": fault,
        "layout": manifest.layout,
        "torch": manifest.torch,
        "files": {"count": len(manifest.files), "bytes": manifest.nbytes},
        "kinds": {kind: _totals(tensors) for kind, tensors in kinds.items()},
        "optimizer_states": _states(manifest),
        "aliases": {name: [other for other in names if other != name] for name, names in manifest.aliases.items()},
        "optimizers": _optimizers(shared),
        "extra": [str(key) for key in shared.get("extra") or ()] if isinstance(shared.get("extra"), dict) else [],
        "objects": [*shared.get("objects", ())],
    }


def print_facts(facts: Mapping[str, Any], manifest: Manifest) -> None:
    """The same as text, and the biggest tensors.

    Args:
        facts: Of `facts_of`.
        manifest: Of the checkpoint.
    """
    lines = [
        ("step", f"{facts['step']}"),
        ("written", when(facts["time"])),
        (
            "whole",
            "yes, by its sizes (verify compares contents)" if facts["fault"] is None else f"no: {facts['fault']}",
        ),
        ("layout", facts["layout"]),
        ("torch", facts["torch"]),
        ("files", f"{facts['files']['count']}, {size(facts['files']['bytes'])}"),
        *((kind, _words(totals)) for kind, totals in facts["kinds"].items() if kind != "random"),
        ("state", _counted(facts["optimizer_states"])),
        ("groups", "; ".join(facts["optimizers"])),
        ("tied", ", ".join(f"{name} = {' = '.join(others)}" for name, others in facts["aliases"].items())),
        ("extra", ", ".join(facts["extra"])),
        ("objects", ", ".join(facts["objects"])),
        ("random", _ranks(manifest)),
    ]
    lines = [(name, value) for name, value in lines if value]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")
    shown = [(key, tensor) for key, tensor in manifest.tensors.items() if not key.startswith("random.")]
    ordered = sorted(shown, key=lambda item: -item[1].nbytes)
    if ordered:
        click.echo(f"\nthe biggest of {len(ordered)} tensors" if len(ordered) > _BIGGEST else "")
        rows = [[key, *_cells(tensor)] for key, tensor in ordered[:_BIGGEST]]
        print_table(["tensor", "shape", "dtype", "size"], rows, right=[3])


def print_tensors(manifest: Manifest, pieces: Mapping[str, Sequence[str]]) -> None:
    """A line for each tensor.

    Args:
        manifest: Of the checkpoint.
        pieces: Key -> the pieces that it was written in, in words.
    """
    from torchdistpackage.checkpoint.safetensors_writing import natural_order

    def place(key: str) -> tuple[bool, tuple[tuple[int, str], ...]]:
        return key.startswith("random."), natural_order(key)

    ordered = {key: manifest.tensors[key] for key in sorted(manifest.tensors, key=place)}
    rows = [[key, *_cells(tensor), _first(pieces.get(key, ()))] for key, tensor in ordered.items()]
    print_table(["tensor", "shape", "dtype", "size", "pieces"], rows, right=[3])


def _first(pieces: Sequence[str], most: int = 4) -> str:
    rest = f"  and {len(pieces) - most} more" if len(pieces) > most else ""
    return "  ".join(pieces[:most]) + rest


def _cells(tensor: TensorFacts) -> list[str]:
    return ["x".join(map(str, tensor.shape)) or "one number", tensor.dtype, size(tensor.nbytes)]


def _totals(tensors: Mapping[str, TensorFacts]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "elements": sum(one.numel for one in tensors.values()),
        "bytes": sum(one.nbytes for one in tensors.values()),
        "dtypes": sorted({one.dtype for one in tensors.values()}),
    }


def _words(totals: Mapping[str, Any]) -> str:
    count = f"{totals['tensors']} tensor{'' if totals['tensors'] == 1 else 's'}"
    return f"{count}, {totals['elements']:,} elements, {size(totals['bytes'])}, {' '.join(totals['dtypes'])}"


def _ranks(manifest: Manifest) -> str:
    """Whose random numbers are there."""
    states: dict[str, list[str]] = {}
    for key in manifest.tensors:
        kind, _, rest = key.partition(".")
        if kind == "random":
            states.setdefault(rest.partition(".")[0], []).append(rest.partition(".")[2])
    kinds = sorted({name for names in states.values() for name in names})
    return f"{', '.join(kinds)} of {len(states)} rank{'' if len(states) == 1 else 's'}" if states else ""


def _counted(states: Mapping[str, int]) -> str:
    """Kinds of state, and how many parameters have them."""
    kinds: dict[int, list[str]] = {}
    for entry, count in states.items():
        kinds.setdefault(count, []).append(entry)
    return "; ".join(
        f"{', '.join(entries)} of {count} parameter{'' if count == 1 else 's'}" for count, entries in kinds.items()
    )


def _states(manifest: Manifest) -> dict[str, int]:
    """Kind of an optimizer's state -> how many parameters have it."""
    found: dict[str, int] = {}
    for key in manifest.tensors:
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            entry = rest.rpartition(".")[2]
            found[entry] = found.get(entry, 0) + 1
    return found


def _shared(path: Path) -> Mapping[str, Any]:
    """What is in a checkpoint beside its tensors."""
    from torchdistpackage.checkpoint.job import SHARED
    from torchdistpackage.checkpoint.plain import unpacked

    found = unpacked((path / SHARED).read_bytes())
    return found if isinstance(found, dict) else {}


def _optimizers(shared: Mapping[str, Any]) -> list[str]:
    """Each group of parameters: the optimizer, its learning rate, and how many parameters."""
    found = []
    for group in shared.get("optimizer", {}).get("groups", ()):
        rate = group["options"].get("lr")
        words = [str(group["options"].get("optimizer", "optimizer")), f"{len(group['names'])} parameters"]
        found.append(", ".join(words if rate is None else [*words, f"lr {float(rate):g}"]))
    return found
