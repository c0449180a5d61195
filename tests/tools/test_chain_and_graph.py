"""``info --chain`` and ``map --graph``: pictures of a chain for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qblock.policy import Mention
from qblock.tools.console import Style
from qblock.tools.img import main
from qblock.tools.img_info import opening_lines
from qblock.tools.io import main as io_main


@pytest.fixture(autouse=True)
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Three layers: data in each, zeroes in the middle one, a part of the lowest hidden."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name, size, below, commands in (
        ("base", ["16M"], [], ["write -q 0 4M"]),
        ("mid", [], ["-b", "base", "-F", "qcow2"], ["write -q -z 8M 2M", "write -q 1M 1M"]),
        ("top", [], ["-b", "mid", "-F", "qcow2"], ["write -q 2M 1M"]),
    ):
        assert main(["create", "-q", "-f", "qcow2", *below, name, *size]) == 0
        assert io_main([word for command in commands for word in ("-c", command)] + [name]) == 0
    capfd.readouterr()


def test_a_row_for_each_layer_says_what_is_seen_and_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    """The amounts are exact, whatever the width of the picture."""
    assert main(["map", "--graph", "top"]) == 0
    rows = capfd.readouterr().out.splitlines()
    assert rows[1].startswith("top ") and rows[1].endswith("  1 MiB seen")
    assert rows[2].endswith("  1 MiB seen, 2 MiB zero")
    assert rows[3].endswith("  2 MiB seen, 2 MiB hidden")
    assert rows[3].split()[1].startswith("███")
    assert "▒" in rows[3] and "○" in rows[2]


def test_a_part_can_be_drawn_and_nothing_cannot(capfd: pytest.CaptureFixture[str]) -> None:
    """-s and -l choose, as they do for the other forms of map."""
    assert main(["map", "--graph", "-s", "2M", "-l", "1M", "top"]) == 0
    assert capfd.readouterr().out.splitlines()[3].endswith("  1 MiB hidden")
    assert main(["map", "--graph", "-s", "16M", "top"]) == 1
    assert main(["map", "--graph", "--output=json", "top"]) == 1


def test_the_chain_is_a_tree_and_json(capfd: pytest.CaptureFixture[str]) -> None:
    """Both forms tell the same."""
    assert main(["info", "--chain", "top"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["top", "└─ backing mid", "   └─ backing base"]
    assert main(["info", "--chain", "--output=json", "top"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [layer["filename"] for layer in told] == ["top", "mid", "base"]
    assert told[0]["opens"] == [{"filename": "mid", "what": "backing file", "format": "qcow2"}]
    assert told[2]["unsafe"] == told[2]["holders"] == []


def test_a_broken_chain_is_drawn_as_far_as_it_goes(capfd: pytest.CaptureFixture[str]) -> None:
    """What is missing is what one wants to see."""
    Path("base").unlink()
    assert main(["info", "--chain", "top"]) == 0
    out = capfd.readouterr().out
    assert "unsafe: its backing file 'base' is not there" in out
    assert main(["info", "--chain", "missing"]) == 1


def test_what_an_image_would_make_one_open_is_listed() -> None:
    """A guessed format is the dangerous one, and stands out."""
    mentions = [Mention("top", "mid", "backing file", "qcow2"), Mention("top", "x", "backing file", None)]
    lines = list(opening_lines(mentions, Style(colours=False)))
    assert lines[1].strip() == "mid (backing file, qcow2)"
    assert "guessed" in lines[2]
