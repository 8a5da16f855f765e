"""The examples in docstrings run, where they need no processes."""

import doctest
import importlib

import pytest

MODULES = [
    "errors",
    "schedule.action",
    "schedule.placement",
    "schedule.plan",
    "schedule.lowering",
    "schedule.registry",
    "schedule.verify",
    "schedule.recipes.gpipe",
    "schedule.recipes.one_f_one_b",
    "runtime.microbatch",
    "runtime.loopback",
    "runtime.executor",
    "topology.rank_table",
    "split.boundaries",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"torchdistpackage.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0
