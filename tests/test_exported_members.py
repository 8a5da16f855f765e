"""The public surface: every name in `__all__` exists, lists are complete, and the root stays lazy."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import torchdistpackage

ROOMS = [m.name for m in pkgutil.walk_packages(torchdistpackage.__path__, "torchdistpackage.")]


@pytest.mark.parametrize("name", ["torchdistpackage", *ROOMS])
def test_all_names_exist(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    for member in listed:
        assert hasattr(module, member), f"{name}.{member}"


def test_the_root_lists_what_it_loads():
    assert set(torchdistpackage.__all__) == set(torchdistpackage._ROOM)
    assert set(torchdistpackage.__all__) <= set(dir(torchdistpackage))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = torchdistpackage.nonsense


def test_the_apis_spelling_of_the_original():
    from torchdistpackage.parallel import flatten_model, forward_backward, partition_uniform  # noqa: F401
    from torchdistpackage.parallel.clip_grad_parallel import clip_grad_norm_  # noqa: F401
    from torchdistpackage.parallel.pipeline_sched import forward_backward as same
    from torchdistpackage.parallel.pipeline_sched import forward_eval  # noqa: F401

    assert torchdistpackage.forward_backward is same is forward_backward


def test_importing_the_root_does_not_import_torch():
    code = "import sys, torchdistpackage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
