"""Checkpoints as files: whole or not there at all, whenever the processes that write them are killed.

    run/step-00000120/stage-0-replica-0.pt       one process's part: a temporary file, flushed to the disk, then renamed
                      stage-1-replica-0.pt
                      manifest.json              bytes and SHA-256 of every part; one process writes it, after all parts

A folder counts if it has a manifest and each part has the size and the hash that stand there. Nothing else is believed:
not that a file exists, nor that a folder is the newest. So a step may be written again over whatever a killed run left
in its folder: until the new manifest is there, the old one does not fit the new parts.

What is in a part, who writes which, and when all have written, is for the training loop::

    write_part(folder, "stage-0-replica-0.pt", lambda file: torch.save(state, file))     # on every rank
    dist.barrier()
    finish(folder, [names of all parts], keep=2)                                          # on one rank

The first part of this file knows files only. The second has what a run needs beside files to be repeatable: ranks that
agree on one checkpoint, random numbers that can be set back, and data that are the same after any number of restarts.
"""

import hashlib
import json
import os
import random
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler

MANIFEST = "manifest.json"
SIDECAR = ".sha256.json"  # what a part's writer tells the writer of the manifest


def step_folder(output, step):
    return Path(output) / f"step-{step:08d}"


def step_of(folder):
    """The number in a folder's name; None for what is not a checkpoint."""
    found = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(found[1]) if found else None


def write_part(folder, name, save):
    """Writes one part, `save(file)`, and beside it the part's size and hash."""
    folder.mkdir(parents=True, exist_ok=True)
    _sync_folder(folder.parent)
    _replace(folder / (name + SIDECAR), json.dumps(_replace(folder / name, save)))


def finish(folder, names, keep):
    """Makes a checkpoint of the parts that are all written, then deletes what is older than the newest `keep`.

    The one that is just written always stays. Older ones without a manifest, or with parts that are missing or cut
    off, do not count as kept: they go. Newer ones are left alone: they were torn when this run began, or it would have
    gone on from them, and it will write them again.
    """
    parts = {name: json.loads((folder / (name + SIDECAR)).read_bytes()) for name in names}
    _replace(folder / MANIFEST, json.dumps({"parts": parts}, indent=1))
    for file in folder.iterdir():
        if file.is_file() and file.name not in (MANIFEST, *parts):  # sidecars, and what a killed run left
            file.unlink()
    older = [other for other in _folders(folder.parent) if step_of(other) < step_of(folder)]
    kept = [other for other in older if why_torn(other, hashes=False) is None][: max(0, keep - 1)]
    for other in older:
        if other not in kept:
            (other / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted must not look like a checkpoint
            shutil.rmtree(other, ignore_errors=True)  # what resists is tried again after the next checkpoint


def tell(text):
    print(text, flush=True)  # at once: what is still in a buffer is lost when the process is killed


def newest(output, warn=tell):
    """The folder of the newest good checkpoint, or None; `warn` is told of each newer one that is torn, and why."""
    for folder in _folders(output):
        reason = why_torn(folder)
        if reason is None:
            return folder
        warn(f"skipped {folder.name}: {reason}")
    return None


def load_parts(folder):
    """What is in the parts of a good checkpoint, by their names; tensors stay on the CPU."""
    names = json.loads((folder / MANIFEST).read_bytes())["parts"]
    return {name: torch.load(folder / name, map_location="cpu", weights_only=True) for name in names}


def why_torn(folder, hashes=True):
    """What is wrong with a checkpoint, in words; None if it is good. Without `hashes` only sizes are compared."""
    try:
        parts = json.loads((folder / MANIFEST).read_bytes())["parts"]
        expected = {name: (part["bytes"], part["sha256"]) for name, part in parts.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or not ours
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, (size, digest) in expected.items():
        try:
            with open(folder / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if hashes and _digest(file) != digest:
                    return f"{name} has another SHA-256 than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None if expected else f"{MANIFEST} names no parts"


def write_text(path, text):
    """Puts a text file in place of another at one moment: a reader, and a killed run, has the old or the new one."""
    _replace(Path(path), text)


class _Hashed:
    """A binary file that counts and hashes what is written to it, as `torch.save` does: from front to back."""

    def __init__(self, file):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def _replace(path, content):
    """Writes text, or what `content(file)` writes, to a temporary file, and renames it when it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        hashed = _Hashed(file)
        content(hashed) if callable(content) else hashed.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)
    return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}


def _digest(file):
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder):
    """Puts the names in a folder on the disk: a file whose name is lost is lost, however well it was written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folders(output):
    """All checkpoint folders, whole or not, the newest first."""
    found = [folder for folder in Path(output).glob("step-*") if step_of(folder) is not None and folder.is_dir()]
    return sorted(found, key=step_of, reverse=True)


# --- what else a run needs to be repeatable: ranks that agree, random numbers that can be set back --------------------


def newest_for_all_ranks(output, device):
    """The folder that every rank goes on from: rank 0 looks at the files and says which. None: from the beginning."""
    found, restarts = None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if dist.get_rank() == 0:
        if restarts != "0":
            tell(f"restart {restarts}: torchrun says above which process ended, and how")
        found = newest(output) if output else None
        if restarts != "0" and found is None:
            tell("there is no whole checkpoint yet: from the beginning")
    number = torch.tensor(-1 if found is None else step_of(found), device=device)
    dist.broadcast(number, 0)
    return None if number < 0 else step_folder(output, int(number))


def seed_all(*numbers):
    """Seeds the generators of Python, numpy and torch from whole numbers, such as (seed, epoch, step, rank)."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.manual_seed(int(words[0]))


def random_states():
    """The states of these generators, as values that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_states(states):
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


class RepeatableDataset(Dataset):
    """A data set whose random transforms depend on (seed, epoch, index) only, not on what was loaded before."""

    def __init__(self, data, seed):
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        before = random_states()
        seed_all(self.seed, self.epoch, index)
        try:
            return self.data[index]
        finally:
            set_random_states(before)  # without worker processes this is the one that trains


class ResumableSampler(DistributedSampler):
    """Passes over the first `skip` rows of an epoch without loading them."""

    skip = 0

    def set_epoch(self, epoch, skip=0):
        super().set_epoch(epoch)
        self.skip = skip

    def __iter__(self):
        return islice(super().__iter__(), self.skip, None)
