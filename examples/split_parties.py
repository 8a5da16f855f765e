"""What the split examples share: who is who, how each process gets its own part, and whether the three fit together.

    rank 0   client   Bottom   --+
    rank 1   server   Trunk      |  a pipeline of three ranks; 0 and 2 belong to one party and have a group of their own
    rank 2   client   Top      --+

What goes over all three is plain JSON about the parts: numbers of layers, a hash, an error. The small models are made
on the spot by rank 0, in a directory that the others read, so all three have to be on one machine; with --model DIR or
--parts DIR each reads its own disk.
"""

import json
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from torchdistpackage import check_parts, setup_distributed, tpc
from torchdistpackage.errors import SplitError, TorchDistError
from torchdistpackage.split.parts import ModelFactory, load_split_model
from torchdistpackage.topology.exchange import broadcast_json, gather_json

COMPONENTS = ("bottom", "trunk", "top")
END = "<end>"  # of a line, and what rows are padded with


@dataclass(frozen=True)
class Party:
    """This process: which part it runs, where, and what only the client's two processes hear."""

    component: str
    device: torch.device
    client: Any

    @property
    def is_client(self):
        return self.component != "trunk"


def take_part(script):
    """Joins the pipeline; ends the run, on every rank, unless there are three."""
    rank, processes, *_ = setup_distributed()
    if processes != len(COMPONENTS):
        raise SystemExit(
            f"three processes are needed, for bottom, trunk and top; {processes} run here. Start it by\n"
            f"    torchrun --standalone --nproc-per-node 3 examples/{script}"
        )
    tpc.setup_process_groups([("pipe", processes)])
    logging.disable_progress_bar()  # of the files that each process reads
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # on CPU the same number of threads gives the same bits
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Party(COMPONENTS[rank], device, dist.new_group([0, 2], backend="gloo"))


def together(work):
    """What work() returns; if it fails on any rank, every rank ends with all that went wrong, and none waits."""
    found, wrong = None, ""
    try:
        found = work()
    except (TorchDistError, OSError, ValueError) as error:
        wrong = str(error)
    reasons = {}
    for component, reason in zip(COMPONENTS, everyones(wrong), strict=True):
        if reason:
            reasons.setdefault(reason, []).append(component)
    if reasons:
        raise SystemExit("; ".join(f"{', '.join(who)}: {reason}" for reason, who in reasons.items()))
    return found


def everyones(value):
    """What each of the three says, on every rank: plain data, nothing secret."""
    return gather_json(value, tpc.get_control_group("pipe"))


def tell_all(value=None):
    """What the Bottom says, on every rank."""
    return broadcast_json(value, tpc.get_control_group("pipe"))


@contextmanager
def model_directory(model, make):
    """--model, or a directory in which the Bottom's process makes a model; it is there until all have come to the end.

    Args:
        model: The directory, or None.
        make: Writes a model to the directory that it gets.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if model is None and tpc.is_first_in_pipeline_group():
            make(Path(scratch))
        yield Path(tell_all(scratch if model is None else str(model)))
        dist.barrier(tpc.get_control_group("pipe"))


def own_part(party, directory, at, parts=None):
    """This process's part, from its own file or out of a whole model; nothing of the other parts is read.

    Args:
        party: This process.
        directory: Of the whole model.
        at: First layer of the Trunk and of the Top.
        parts: Of the files of parts, instead.
    """

    def load():
        if parts is not None:
            part = load_split_model(parts / f"{party.component}.safetensors", device=party.device)
        else:
            options = {"device": party.device, "parts": [party.component], "dtype": torch.float32}
            made = ModelFactory.create_split_models("auto", directory, *at, **options)
            part = made[COMPONENTS.index(party.component)]
        if part.sends_token_ids:
            raise SplitError("layers of this model look at token ids, so that the Trunk would be sent all of them")
        return part

    part = together(load)
    try:
        check_parts(part)
    except SplitError as error:
        raise SystemExit(str(error)) from None
    size = f"{part.num_parameters():,} parameters, {part.memory_footprint_mb():.2f} MB"
    line = f"{party.component:6} has layers {part.start_layer}..{part.end_layer - 1}, {size}\n"
    print(line, end="", flush=True)  # in one piece: three processes print at the same time
    return part


def two_numbers(text):
    """--at 2,4"""
    first, second = text.split(",")
    return int(first), int(second)


def cut_in_three(args, directory):
    """--at, or thirds of the layers."""
    if args.at:
        return args.at
    config = json.loads((directory / "config.json").read_text())
    layers = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), 0)
    third = max(1, layers // 3)
    return third, layers - third


def character_tokenizer(texts):
    """A token for each character, and one for the end of a line."""
    vocabulary = {character: number for number, character in enumerate([END, *sorted({*"".join(texts)})])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))  # nothing is merged
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def load_tokenizer(directory):
    """Of a directory, with something to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
