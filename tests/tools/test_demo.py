"""`qblock demo`: the story it tells, the proofs at its end, and that they can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qblock
from qblock.__main__ import main
from qblock.guest import ContentMap, byte_tag
from qblock.testing.images import make_image
from qblock.tools import demo, demo_proofs
from qblock.tools.demo_show import Proof, TextPresenter

SMALL = ["demo", "--clock", "virtual", "--size", "2M"]


@pytest.fixture(autouse=True)
def no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same here as on a machine without QEMU; what it says is tested in tests/compat."""
    monkeypatch.setattr("qblock.tools.demo_proofs.shutil.which", lambda name: None)


def test_the_demo_tells_its_story_and_proves_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Graph before, during and after; READY and COMPLETED; six proofs; exit code 0."""
    assert main(SMALL) == 0
    text = capsys.readouterr().out
    positions = [
        text.index(part)
        for part in ("graph before:", "(top.qcow2)", '"execute": "drive-mirror"', "BLOCK_JOB_READY", "graph during:",
                     "mirror_top", '"execute": "block-job-complete"', "BLOCK_JOB_COMPLETED", "graph after:",
                     "all 6 proofs hold")
    ]  # fmt: skip
    assert positions == sorted(positions)
    assert "100.0 %" in text
    after = text[text.index("graph after:") : text.index("What is left")]
    assert "(copy.qcow2)" in after
    assert "backing" not in after
    assert "\x1b" not in text  # colours are for terminals


def test_on_virtual_time_the_seed_decides_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed, the same transcript, although the directory has another name each time; another seed, another one."""
    transcripts = []
    for seed in ("3", "3", "4"):
        assert main([*SMALL, "--seed", seed]) == 0
        transcripts.append(capsys.readouterr().out)
    assert transcripts[0] == transcripts[1]
    assert transcripts[0] != transcripts[2]


def test_it_can_be_driven_by_a_persons_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """--hmp: the same over the human monitor."""
    assert main([*SMALL, "--hmp"]) == 0
    text = capsys.readouterr().out
    assert '(qemu) drive_mirror -f virtio0 "DIR/copy.qcow2" qcow2' in text
    assert "Type mirror, device virtio0: Completed" in text


