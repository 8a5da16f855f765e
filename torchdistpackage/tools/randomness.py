"""One seed for every random number generator, so that two runs give the same numbers."""

from __future__ import annotations

import logging
import random

import torch

__all__ = ["fix_rand"]

_LIMIT = 2**32  # numpy takes no larger seed

logger = logging.getLogger(__name__)


def fix_rand(rank: int = 0, *, seed: int = 2222) -> int:
    """Seeds Python, numpy (if installed) and torch on every device, and makes cuDNN choose deterministic kernels.

    Pass a rank where ranks should draw different numbers (data augmentation, dropout), and the same number on every
    rank where they should agree (initial weights). cuDNN stays enabled. Three things are left to you:
    `torch.use_deterministic_algorithms(True)`, which raises where an operation has no deterministic kernel;
    `PYTHONHASHSEED`, which Python reads when it starts; the workers of a DataLoader, which seed themselves.

    Args:
        rank: Added to the seed.
        seed: The seed of rank 0.

    Returns:
        The seed that was set, `seed + rank`.

    Raises:
        TypeError: One of them is no whole number.
        ValueError: `seed + rank` is negative, or needs more than 32 bits.

    Example:
        >>> fix_rand()
        2222
        >>> once = torch.rand(2)
        >>> fix_rand(rank=3, seed=0), fix_rand()
        (3, 2222)
        >>> torch.equal(torch.rand(2), once)
        True
    """
    if not isinstance(rank, int) or not isinstance(seed, int):
        raise TypeError(f"rank and seed must be whole numbers, got {rank!r} and {seed!r}")
    number = seed + rank
    if not 0 <= number < _LIMIT:
        raise ValueError(
            f"seed + rank must be from 0 to {_LIMIT - 1}, got {seed} + {rank} = {number}: choose another seed"
        )
    random.seed(number)
    try:
        import numpy as np
    except ModuleNotFoundError:
        pass
    else:
        np.random.seed(number)
    torch.manual_seed(number)  # the CPU and every CUDA device, those included that are not initialised yet
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # choosing by stop watch may choose differently in every run
    logger.info("random seed %d (seed %d, rank %d)", number, seed, rank)
    return number
