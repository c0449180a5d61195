"""The documents are true: their code runs, their commands work, their links lead somewhere.

Blocks of a document are run in order, in one empty directory. ``sh`` blocks run with the installed programs first in PATH, and
must succeed; ``python`` blocks share one namespace per document; ``console`` blocks belong to `test_transcripts`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN_ONLY = {"CONTRIBUTING.md", "how-to-write-a-driver.md"}
"""Documents performed elsewhere: commands that set up a developer's machine by `.ci/run`, the others by `test_transcripts`."""


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = document.read_text()
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in BLOCK.finditer(text)
    ]


def runnable(document: Path) -> list[Block]:
    """The blocks that a reader could paste; README's two set-up commands are performed by `.ci/run`."""
    if document.name in SHOWN_ONLY:
        return []
    return [
        block for block in blocks(document) if block.language in ("sh", "python") and "venv" not in block.text
    ]


@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if runnable(document)], ids=lambda document: document.name
)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader pastes must work, in the order in which it is read."""
    monkeypatch.chdir(tmp_path)
    if shutil.which("qblock-img", path=programs_first()) is None:
        pytest.skip("qblock is not installed beside this Python: pip install -e .")
    namespace: dict[str, object] = {"__name__": "__document__"}
    for block in runnable(document):
        if block.language == "sh":
            run_shell(block, document)
        else:
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(document), "exec"), namespace)


def programs_first() -> str:
    """PATH with the programs that belong to this Python in front."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run_shell(block: Block, document: Path) -> None:
    """Run a block with bash; every command must succeed."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env={**os.environ, "PATH": programs_first()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, f"{document.name}:{block.line}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """A dead link is a broken promise."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_has_the_two_commands_on_one_line_each() -> None:
    """Command 1 sets up and runs the demo, command 2 sets up and runs the tests; CI takes both from here."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("qblock demo")
    assert "pytest" in commands[1]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_page_is_in_the_navigation() -> None:
    """A page that the menu does not show is not found."""
    config = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {re.escape(page.name)}$", config, re.MULTILINE), f"{page.name} is not in mkdocs.yml"
