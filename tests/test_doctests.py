"""The examples in docstrings run, where they need no processes."""

import doctest
import importlib
import pkgutil

import pytest

import torchdistpackage

WITHOUT_PROCESSES = (
    *("checkpoint", "cli", "errors", "runtime", "schedule", "split", "tools", "topology", "visualize"),
    *("trainer.argument", "trainer.batch", "trainer.callbacks", "trainer.losses", "trainer.feed", "trainer.optimizers"),
    *("trainer.progress_table", "trainer.run_state", "trainer.seeded_data", "trainer.splitting", "trainer.stages"),
)


def modules():
    for module in pkgutil.walk_packages(torchdistpackage.__path__, "torchdistpackage."):
        if module.name.removeprefix("torchdistpackage.").startswith(WITHOUT_PROCESSES):
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_examples_are_found():
    found = [importlib.import_module(name) for name in modules()]
    assert sum(len(test.examples) for module in found for test in doctest.DocTestFinder().find(module)) > 40
