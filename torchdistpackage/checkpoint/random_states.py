"""The random numbers of a rank: the states of all generators that a loop may use, as tensors of whole numbers.

::

    same layout     every rank goes on with its own: random.<rank>.torch, .numpy, .python, .cuda
    another one     new streams, one a rank, made from rank 0's state, the step and the rank:
                    repeatable, and no two ranks alike
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["random_states", "seed_streams", "set_random_states"]


def random_states() -> dict[str, Tensor]:
    """The states of the generators of Python, torch, and where they are in use numpy and this rank's CUDA device.

    Example:
        >>> sorted({"python", "torch"} & random_states().keys())
        ['python', 'torch']
    """
    version, words, gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *_bits(gauss), *words], dtype=torch.int64),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        if name == "MT19937":
            numbers = [int(position), int(has_gauss), _bits(float(cached))[1], *keys.tolist()]
            found["numpy"] = torch.tensor(numbers, dtype=torch.int64)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Goes on from states that `random_states` gave; what is not among them is left alone.

    Example:
        >>> before = random_states()
        >>> first = random.random(), float(torch.rand(()))
        >>> set_random_states(before)
        >>> first == (random.random(), float(torch.rand(())))
        True
    """
    if "torch" in states:
        torch.set_rng_state(states["torch"].to(torch.uint8))
    if "python" in states:
        version, has, bits, *words = states["python"].tolist()
        random.setstate((version, tuple(words), _number(bits) if has else None))
    if "numpy" in states:
        import numpy

        position, has_gauss, bits, *keys = states["numpy"].tolist()
        numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, _number(bits)))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].to(torch.uint8))


def seed_streams(state: Tensor, step: int, rank: int) -> None:
    """Starts all generators anew, from a saved state, a step and a rank.

    Args:
        state: Rank 0's, of torch.
        step: Of the checkpoint.
        rank: This one.
    """
    digest = hashlib.sha256(state.to(torch.uint8).numpy().tobytes() + struct.pack("<qq", step, rank)).digest()
    random.seed(digest)
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(list(struct.unpack("<8I", digest)))


def _bits(value: float | None) -> tuple[int, int]:
    """Whether there is one, and its bits as a whole number: a float of a tensor would do, but not beside large ints."""
    return int(value is not None), struct.unpack("<q", struct.pack("<d", value or 0.0))[0]


def _number(bits: Any) -> float:
    return float(struct.unpack("<d", struct.pack("<q", int(bits)))[0])
