"""Does what a page of the documentation tells its reader to do, from the top to the bottom, in an empty folder.

========================== =============================================================================================
a fence of                 is
========================== =============================================================================================
python, first line         written to that file; "# train.py, continued" is added to it
"# train.py"
python, with >>>           a doctest
other python               run in one process; names stay for the rest of the page
bash                       commands that have to succeed
console                    lines "$ command", each followed by what it prints; "..." stands for anything
========================== =============================================================================================

A comment on the line above a fence can say more, one thing each, separated by semicolons:

* `<!-- not run: REASON -->`
* `<!-- needs: PACKAGE -->` leaves the fence out where the package is not installed;
* `<!-- status: 1 -->` the exit status that the commands end with;
* `<!-- file: NAME -->` writes a fence of any language to a file.

In console fences only standard output counts; with a `status`, what is written to standard error does, too.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = ("python", "bash", "console")
_FENCE = re.compile(
    r"^(?:<!--(?P<says>[^\n]*?)-->\n+)?^(?P<ticks>```+)(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.py)(?P<more>, continued)?\n")
_SAYS = {"not run", "needs", "status", "file"}


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page; `says` is the comment above it."""

    language: str
    text: str
    line: int
    says: Mapping[str, str] = field(default_factory=dict)


def fences(text: str) -> Iterator[Fence]:
    """The fenced blocks of a Markdown text, in order."""
    for found in _FENCE.finditer(text):
        pairs = (part.partition(":") for part in (found["says"] or "").split(";") if part.strip())
        says = {key.strip(): value.strip() for key, _, value in pairs}
        says = says if set(says) <= _SAYS else {}  # another comment
        line = text.count("\n", 0, found.start("ticks")) + 1
        yield Fence(found["language"], found["text"], line, says)


def is_run(fence: Fence) -> bool:
    """Whether the fence is code that has to work here: not one that says why it is not run."""
    return (fence.language in RUN or "file" in fence.says) and "not run" not in fence.says


def run_page(rank: int, world_size: int, page: str, folder: str) -> int:
    """Runs a page in `folder`; returns how many fences were run. Called by the harness, in a process of its own."""
    os.chdir(folder)
    session = Session(page, Path(folder))
    return sum(session.run(fence) for fence in fences(Path(page).read_text(encoding="utf-8")) if is_run(fence))


class Session:
    """The reader at work: a folder with files, a Python prompt and a shell."""

    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.environment = _environment(folder)
        sys.path.insert(0, str(folder))  # as at a prompt in that folder

    def run(self, fence: Fence) -> bool:
        package = fence.says.get("needs")
        if package and importlib.util.find_spec(package) is None:
            return False
        name = _FILE.match(fence.text)
        if "file" in fence.says:
            (self.folder / fence.says["file"]).write_text(fence.text, encoding="utf-8")
        elif name:
            path = self.folder / name["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if name["more"] else "w", encoding="utf-8") as file:
                file.write(fence.text)
        elif fence.language == "python":
            self._python(fence)
        else:
            self._shell(fence)
        return True

    def _python(self, fence: Fence) -> None:
        if ">>> " not in fence.text:
            exec(compile("\n" * fence.line + fence.text, self.page, "exec"), self.names)
            return
        test = doctest.DocTestParser().get_doctest(fence.text, self.names, self.page, self.page, fence.line)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        said: list[str] = []
        runner.run(test, out=said.append, clear_globs=False)
        self.names.update(test.globs)
        assert runner.failures == 0, "".join(said)

    def _shell(self, fence: Fence) -> None:
        status = int(fence.says.get("status", "0"))
        for command, wanted in _commands(fence):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                env=self.environment,
                cwd=self.folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if status else subprocess.PIPE,
                timeout=240,
                check=False,
            )
            where = f"{self.page}:{fence.line}: $ {command}\n"
            assert done.returncode == status, f"{where}status {done.returncode}\n{done.stdout}{done.stderr or ''}"
            if wanted is not None and not _same(wanted, done.stdout):
                raise AssertionError(
                    f"{where}--- the page says\n{wanted}--- it printed\n{done.stdout}{done.stderr or ''}"
                )


def _commands(fence: Fence) -> Iterator[tuple[str, str | None]]:
    """The commands of a fence, with what they print, where the page shows it. A backslash continues a line."""
    if fence.language == "bash":
        yield fence.text, None
        return
    for part in re.split(r"^\$ ", fence.text, flags=re.MULTILINE)[1:]:
        command, _, printed = re.sub(r" *\\\n(?:> )? *", " ", part).partition("\n")
        yield command, printed


def _same(wanted: str, got: str) -> bool:
    """Whether a program printed what the page says, up to spaces at the ends of lines and empty lines at the end."""
    flags = doctest.ELLIPSIS
    want, have = ("\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n" for text in (wanted, got))
    return doctest.OutputChecker().check_output(want, have, flags)


def _environment(folder: Path) -> dict[str, str]:
    """This checkout is what is installed, and its command is on the path; nothing of a surrounding launcher is left."""
    programs = folder / ".programs"
    programs.mkdir()
    command = programs / "torchdistpackage"
    command.write_text(f"#!{sys.executable}\nfrom torchdistpackage.cli import main\nmain()\n")
    command.chmod(0o755)
    python = Path(sys.executable).parent
    environment = dict(os.environ, COLUMNS="120", NO_COLOR="1", DS_ACCELERATOR="cpu")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = os.pathsep.join([str(programs), str(python), os.environ["PATH"]])
    return environment
