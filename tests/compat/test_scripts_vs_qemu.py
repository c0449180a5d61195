"""Shell scripts written for the real tools, run with qblock's in their place: same output, same exit codes, same images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parent / "tool_server.py"
SCRIPTS = Path(__file__).parent / "scripts"
MESSAGES = (
    (re.compile(r"\(.*/sec and .* ops/sec\)|(?<=,)[0-9:.]+,[0-9.]+,[0-9.]+$", re.MULTILINE), "<rates>"),
    (re.compile(r"\d\d\.\d\d sec|in [0-9.]+ seconds|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|(?<=date-)n?sec\": \d+"), "<time>"),
    (re.compile(r"^(Parsing error|Could not \w+ \w+|length cannot exceed \d+|signal argument).*", re.MULTILINE), r"\1 <why>"),
    (re.compile(r"^((?:qemu-io> )*\w+)( .*)? -- .*", re.MULTILINE), r"\1 <usage>"),
    (re.compile(r"^\d+ is not a .*", re.MULTILINE), "<not aligned>"),
    (
        re.compile(r"^(disk size|Image end offset): .*|(\"(?:actual-size|image-end-offset)\"): \d+", re.MULTILINE),
        r"\1\2: <space>",
    ),
)
"""What may differ: times, the texts of messages, and how much space the format does not prescribe."""


def normal(text: str) -> str:
    """Output without what may differ."""
    for pattern, replacement in MESSAGES:
        text = pattern.sub(replacement, text)
    return text


SERVED = """#!/bin/bash
exec 8>&1 9<>/dev/tcp/127.0.0.1/{port}
printf '%s\\0' $(($# + 3)) $$ "$PWD" {name} "$@" >&9
read -r -u 9 code
exec 9>&-
echo "{name} $* -> $code" >>"{log}"
exit "$code"
"""
"""Lets the server do the work, and notes the exit code. Its output is at 8 too:
1 is the connection while printf speaks to it."""

LOGGED = '#!/bin/sh\n/usr/bin/{name} "$@"\ncode=$?\necho "{name} $* -> $code" >>"{log}"\nexit $code\n'
"""Runs the real program, and notes its exit code."""


class Side:
    """A directory in which a script is run, with programs of the names that it calls."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder / "work"
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.folder.mkdir(parents=True)
        self.bin.mkdir()
        for name in ("qemu-img", "qemu-io"):
            path = self.bin / name
            path.write_text(program.replace("{name}", name).replace("{log}", str(self.log)))
            path.chmod(0o755)

    def run(self, script: Path) -> tuple[int, list[str], list[str], str]:
        """Exit code and output of a script, the exit codes of the commands in it, and what it said of errors."""
        result = subprocess.run(
            ["bash", str(script)],
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=300,
        )
        printed = normal(result.stdout.decode()).splitlines()
        return result.returncode, printed, self.log.read_text().splitlines(), result.stderr.decode()


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """Where qblock's tools are served."""
    server = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.kill()
    server.communicate()


@pytest.mark.qemu
@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.stem)
def test_a_script_cannot_tell_whose_tools_it_runs(script: Path, port: str, tmp_path: Path) -> None:
    """The whole of what it prints, the exit code of each command, and what the images hold afterwards."""
    real = Side(tmp_path / "real", LOGGED)
    ours = Side(tmp_path / "ours", SERVED.replace("{port}", port))
    expected, found = real.run(script), ours.run(script)
    assert found[2] == expected[2], found[3]
    assert found[1] == expected[1]
    assert found[0] == expected[0]
    names = sorted(path.name for path in real.folder.iterdir())
    assert sorted(path.name for path in ours.folder.iterdir()) == names
    for name in names:
        if name.endswith((".q", ".raw")):
            same = subprocess.run(
                ["/usr/bin/qemu-img", "compare", real.folder / name, ours.folder / name], capture_output=True, check=False
            )
            assert same.returncode == 0, (name, same.stdout, same.stderr)
