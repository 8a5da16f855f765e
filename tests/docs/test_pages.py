"""Each page of the documentation does what it says (page_session.py: how a page is run)."""

from pathlib import Path

import pytest
from distributed_harness import run_distributed
from page_session import ROOT, RUN, fences, is_run, run_page

DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md") if "_build" not in path.parts)
WITH_CODE = [page for page in PAGES if any(map(is_run, fences((ROOT / page).read_text(encoding="utf-8"))))]
NOT_OF_A_LAUNCHER = dict.fromkeys(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WITH_CODE)
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    (done,) = run_distributed(run_page, 1, str(ROOT / page), str(tmp_path), timeout=580, env=NOT_OF_A_LAUNCHER)
    assert done > 0


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page: str) -> None:
    for fence in fences((ROOT / page).read_text(encoding="utf-8")):
        assert is_run(fence) or fence.language not in RUN or fence.says["not run"], f"{page}:{fence.line}"
