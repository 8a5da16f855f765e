"""A checkpoint on disk -> the files of its parts, without ever holding a tensor.

::

    MODEL_DIR/                            OUT/
      config.json                           bottom.safetensors  bottom_metadata.json     embeddings, layers 0, 1
      model-00001-of-00002.safetensors  ->  trunk.safetensors   trunk_metadata.json      layers 2 .. 9
      model-00002-of-00002.safetensors      top.safetensors     top_metadata.json        layers 10, 11, norm, head

`checkpoint_plan.py` finds what goes where, `safetensors_copy.py` moves the bytes, `metadata.py` describes a part, and
this file sees to it that nothing half-written is ever taken for finished. A part is made in this order, and a process
that is killed at any point leaves what the next one goes on with::

    bottom.safetensors.unfinished    copied, then read again         --  gone on with, as far as the source has the same
    bottom.safetensors               renamed                         --  taken back to the line above
    bottom_metadata.json             written last, at once           --  finished: hashes are compared, nothing copied
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.safetensors_header import read_header
from torchdistpackage.split.decoder.weight_files import listed
from torchdistpackage.split.parts.checkpoint_plan import PartPlan, SplitPlan, plan_split
from torchdistpackage.split.parts.metadata import PartMetadata, metadata, metadata_path, weights_path
from torchdistpackage.split.parts.safetensors_copy import Advance, Piece, copy_tensors, hash_of, header_of

__all__ = ["PartFile", "split_checkpoint", "verify_part", "write_parts"]

Progress = Callable[[int, int], None]
"""Is called with the bytes that are done, and all. Each byte counts twice: when it is copied and when it is checked."""


@final
@dataclass(frozen=True)
class PartFile:
    """A part that is on disk, whole and checked.

    Attributes:
        component: "bottom", "trunk" or "top".
        path: Of its tensors.
        metadata_path: Of the JSON file beside them.
        start_layer: Its first layer, counted in the whole model.
        end_layer: The layer after its last one.
        num_tensors: In the file.
        num_bytes: Of its tensors.
        resumed_bytes: Of those that an earlier run had written; equal to num_bytes if it had finished the part.

    Example: see `split_checkpoint`, which returns three.
    """

    component: str
    path: Path
    metadata_path: Path
    start_layer: int
    end_layer: int
    num_tensors: int
    num_bytes: int
    resumed_bytes: int


def split_checkpoint(
    directory: str | os.PathLike[str],
    cut_points: Sequence[int],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> list[PartFile]:
    """Writes bottom, trunk and top of a saved language model as files of their own.

    The tensors keep the names, the layout and the type that they have in the checkpoint; which of them a part needs is
    asked of transformers' own loader. They are copied as bytes, in pieces of a few MiB, so the memory that it takes is
    that of importing transformers. Called again after it was cut short, it goes on where it was.

    Args:
        directory: Where `save_pretrained` wrote, or what the hub gave: config.json and safetensors files.
        cut_points: Layers at which trunk and top begin: 2, 10 for layers 0, 1 | 2 .. 9 | 10, ...
        out: Directory of the parts; made if it is not there.
        overwrite: Whether to delete parts of another model, or of other cuts, that are there.
        progress: Is called with the bytes that are done, and with all; each counts once for the copy and once for the
            check. What it raises ends the work, as a kill would.
        trust_remote_code: As for `from_pretrained`.

    Returns:
        The three files.

    Raises:
        SplitError: The model cannot be cut there; the message says how many layers it has.
        CheckpointError: The checkpoint is incomplete or broken, or there is no space; or `out` has other parts, is a
            file or is the checkpoint itself. The message names files and tensors.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(f"{home.name}/model")
        >>> parts = split_checkpoint(f"{home.name}/model", [1, 3], f"{home.name}/parts")
        >>> [(part.path.name, part.num_tensors, part.resumed_bytes) for part in parts]
        [('bottom.safetensors', 14, 0), ('trunk.safetensors', 24, 0), ('top.safetensors', 15, 0)]
        >>> from torchdistpackage.split.parts import load_split_model
        >>> load_split_model(parts[2].path).start_layer
        3
    """
    plan = plan_split(directory, cut_points, trust_remote_code=trust_remote_code)
    return write_parts(plan, out, overwrite=overwrite, progress=progress)


def write_parts(
    plan: SplitPlan, out: str | os.PathLike[str], *, overwrite: bool = False, progress: Progress | None = None
) -> list[PartFile]:
    """Carries out a plan of `plan_split`; see `split_checkpoint`, which does both.

    Args:
        plan: Which bytes go where.
        out: Directory of the parts.
        overwrite: Whether to delete other parts that are there.
        progress: Is called with the bytes that are done, and with all.

    Raises:
        CheckpointError: As `split_checkpoint`.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(f"{home.name}/model")
        >>> plan = plan_split(f"{home.name}/model", [1, 3])
        >>> [part.component for part in write_parts(plan, f"{home.name}/parts")]
        ['bottom', 'trunk', 'top']
    """
    where = Path(out)
    present = _prepared(plan, where, overwrite)
    done, total = 0, 2 * sum(part.num_bytes for part in plan.parts)

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # a part that turns out to be damaged is done twice
        if progress is not None:
            progress(done, total)

    with _alone_in(where):
        return [_written(part, plan, where, present[part.component] == "finished", advance) for part in plan.parts]


def _written(part: PartPlan, plan: SplitPlan, where: Path, finished: bool, advance: Advance) -> PartFile:
    try:
        return _write_part(part, plan, where, finished, advance)
    except OSError as error:
        raise CheckpointError(
            f"the {part.component} in {where} cannot be written: {error.strerror}; see to the disk, and run the same "
            "command again, which goes on from here"
        ) from error


@contextmanager
def _alone_in(where: Path) -> Iterator[None]:
    """Keeps a second run out of a directory; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not a POSIX system
        yield
        return
    opened = os.open(where, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is splitting into {where} now; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(opened)


def verify_part(path: str | os.PathLike[str]) -> None:
    """Checks that a part is, byte for byte, what was written; for the party that received it.

    Args:
        path: Of its tensors, such as `parts/top.safetensors`; its metadata must be beside it.

    Raises:
        CheckpointError: A file is missing or damaged, or holds other tensors; the message names the file and the
            tensors.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(f"{home.name}/model")
        >>> top = split_checkpoint(f"{home.name}/model", [1, 3], f"{home.name}/parts")[2].path
        >>> verify_part(top)
        >>> _ = top.write_bytes(top.read_bytes()[:-4] + b"torn")
        >>> verify_part(top)
        Traceback (most recent call last):
        ...
        torchdistpackage.errors.CheckpointError: ...top.safetensors is not what was written: ... of 15 tensors differ...
    """
    weights = Path(path)
    about = PartMetadata.read(metadata_path(weights))
    tensors = read_header(weights).tensors
    if missing := about.sha256.keys() - tensors.keys():
        raise CheckpointError(f"{weights} does not hold {listed(missing)}, which its metadata lists; fetch both again")
    if unknown := tensors.keys() - about.sha256.keys():
        raise CheckpointError(f"{weights} also holds {listed(unknown)}, of which its metadata has no hash")
    if wrong := _damaged(weights, about, lambda count: None):
        raise CheckpointError(
            f"{weights} is not what was written: {listed(wrong)} of {len(tensors)} tensors differ; fetch it again"
        )


def _damaged(weights: Path, about: PartMetadata, advance: Advance) -> list[str]:
    """The tensors whose bytes are not those that were written."""
    return [
        name
        for name, entry in read_header(weights).tensors.items()
        if hash_of(name, Piece(weights, entry), advance) != about.sha256[name]
    ]


def _prepared(plan: SplitPlan, where: Path, overwrite: bool) -> dict[str, str]:
    """Makes the directory ready; component -> what is there of it, see `_present`."""
    _check_place(where, plan.directory)
    present = {part.component: _present(part, plan, where) for part in plan.parts}
    foreign = [weights_path(where, name) for name, state in present.items() if state == "foreign"]
    if foreign and not overwrite:
        found = "; ".join(map(_described, foreign))
        raise CheckpointError(
            f"{where} has parts that are not of this split: {found}. Choose another directory, or replace them with "
            "overwrite=True (--overwrite)"
        )
    try:
        _check_space(plan, where, present)
        where.mkdir(parents=True, exist_ok=True)
        for path in foreign:
            metadata_path(path).unlink(missing_ok=True)  # first: without it, nobody takes the rest for a part
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be written: {error.strerror}") from error
    return present


def _check_place(where: Path, source: Path) -> None:
    if where.exists() and not where.is_dir():
        raise CheckpointError(f"{where} is a file; give a directory for the parts")
    if where.exists() and where.samefile(source):
        raise CheckpointError(f"{where} is the checkpoint itself; give another directory for the parts")


def _check_space(plan: SplitPlan, where: Path, present: Mapping[str, str]) -> None:
    """Raises when the disk is too small, before an hour of copying."""
    needed = 0
    for part in plan.parts:
        weights = weights_path(where, part.component)
        needed += 0 if present[part.component] == "finished" else header_of(part.pieces).num_bytes
        for path in (weights, _unfinished(weights)):  # what is there is gone on with, or goes
            needed -= path.stat().st_size if path.is_file() and present[part.component] != "finished" else 0
    parent = next(place for place in (where.absolute(), *where.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"no space for the parts in {where}: they need {needed / 2**20:.0f} MB more, and {free / 2**20:.0f} MB are "
            "free; make room, or choose a directory on another disk"
        )


def _present(part: PartPlan, plan: SplitPlan, where: Path) -> str:
    """What is there of a part: "finished", "begun", "none", or "foreign" when it is of something else."""
    weights = weights_path(where, part.component)
    header = header_of(part.pieces)
    try:
        same_tensors = weights.is_file() and read_header(weights).text == header.text
    except CheckpointError:
        same_tensors = False
    if not metadata_path(weights).exists():
        return "begun" if same_tensors else "foreign" if weights.exists() else "none"
    try:
        about = PartMetadata.read(metadata_path(weights))
    except CheckpointError:
        return "foreign"
    expected = _described_part(part, plan, about.sha256)
    same_cut = (about.component, about.start_layer, about.end_layer, about.total_layers, about.config) == (
        expected.component,
        expected.start_layer,
        expected.end_layer,
        expected.total_layers,
        expected.config,
    )
    if not same_cut or about.sha256.keys() != part.pieces.keys() or about.extra.get("cut_points") != [*plan.cut_points]:
        return "foreign"
    if about.extra.get("source_files") != expected.extra["source_files"] and not all(
        hash_of(name, piece) == about.sha256[name] for name, piece in part.pieces.items()
    ):
        return "foreign"
    return "finished" if same_tensors else "begun"


def _write_part(part: PartPlan, plan: SplitPlan, where: Path, finished: bool, advance: Advance) -> PartFile:
    weights = weights_path(where, part.component)
    beside, unfinished = metadata_path(weights), _unfinished(weights)
    resumed = part.num_bytes
    if not finished or _damaged(weights, PartMetadata.read(beside), lambda count: advance(2 * count)):
        was_finished = beside.exists()
        beside.unlink(missing_ok=True)
        if was_finished and weights.exists():
            # Damaged since: what is right is kept, but not the file, which some process may have mapped.
            shutil.copyfile(weights, unfinished)
        elif weights.exists():  # killed before its metadata was written
            os.replace(weights, unfinished)
        copied = copy_tensors(part.pieces, unfinished, advance)
        _check_opens(unfinished, part)
        os.replace(unfinished, weights)
        _described_part(part, plan, copied.sha256).write(beside)
        resumed = copied.resumed_bytes
    return PartFile(
        component=part.component,
        path=weights,
        metadata_path=beside,
        start_layer=part.start_layer,
        end_layer=part.end_layer,
        num_tensors=len(part.pieces),
        num_bytes=part.num_bytes,
        resumed_bytes=resumed,
    )


def _check_opens(path: Path, part: PartPlan) -> None:
    """Opens a file with the library that its receivers will use."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as opened:  # for torch it maps memory that may not be there
            names: set[str] = {*opened.keys()}  # not a mapping
    except Exception as error:  # the library's own error has no public name in some versions
        raise CheckpointError(f"{path} was written, and safetensors cannot open it: {error}") from error
    if names != part.pieces.keys():
        raise CheckpointError(f"{path} was written, and safetensors finds {len(names)} of {len(part.pieces)} tensors")


def _described_part(part: PartPlan, plan: SplitPlan, sha256: Mapping[str, str]) -> PartMetadata:
    return metadata(
        part.component,
        part.start_layer,
        part.end_layer,
        plan.total_layers,
        plan.config,
        num_parameters=part.num_parameters,
        num_bytes=part.num_bytes,
        dtype=str(plan.dtype),
        sha256=sha256,
        source=plan.directory,
        names="checkpoint",
        extra={
            "cut_points": [*plan.cut_points],
            "source_files": {name: [*stat] for name, stat in plan.files.items()},
            **({} if plan.generation_config is None else {"generation_config": plan.generation_config}),
        },
    )


def _unfinished(weights: Path) -> Path:
    return Path(f"{weights}.unfinished")


def _described(weights: Path) -> str:
    """A part that is in the way, in a few words."""
    try:
        about: Any = PartMetadata.read(metadata_path(weights))
    except CheckpointError:
        if not weights.exists():
            return f"{metadata_path(weights).name}, which cannot be read"
        return f"{weights.name}, without metadata that can be read"
    origin = f" of {about.source}" if about.source else ""
    return f"{weights.name}, {about.model_type}{origin}, layers {about.start_layer} to {about.end_layer - 1}"