def test_what_happens_inside_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The story stays on standard output as it was."""
    assert main(SMALL) == 0
    untraced = capsys.readouterr().out
    assert main([*SMALL, "--trace", "mirror_start", "--trace", f"mirror_one_iteration,file={tmp_path}/trace"]) == 0
    assert capsys.readouterr().out == untraced
    lines = (tmp_path / "trace").read_text().splitlines()
    assert lines[0].startswith("mirror_start ") and {line.split()[0] for line in lines[1:]} == {"mirror_one_iteration"}
    assert main(["--trace", "help"]) == 0
    assert "mirror_start" in capsys.readouterr().out.splitlines()


def test_it_can_be_told_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """--json: one object a line."""
    assert main([*SMALL, "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["when"] for entry in entries if entry["kind"] == "graph"] == ["before", "during", "after"]
    assert entries[-1]["kind"] == "proofs"
    assert entries[-1]["hold"] is True
    assert {proof["claim"] for proof in entries[-1]["proofs"]} >= {"it checks clean"}
    assert any(entry["kind"] == "progress" and entry["offset"] == entry["len"] for entry in entries)


def test_it_lives_on_real_time_too(capsys: pytest.CaptureFixture[str]) -> None:
    """The product is the same; only nobody can say beforehand who is faster."""
    assert main(["demo", "--size", "1M"]) == 0
    assert "all 6 proofs hold" in capsys.readouterr().out


def test_the_files_stay_in_a_directory_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To look at them; and nobody's files are overwritten."""
    directory = tmp_path / "with, comma"
    assert main([*SMALL, "--dir", str(directory)]) == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "base.qcow2",
        "copy.qcow2",
        "middle.qcow2",
        "top.qcow2",
    ]
    assert main([*SMALL, "--dir", str(directory)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_kept_directory_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, so that transcripts stay equal."""
    assert main([*SMALL, "--keep"]) == 0
    said = capsys.readouterr().err
    kept = Path(said.split()[-1])
    assert (kept / "copy.qcow2").exists()
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "1x"],
        ["--size", "64k"],
        ["--clock", "lunar"],
        ["--seed", "x"],
        ["--sise", "1M"],
        ["extra"],
        ["--size"],
    ],
)
def test_unknown_options_and_values_are_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a line that says what is wrong."""
    assert main(["demo", *arguments]) == 2
    assert capsys.readouterr().err.startswith("qblock demo: ")


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is in it."""
    assert main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("size", "clock", "seed", "hmp", "json", "dir", "keep"))


# -------------------------------------------------------------------------------------------------------------- proofs


def proofs(directory: Path, content: ContentMap) -> dict[str, Proof]:
    """The proofs about one image called copy.qcow2, by the first words of their claims."""
    found = demo_proofs.collect_proofs(directory, copy="copy.qcow2", layers=(), content=content)
    return {" ".join(proof.claim.split()[:3]): proof for proof in found}


def test_a_lost_write_refutes_the_proof(tmp_path: Path) -> None:
    """A demo whose proofs could not fail would prove nothing."""
    make_image(tmp_path / "copy.qcow2", "1M", {4096: b"\x07" * 512})
    content = ContentMap(1 << 20)
    content.assign(4096, 512, byte_tag(7))
    assert all(proof.holds for proof in proofs(tmp_path, content).values())
    content.assign(8192, 512, byte_tag(8))
    refuted = proofs(tmp_path, content)["it holds what"]
    assert not refuted.holds
    assert "offset 8192" in refuted.seen


def test_a_backing_file_a_wrong_size_and_a_leak_refute_their_proofs(tmp_path: Path) -> None:
    """Each proof looks at its own thing."""
    make_image(tmp_path / "base.qcow2", "1M")
    path = make_image(tmp_path / "copy.qcow2", "1M", backing="base.qcow2")
    found = proofs(tmp_path, ContentMap(2 << 20))
    assert not found["the new image"].holds
    assert not found["it holds what"].holds
    assert found["it checks clean"].holds
    with path.open("r+b") as file:
        file.seek(
            48
        )  # where the header says where the table of reference counts is, which says where its first block is
        file.seek(int.from_bytes(file.read(8), "big"))
        file.seek(int.from_bytes(file.read(8), "big") + 2 * 9)
        file.write(b"\0\x01")  # the tenth cluster is in use, says the count; nothing refers to it
        file.truncate(10 << 16)
    assert not proofs(tmp_path, ContentMap(1 << 20))["it checks clean"].holds


def test_a_refuted_proof_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For scripts that run the demo as a check of an installation."""
    monkeypatch.setattr(demo, "collect_proofs", lambda *a, **k: [Proof("it holds", False, "a difference at 0")])
    assert main(SMALL) == 1
    assert "1 of 1 proofs FAILED" in capsys.readouterr().out


def test_a_terminal_gets_colours_and_a_bar_that_moves() -> None:
    """And the bar's line is ended before anything else is printed."""
    written: list[str] = []
    show = TextPresenter(written.append, terminal=True, colours=True, unicode=False, width=60)
    show.progress(0, 1, 4)
    show.progress(100_000_000, 2, 4)
    show.message(200_000_000, "event", {"event": "X" * 20, "data": {"member": "y" * 30}})
    show.proofs(0, [Proof("good", True, "seen"), Proof("bad", False, "unseen")])
    text = "".join(written)
    assert text.count("\r\x1b[K") == 2
    assert "  50.0 %  2 B of 4 B\n" in text
    assert "\x1b[32mok\x1b[0m good" in text
    assert "\x1b[31mFAILED\x1b[0m bad" in text
    assert max(len(line) for line in text.splitlines()) < 130


def test_a_narrow_terminal_without_colours_gets_lines_that_fit() -> None:
    """Under NO_COLOR there is no escape sequence but the one that moves the bar."""
    written: list[str] = []
    show = TextPresenter(written.append, terminal=True, width=50)
    show.progress(1_000_000_000, 512 << 20, 1 << 30)
    show.proofs(0, [Proof("a claim that takes a good many words, more than go on a line", False, "as does what was seen " * 4)])
    text = "".join(written)
    assert "\x1b" not in text.replace("\r\x1b[K", "")
    assert max(len(line) for line in text.replace("\r\x1b[K", "").splitlines()) <= 50
    assert "] 50.0 %" in text.replace("]  ", "] ")
    assert "512 MiB" not in text


def test_the_library_can_be_used_on_what_the_demo_made(tmp_path: Path) -> None:
    """The new image is an ordinary one."""
    assert main([*SMALL, "--json", "--dir", str(tmp_path)]) == 0
    with qblock.open(tmp_path / "copy.qcow2") as image:
        assert image.length == 2 << 20
        assert image.check().corruptions == 0
