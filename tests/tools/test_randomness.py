"""Every generator repeats, and cuDNN stays on."""

import logging
import random

import numpy as np
import pytest
import torch

from torchdistpackage.tools import fix_rand


@pytest.fixture(autouse=True)
def cudnn_as_before():
    flags = torch.backends.cudnn
    before = flags.enabled, flags.deterministic, flags.benchmark
    yield
    flags.enabled, flags.deterministic, flags.benchmark = before


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_seed_gives_the_same_numbers_everywhere():
    assert fix_rand(3) == 2225
    first = draw()
    assert fix_rand(0, seed=2225) == 2225
    assert draw() == first
    fix_rand(4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_cudnn_is_deterministic_but_not_off(capsys, caplog):
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark = True, True
    with caplog.at_level(logging.INFO):
        fix_rand()
    flags = torch.backends.cudnn
    assert (flags.enabled, flags.deterministic, flags.benchmark) == (True, True, False)
    assert capsys.readouterr().out == ""
    assert "random seed 2222" in caplog.text


@pytest.mark.parametrize(("rank", "seed"), [(-1, 0), (0, 2**32)])
def test_seeds_that_numpy_does_not_take_are_refused(rank, seed):
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        fix_rand(rank, seed=seed)
