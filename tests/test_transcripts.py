"""The transcripts in the documents are true: each command prints what the page says, to the letter.

A ``console`` block holds commands after ``$`` (continued after ``>``), what is typed at qblock's prompt, and what is printed. All
blocks of a page are performed in order in one empty directory, with the installed programs first in PATH; a session with
``qblock`` may go over several blocks, until ``quit`` or until the page says ``Killed``.

``python tests/test_transcripts.py [docs/PAGE ...]`` writes what is printed today into the pages (all of them). Read the
difference before committing it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import attrs
import pytest

DOCS: Final = Path(__file__).parent.parent / "docs"
PAGES: Final = (
    "tutorial.md", "live-block-operations.md", "how-to-write-a-driver.md", "drivers.md", "programs.md", "machine.md", "labs.md",
)  # fmt: skip
BLOCK: Final = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON_FILE: Final = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT: Final = "(qblock) "
SHOWN_DIRECTORY: Final = "/home/you/disks"
"""What the pages call the directory in which they are performed."""
GREETING: Final = "qblock: type `help` for the commands, `quit` or Ctrl-D to leave\n"
"""What the program says on a terminal and not in a pipe; the pages show the terminal."""


class Session:
    """One run of ``qblock`` that takes lines from a pipe. A line is answered when the next, a marker, is complained about."""

    def __init__(self, command: str, directory: Path) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=directory,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def answer(self, line: str) -> str:
        """What the program prints when this line is typed; after ``quit`` it must be gone."""
        stdin, stdout = self._pipes()
        if line == "quit":
            output, _ = self._process.communicate(f"{line}\n", timeout=60)
            return output
        stdin.write(f"{line}\n=== \n")
        stdin.flush()
        answer = []
        while not (printed := stdout.readline()).startswith("unknown command: '==='"):
            assert printed, f"qblock ended after {line!r}:\n{''.join(answer)}"
            answer.append(printed)
        return "".join(answer)

    def kill(self) -> None:
        """The end that leaves no time for anything."""
        self._process.kill()
        self._process.communicate(timeout=60)

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout


@attrs.define
class Performer:
    """Performs the blocks of one page, in order."""

    directory: Path
    session: Session | None = None

    def perform(self, block: str) -> str:
        """The block as it should read: its commands with what they print now."""
        return "".join(self._lines(block))

    def _lines(self, block: str) -> Iterator[str]:
        for typed, shown in entries(block):
            yield typed
            if typed.startswith(PROMPT):
                assert self.session is not None, f"no qblock is running: {typed!r}"
                line = typed.removeprefix(PROMPT).strip()
                yield self.session.answer(line)
                if line == "quit":
                    self.session = None
                elif shown.splitlines()[-1:] == ["Killed"]:
                    self.session.kill()
                    self.session = None
                    yield "Killed\n"
            elif re.match(r"\$ (\w+=\S+ )*qblock +-", typed):
                assert self.session is None, f"qblock is running already: {typed!r}"
                self.session = Session(shell_text(typed), self.directory)
                yield GREETING + self.session.answer("")  # it is up, and so are its sockets
            else:
                yield run_shell(shell_text(typed), self.directory)


def entries(block: str) -> Iterator[tuple[str, str]]:
    """Pairs of what is typed (with the lines that continue it) and what the page shows as its output."""
    typed, shown = "", ""
    for line in block.splitlines(keepends=True):
        if line.startswith(("$ ", PROMPT)):
            if typed:
                yield typed, shown
            typed, shown = line, ""
        elif line.startswith("> ") and not shown:
            typed += line
        else:
            assert typed, f"the block begins with output: {line!r}"
            shown += line
    if typed:
        yield typed, shown


def shell_text(typed: str) -> str:
    """A command as the shell gets it."""
    return "".join(line[2:] for line in typed.splitlines(keepends=True))


def run_shell(command: str, directory: Path) -> str:
    """What a command prints; it must succeed."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


def environment() -> dict[str, str]:
    """The programs that belong to this Python come first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": programs, "LC_ALL": "C.UTF-8"}


def perform_page(page: str, directory: Path) -> str:
    """The page as it should read. A Python block that begins with the name of a file is that file, there from the start."""
    performer = Performer(directory)
    page = page.replace(SHOWN_DIRECTORY, str(directory))
    for name, text in PYTHON_FILE.findall(page):
        (directory / name).write_text(text)
    try:
        performed = BLOCK.sub(lambda match: f"```console\n{performer.perform(match[1])}```", page)
        assert performer.session is None, "the page ends while qblock runs"
    finally:
        if performer.session is not None:
            performer.session.kill()
    return performed.replace(str(directory), SHOWN_DIRECTORY)


@pytest.mark.timeout(600)  # a page starts some hundred programs
@pytest.mark.parametrize("name", PAGES)
def test_transcripts_are_what_the_programs_print(name: str, tmp_path: Path) -> None:
    """Who follows a page sees what it shows, including every number."""
    if shutil.which("qblock", path=environment()["PATH"]) is None:
        pytest.skip("qblock is not installed beside this Python: pip install -e .")
    page = (DOCS / name).read_text()
    assert perform_page(page, tmp_path).splitlines() == page.splitlines()


def test_the_greeting_in_the_pages_is_the_one_of_the_program() -> None:
    """A pipe is not greeted, so the performer takes the words from here."""
    from qblock.tools import repl

    assert GREETING.strip() in Path(repl.__file__).read_text()


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or [DOCS / name for name in PAGES]:
        with tempfile.TemporaryDirectory() as directory:
            page = path.read_text()
            path.write_text(perform_page(page, Path(directory)))
