"""CONTRIBUTING.md names what there is; the patches that its pages show apply to this tree and pass its tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from page_session import ROOT

FOLDER = ROOT / "docs" / "contributing"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# What of the tests is run, by name: those that a patch adds, and those that are there and take what it adds.
TESTS = {
    "add-a-schedule": (
        "kfkb or k_forward_k_backward or groups_of_one or list_has_a_line",
        "tests/schedule tests/visualize tests/cli/test_commands.py tests/runtime/test_transparency.py "
        "tests/runtime/test_failure.py tests/test_doctests.py tests/test_exported_members.py",
    ),
    "add-a-model-family": (
        "nanogpt or registered or brings_three or public_name or parts]",
        "tests/split/parts/test_nanogpt.py tests/split/parts/test_parts_registry.py tests/test_doctests.py "
        "tests/test_exported_members.py tests/docs/test_api_pages.py",
    ),
    "add-a-transport": (
        "folder or public_name or runtime]",
        "tests/runtime/test_folder.py tests/test_doctests.py tests/test_exported_members.py "
        "tests/docs/test_api_pages.py",
    ),
}


def copied(folder: Path) -> Path:
    """The tree, as far as a patch and its tests need it."""
    for name in ("torchdistpackage", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *command: str) -> str:
    """What a command prints that has to succeed in the copy; no repository around the copy takes it for its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def patched(folder: Path, example: str) -> list[str]:
    """Applies a patch to a copy; the Python files that it changes or adds."""
    run(copied(folder), "git", "apply", str(FOLDER / f"{example}.patch"))
    text = (FOLDER / f"{example}.patch").read_text(encoding="utf-8")
    return re.findall(r"^\+\+\+ b/(\S+\.py)$", text, re.MULTILINE)


def test_every_script_and_every_benchmark_is_in_the_guide() -> None:
    programs = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]
    named = [f"scripts/{path.name}" for path in programs]
    named += [f"benchmarks/{path.parent.name}/bench.py" for path in (ROOT / "benchmarks").glob("*/README.md")]
    assert not [name for name in named if not re.search(rf"^\| .*\b{name}\b.* \|$", GUIDE, re.MULTILINE)]


def test_files_that_the_guide_names_exist() -> None:
    named = re.findall(r"(?:`|\(|python |torchrun )((?:benchmarks|docs|tests)/[\w/.-]+)", GUIDE)
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_guide_draws_the_rooms_as_they_are_checked() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r"layers = \[(.*?)\]", pyproject, re.DOTALL)
    drawn = " -> ".join(re.findall(r'"(.*)"', layers[1].replace("torchdistpackage.", ""))) if layers else ""
    assert f"\n{drawn}\n" in GUIDE


def test_every_patch_is_shown_on_a_page_and_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.patch")} == TESTS.keys()
    for example in TESTS:
        page = (FOLDER / f"{example}.md").read_text(encoding="utf-8")
        assert f"```{{literalinclude}} {example}.patch\n" in page


@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", TESTS)
def test_a_patch_applies_and_passes_the_tests(example: str, tmp_path: Path) -> None:
    files = patched(tmp_path, example)
    chosen, places = TESTS[example]
    run(tmp_path, sys.executable, "-m", "ruff", "check", *files)
    run(tmp_path, sys.executable, "-m", "ruff", "format", "--check", *files)
    run(tmp_path, "lint-imports", "--no-cache")
    added = re.findall(r"^\+def (test_\w+)", (FOLDER / f"{example}.patch").read_text(encoding="utf-8"), re.MULTILINE)
    told = run(tmp_path, sys.executable, "-m", "pytest", "-rp", "-p", "no:cacheprovider", "-k", chosen, *places.split())
    assert added
    assert not [name for name in added if not re.search(rf"^PASSED \S+::{name}\b", told, re.MULTILINE)], told


@pytest.mark.slow
def test_all_patches_together_pass_scripts_check(tmp_path: Path) -> None:
    copied(tmp_path)
    run(tmp_path, "git", "init", "-q")
    for example in TESTS:
        run(tmp_path, "git", "apply", str(FOLDER / f"{example}.patch"))
    run(tmp_path, "git", "add", "-A")
    assert "all good" in run(tmp_path, "scripts/check")
