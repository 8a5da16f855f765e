"""The API pages have every public name, once."""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from page_session import ROOT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
DOCUMENTED = re.findall(r"^\.\. auto(?:class|function):: (\S+)", "\n".join(PAGES.values()), re.MULTILINE)
ROOMS = "errors schedule visualize topology runtime split split.parts parallel tools checkpoint trainer".split()


def resolved(path: str) -> Any:
    """The object that a dotted name means."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public() -> Iterator[tuple[str, Any]]:
    """Functions and classes of the package's and the rooms' `__all__`."""
    for room in ["torchdistpackage", *(f"torchdistpackage.{room}" for room in ROOMS)]:
        module: ModuleType = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                yield f"{room}.{name}", value


def test_every_public_name_is_on_a_page() -> None:
    there = {id(resolved(path)) for path in DOCUMENTED}
    named = {name for page in PAGES.values() for name in re.findall(r"`(\w+)`", page)}
    missing = {path for path, value in public() if id(value) not in there and path.rpartition(".")[2] not in named}
    families = re.compile(r"torchdistpackage\.split\.parts\.(GPT2|Gemma|Qwen2)\w+Model")  # named together on the page
    assert not [path for path in sorted(missing) if not families.fullmatch(path)]


def test_no_name_is_there_twice() -> None:
    counted = Counter(id(resolved(path)) for path in DOCUMENTED)
    assert not [path for path in DOCUMENTED if counted[id(resolved(path))] > 1]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_says_what_it_is_about(page: str) -> None:
    title, _, text = PAGES[page].partition("\n")
    assert title.startswith("# ")
    assert len(text.strip().split("\n\n")[0]) > 20
