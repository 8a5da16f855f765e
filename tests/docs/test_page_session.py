"""Pages that are wrong are noticed."""

from pathlib import Path

import pytest
from page_session import fences, is_run, run_page

PAGE = """
# A page

```python
numbers = [1, 2]
```

```python
>>> sum(numbers)
3
```

```python
# twice.py
import sys
```

Between them there is text.

```python
# half.py
def of(number):
    return number // 2
```

```python
# twice.py, continued
print(2 * int(sys.argv[1]))
```

```python
>>> import half
>>> half.of(8)
4
```

```console
$ python twice.py \\
>     4
8
$ python twice.py 5
1...
```

<!-- status: 1 -->
```console
$ python -c 'raise SystemExit("too small")'
too small
```

<!-- file: plan.csv -->
```csv
0F0,0B0
```

```bash
test -s plan.csv
```

<!-- not run: it would take a week -->
```bash
sleep 604800
```

<!-- needs: a_package_that_nobody_has -->
```bash
false
```
"""


def run(text: str, folder: Path) -> int:
    page = folder / "page.md"
    page.write_text(text)
    place = folder / "place"
    place.mkdir()
    return run_page(0, 1, str(page), str(place))


@pytest.fixture(autouse=True)
def _back_to_this_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_page_is_run_from_the_top_to_the_bottom(tmp_path: Path) -> None:
    assert run(PAGE, tmp_path) == 10


def test_lines_are_those_of_the_page() -> None:
    for fence in fences(PAGE):
        assert PAGE.splitlines()[fence.line - 1].startswith("```")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("\n8\n", "\n9\n"),  # another output
        (">>> sum(numbers)\n3", ">>> sum(numbers)\n4"),
        ("numbers = [1, 2]", "numbers = [1, 2][3]"),  # Python that raises
        ("test -s plan.csv", "test -s plan.txt"),  # a command that fails
        ("too small\n```", "too large\n```"),
        ("status: 1", "status: 2"),
        ("file: plan.csv", "file: another.csv"),
    ],
)
def test_a_page_that_is_wrong_fails(right: str, wrong: str, tmp_path: Path) -> None:
    assert PAGE.count(right) == 1
    with pytest.raises((AssertionError, IndexError)):
        run(PAGE.replace(right, wrong), tmp_path)


def test_what_says_why_is_not_run() -> None:
    assert [fence.language for fence in fences(PAGE) if not is_run(fence)] == ["bash"]
