"""qblock-io's commands that change how requests go: reopen, breakpoints, temporary overlays, the state of a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools.img import main as img_main
from qblock.tools.io import main

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs qblock-io on a new image: exit code, lines without those on times, complaints."""
    monkeypatch.chdir(tmp_path)
    assert img_main(["create", "-q", "-f", "qcow2", "disk", "8M"]) == 0

    def run(*commands: str, image: str = "disk", options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        capfd.readouterr()
        code = main([*options, *(word for command in commands for word in ("-c", command)), image])
        captured = capfd.readouterr()
        return code, [line for line in captured.out.splitlines() if " ops; " not in line], captured.err

    return run


def test_a_held_request_lets_others_pass(io: Run) -> None:
    """What breakpoints are for: an order of requests that chance would not give."""
    code, lines, _ = io(
        "break write_aio A", "aio_write -P 1 0 64k", "wait_break A", "write -P 2 1M 64k", "resume A", "aio_flush",
        "read -P 1 0 64k", image="blkdebug::disk",
    )  # fmt: skip
    assert code == 0
    assert lines[:3] == ["blkdebug: Suspended request 'A'", "wrote 65536/65536 bytes at offset 1048576",
                         "blkdebug: Resuming request 'A'"]  # fmt: skip


@pytest.mark.parametrize(
    "commands",
    [
        ("break write_aio A", "write 0 64k"),
        ("break write_aio A", "aio_write 0 64k", "wait_break A", "aio_flush"),
        ("break write_aio A", "aio_write 0 64k", "wait_break A"),
        ("wait_break A",),
        ("break read_aio A", "aio_write 0 64k", "wait_break A"),
    ],
    ids=" / ".join,
)
def test_nothing_waits_for_ever(commands: tuple[str, ...], io: Run) -> None:
    """7.2 hangs in each of these."""
    io(*commands, image="blkdebug::disk")
    assert io("read -P 0xcd 0 64k")[0] == (0 if any("write 0" in command for command in commands) else 1)


def test_an_image_is_reopened_with_what_it_was_not_told_to_change(io: Run) -> None:
    """Read-only and back, without the page cache and back; the content stays what it was."""
    code, _, complaint = io(
        "write -P 3 0 64k", "reopen -r", "write 0 512", "reopen -w -c none", "read -P 3 0 64k", "write -P 4 512 1k",
        "reopen -c writeback", "read -P 4 512 1k", "reopen -o lazy-refcounts=on,discard=off", "discard 0 64k", "read -P 3 0 512",
    )  # fmt: skip
    assert code == 1
    assert complaint.count("\n") == 1
    assert "read-only" in complaint


def test_a_temporary_overlay_leaves_the_image_alone(io: Run) -> None:
    """And no file behind."""
    assert io("write -P 5 0 64k", "read -P 5 0 64k", options=("-s",))[0] == 0
    assert io("read -P 0 0 64k")[0] == 0
    assert [path.name for path in Path().iterdir()] == ["disk"]


def test_the_state_of_a_machine_lies_beside_the_disk(io: Run) -> None:
    """It survives, is no part of the disk, and the image stays sound."""
    code, lines, _ = io("write -b -P 6 1M 64k", "length", "read -P 0 0 8M", "info")
    assert code == 0
    assert "8 MiB" in lines and "vm state offset: 512 MiB" in lines
    assert io("read -b -P 6 1M 64k", "read -b -P 0 0 512")[0] == 0
    assert img_main(["check", "-q", "disk"]) == 0
    assert img_main(["resize", "-q", "disk", "2G"]) == 0
    assert io("read -P 0 0 1G")[0] == 0


def test_an_unknown_aio_mode_is_not_taken_for_another(io: Run) -> None:
    """Nor one that this cache mode does not allow."""
    for mode in ("native", "nonsense"):
        code, _, complaint = io("length", options=("-i", mode))
        assert code == 1
        assert mode in complaint
    assert io("length", options=("-i", "threads", "-m", "-n"))[0] == 0
    assert io("length", options=("-k",))[0] == 1  # not through the page cache
