"""The examples in docstrings run: where they need process groups, in a pipeline of one rank."""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import tempfile

import pytest
from distributed_harness import run_distributed

import torchdistpackage

WITHOUT_PROCESSES = ("checkpoint", "cli", "errors", "runtime", "schedule", "split", "tools", "topology", "visualize")
IN_A_PIPELINE_OF_ONE = ("parallel", "trainer")


def modules(rooms):
    for module in pkgutil.walk_packages(torchdistpackage.__path__, "torchdistpackage."):
        if module.name.removeprefix("torchdistpackage.").startswith(rooms):
            yield module.name


def failed(name):
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    return doctest.testmod(importlib.import_module(name), optionflags=options).failed


@pytest.mark.parametrize("name", list(modules(WITHOUT_PROCESSES)))
def test_docstrings(name):
    assert failed(name) == 0


def failures_in_a_pipeline_of_one(rank, world, names):
    from torchdistpackage import setup_distributed, tpc

    setup_distributed("gloo")
    tpc.setup_process_groups([("data", 1), ("pipe", 1)])
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(told):
        os.chdir(folder)  # some examples write files
        wrong = [name for name in names if failed(name)]
        os.chdir("/")
    return wrong, told.getvalue()


@pytest.mark.parametrize("room", IN_A_PIPELINE_OF_ONE)
def test_docstrings_that_need_process_groups(room):
    wrong, told = run_distributed(failures_in_a_pipeline_of_one, 1, list(modules(room)), timeout=150)[0]
    assert not wrong, told


def test_examples_are_found():
    found = [importlib.import_module(name) for name in modules(WITHOUT_PROCESSES + IN_A_PIPELINE_OF_ONE)]
    assert sum(len(test.examples) for module in found for test in doctest.DocTestFinder().find(module)) > 700
