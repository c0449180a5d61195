"""`qblock lab witness`: the protocol holds, its verdicts can be found from the files alone, and the lab can fail.

The lab forks, so it always runs in a process of its own here, which has no other threads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qblock
from qblock.lab.witness.disk import (
    GuestKind,
    History,
    examine,
    first_content,
    flushed_entry,
    make_disk,
    make_write,
    write_entry,
)
from qblock.lab.witness.experiment import twins
from qblock.lab.witness.management import Decision, Ground, Image, decide
from qblock.lab.witness.plan import Part, Plan, Victim
from qblock.lab.witness.report import STEP_TEXTS
from qblock.lab.witness.verdict import Verdict
from qblock.tools import lab_witness

Json = dict[str, Any]


def lab(*args: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A run of the program, with Python statements that are executed first."""
    code = f"import sys\n{before}\nfrom qblock.__main__ import main\nsys.exit(main(['lab', 'witness', *sys.argv[1:]]))"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a whole run; its output beside them."""
    directory = tmp_path_factory.mktemp("lab") / "kept"
    done = lab("--keep", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / "output").write_text(done.stdout)
    return directory


def cases(kept: Path) -> dict[str, Json]:
    """The kept verdicts by the place of their case."""
    names = json.loads((kept / "run.json").read_text())["cases"]
    return {name: json.loads((kept / name / "verdict.json").read_text()) for name in names}


def by_step(kept: Path, victim: str, part: str = "with-witness") -> dict[str, Json]:
    """Those of one part with one victim."""
    plans = {name: found for name, found in cases(kept).items() if found["plan"]["part"] == part}
    return {found["plan"]["step"]: found for found in plans.values() if found["plan"]["victim"] == victim}


# ---------------------------------------------------------------------------------------------------- what it shows


def test_nothing_is_lost_at_any_step(kept: Path) -> None:
    """Every step with every victim: the chosen image has every flushed write; the last line says so."""
    found = [case for case in cases(kept).values() if case["plan"]["part"] != "without-witness"]
    steps = {case["plan"]["step"] for case in found}
    first = [case for case in found if case["plan"]["part"] == "with-witness"]
    assert len(first) == 4 * len(steps - {"drive_reopen_rollback"})
    assert {"intent-noted", "drive_reopen_closed", "drive_reopen_witness_written", "reply-received"} < steps
    for case in found:
        assert case["sound"] and case[case["decision"]["image"]]["lost"] == [], case
    last = " ".join((kept / "output").read_text().splitlines()[-3:])
    assert f"With the witness: {len(found)} kills, and no flushed write was lost." in last


def test_the_byte_decides_between_intent_and_reply(kept: Path) -> None:
    """Before it is written the source is taken, from then on the target; and each time the other one would not always do."""
    both = by_step(kept, "both")
    steps = list(both)
    written = steps.index("drive_reopen_witness_written")
    for number, step in enumerate(
        steps[steps.index("intent-noted") : steps.index("outcome-noted")], steps.index("intent-noted")
    ):
        expected = "source" if number < written else "target"
        assert both[step]["decision"] == {"image": expected, "ground": "byte"}, step
        assert both[step]["byte"] is (number >= written)
    assert "target" not in both["intent-noted"]["right"]
    assert both["reply-received"]["right"] == ["target"]


def test_after_a_power_cut_the_byte_counts_from_when_it_is_durable(kept: Path) -> None:
    """Between writing it and making it durable the two kinds of crash differ, and both choices are right."""
    killed, cut = by_step(kept, "both"), by_step(kept, "host")
    differing = [step for step in killed if killed[step]["decision"] != cut[step]["decision"]]
    assert differing == ["drive_reopen_witness_written"]
    assert killed[differing[0]]["byte"] and not cut[differing[0]]["byte"]
    assert killed[differing[0]]["right"] == ["source", "target"]


def test_a_witness_that_cannot_be_written_leaves_the_guest_where_it_was(kept: Path) -> None:
    """The machine goes back to the old image; whoever dies from there on, the old image has everything."""
    for victim in ("management", "machine", "both", "host"):
        steps = by_step(kept, victim, "refused-witness")
        assert list(steps) == ["drive_reopen_rollback", "guest_goes_on", "reply-received", "outcome-noted", "later"]
        assert {case["decision"]["image"] for case in steps.values()} == {"source"}
        assert not any(case["byte"] for case in steps.values())
    assert steps["later"]["right"] == ["source"]


def test_a_machine_that_lives_is_asked(kept: Path) -> None:
    """With management alone dead, drive-reopen goes on to its end, and so does the guest."""
    alone = by_step(kept, "management")
    assert {case["decision"]["ground"] for case in alone.values()} == {"machine"}
    assert alone["intent-noted"]["decision"]["image"] == "source"
    assert alone["drive_reopen_begin"]["decision"]["image"] == "target"
    assert alone["drive_reopen_begin"]["flushed"] > by_step(kept, "both")["drive_reopen_begin"]["flushed"]


def test_without_the_witness_two_crashes_look_the_same_and_need_different_images(kept: Path) -> None:
    """Found from the files, by code of its own: equal to the last byte; the guest's last flushed write is in one image only."""
    seen: dict[str, list[Path]] = {}
    for name, case in cases(kept).items():
        if case["plan"]["guest"] == "door":
            seen.setdefault(fingerprint(kept / name), []).append(kept / name)
    pairs = [{door_tells(directory) for directory in alike} for alike in seen.values()]
    assert any({("source",), ("target",)} <= answers for answers in pairs)
    assert "crashes look the same" in " ".join((kept / "output").read_text().split())


def fingerprint(directory: Path) -> str:
    """Of everything that management can look at when it starts again."""
    journal = (directory / "management.journal").read_text().partition("restarted\n")[0]
    digest = hashlib.sha256(journal.encode())
    for name in ("base.qcow2", "source.qcow2", "target.raw", "witness"):
        path = directory / name
        digest.update(path.read_bytes() if path.exists() else b"there is none")
    return digest.hexdigest()


def door_tells(directory: Path) -> tuple[str, ...]:
    """The images in which the door is as the guest was last promised, or as it wrote since."""
    entries = [json.loads(line) for line in (directory / "guest.journal").read_text().splitlines()]
    flushed = max(entry.get("flushed", 0) for entry in entries)
    writes = [entry for entry in entries if entry.get("write", 0) >= flushed]
    right = []
    for name in ("source.qcow2", "target.raw"):
        with qblock.open(directory / name, fmt=name.partition(".")[2], backing=True) as image:
            if image.read(writes[0]["offset"], 16).decode() in [entry["record"] for entry in writes]:
                right.append(name.partition(".")[0])
    return tuple(right)


# ------------------------------------------------------------------------------------------------------- from the files


@pytest.mark.qemu
def test_verdicts_agree_with_what_the_real_qemu_img_finds(kept: Path, tmp_path: Path) -> None:
    """The chosen image of each case, as qemu-img checks and reads it; compared by code of this test, from the journals."""
    for name, case in cases(kept).items():
        directory, raw = kept / name, tmp_path / "raw"
        for image in ("source", "target") if case["plan"]["victim"] == "both" else (case["decision"]["image"],):
            path = next(iter(directory.glob(f"{image}.*")), None)
            if path is None or case[image]["error"]:
                assert not case[image]["error"] or case["decision"]["image"] != image
                continue
            subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
            content = raw.read_bytes()
            assert lost_by_the_journal(directory, content) == case[image]["lost"], (name, image)
            if path.suffix == ".qcow2" and case["decision"]["image"] == image:
                checked = subprocess.run(["qemu-img", "check", "-q", path], check=False)
                assert checked.returncode in (0, 3), name  # 3: leaked clusters, which a kill may leave


@pytest.mark.qemu
def test_the_real_qemu_img_may_check_too(kept: Path, tmp_path: Path) -> None:
    """--qemu-img: its word counts, for images that are kept and for new ones."""
    fine = lab("--qemu-img", "--part", "with-witness", "--step", "reply-received", "--keep", tmp_path / "new")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    image = tmp_path / "new/with-witness/reply-received/both/target.qcow2"
    with image.open("r+b") as file:  # the second entry of the refcount block: the cluster of the table itself
        table = int.from_bytes(file.read(56)[48:56], "big")
        file.seek(table)
        file.seek(int.from_bytes(file.read(8), "big") + 2)
        file.write(b"\0\0")
    broken = lab("--qemu-img", "--recompute", tmp_path / "new")
    assert broken.returncode == 1
    assert "reply-received/both: the target was chosen: " in broken.stdout and "qemu-img says: " in broken.stdout


def lost_by_the_journal(directory: Path, content: bytes) -> list[int]:
    """Flushed writes that ``content`` does not hold, and that were not written over."""
    lost, later, flushed = [], {}, 0
    lines = [json.loads(line) for line in (directory / "guest.journal").read_text().splitlines()]
    flushed = max(line.get("flushed", 0) for line in lines)
    for line in reversed([line for line in lines if "write" in line]):
        place = line["offset"]
        later.setdefault(place, False)
        held = content[place : place + 4096] == line["record"].encode() * 256
        later[place] = later[place] or held
        if not later[place] and line["write"] <= flushed:
            lost.append(line["write"])
    return sorted(lost)


def test_kept_files_lead_to_the_same_verdicts_until_somebody_changes_them(kept: Path, tmp_path: Path) -> None:
    """--recompute looks at nothing but the files: without the byte, the source would be chosen, and writes lost."""
    again = lab("--recompute", kept)
    assert again.returncode == 0, again.stderr
    assert again.stdout == (kept / "output").read_text()
    assert "the verdicts are those that were kept" in again.stderr
    witness = kept / "with-witness" / "reply-received" / "both" / "witness"
    witness.write_bytes(b"")
    try:
        changed = lab("--recompute", kept)
    finally:
        witness.write_bytes(b"1")
    assert changed.returncode == 1
    assert "reply-received/both: the files say something else" in changed.stderr
    assert "reply-received/both: the source was chosen: writes" in changed.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run with two cases."""
    directory = tmp_path_factory.mktemp("small") / "kept"
    steps = ("--step", "intent-noted", "--step", "reply-received")
    done = lab("--part", "with-witness", "--kill", "both", *steps, "--keep", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


CASE = "with-witness/reply-received/both"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("management.journal", b"target (byte)", b"source (byte)"),
        ("management.journal", b"the machine is gone", b"the machine says: source"),
        ("management.journal", b"restarted", b"redirected"),
        ("guest.journal", b'{"flushed": 1}', b'{"flushed": 2}'),
        ("guest.journal", b"write 000000001", b"wrote 000000001"),
        ("witness", b"\x01", b"\x02"),
        ("source.qcow2", b"layer 000000001", b"LAYER 000000001"),
        ("target.qcow2", b"write 000000013", b"write 000000012"),
        ("base.qcow2", b"base  000000000", b"BASE  000000000"),
        ("verdict.json", b'"sound": true', b'"sound": false'),
        ("verdict.json", b'"delay": 2', b'"delay": 1'),
        ("verdict.json", b'"ground": "byte"', b'"ground": "journal"'),
    ],
)
def test_every_kept_file_is_noticed_that_contradicts(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, before: bytes, after: bytes
) -> None:
    """Also where the verdict would be the same; the other case is not suspected, and the file is named."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    assert lab_witness.main(["--recompute", str(copy)]) == 0, capsys.readouterr()
    capsys.readouterr()
    content = (copy / CASE / name).read_bytes()
    assert before in content
    (copy / CASE / name).write_bytes(content.replace(before, after))
    assert lab_witness.main(["--recompute", str(copy)]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "the files say something else" in line]
    assert len(told) == 1 and f"{CASE}: " in told[0]
    assert name == "verdict.json" or f"({name} changed)" in told[0]


def test_management_that_decides_otherwise_is_wrong(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last word is part of the protocol: the same as follows from what it had noted and from the byte."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    journal = copy / CASE / "management.journal"
    journal.write_text(journal.read_text().replace("go on with: target", "go on with: source"))
    assert lab_witness.main(["--recompute", str(copy)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"{CASE}: the last word of management is 'go on with: source (byte)', and the target is to be chosen" in told
    assert "1 of 2 kills went WRONG" in told


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (f'"{CASE}"', '"with-witness/intent-noted/both"', f"{CASE}: run.json does not list this case"),
        (
            '"victims": [\n    "both"',
            '"victims": [\n    "host"',
            f"{CASE}: run.json lists this case and does not ask for it",
        ),
        ('"seed": 1', '"seed": 2', f"{CASE}: the files say something else"),
        (f'"{CASE}"', '"with-witness/coffee/everybody"', "no case has the place 'with-witness/coffee/everybody'"),
    ],
)
def test_a_changed_list_of_cases_is_noticed(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    """run.json cannot leave out a case, nor give it to another run."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    run = (copy / "run.json").read_text()
    assert before in run
    (copy / "run.json").write_text(run.replace(before, after))
    assert lab_witness.main(["--recompute", str(copy)]) == 1
    assert said in capsys.readouterr().err


def test_the_seed_decides_every_line() -> None:
    """The same seed, the same outcome, although processes and directories are others."""
    args = ("--step", "intent-noted", "--step", "reply-received", "--output", "json", "--seed")
    one, again, other = (lab(*args, seed).stdout for seed in ("5", "5", "6"))
    assert json.loads(one)["shown"] is True
    assert one == again
    assert one != other


# ----------------------------------------------------------------------------------------------------- it can fail

NO_BYTE = """
from qblock.witness import Witness
async def write(self, executor): pass
Witness.write = write
"""
BYTE_FIRST = """
from qblock.drive_reopen import _Exchange
run = _Exchange.run
async def byte_first(self):
    await self.witness.write(self.system.env.executor)
    await run(self)
_Exchange.run = byte_first
"""
GUEST_BEFORE_BYTE = """
import asyncio
from qblock.witness import Witness
write = Witness.write
async def too_late(self, executor):
    for backend in exchange[0].system.graph.backends: backend.resume()
    await exchange[0].system.clock.sleep_ns(0)
    for _ in range(20): await asyncio.sleep(0)
    await write(self, executor)
    for backend in exchange[0].system.graph.backends: backend.quiesce()
from qblock.drive_reopen import _Exchange
exchange = []
run = _Exchange.run
async def noted(self):
    exchange.append(self)
    await run(self)
_Exchange.run, Witness.write = noted, too_late
"""
NO_SYNC = """
from qblock.witness import Witness
async def sync(self, executor): pass
Witness.sync = sync
"""
UNSEEN_FAILURE = """
from qblock.witness import Witness
write = Witness.write
async def whatever_happens(self, executor):
    try:
        await write(self, executor)
    except OSError:
        pass
Witness.write = whatever_happens
"""
LOST_COPY = """
from qblock.jobs.mirror_2012 import Mirror2012Job
async def nothing_more(self, buffer): pass
Mirror2012Job._finish = nothing_more
"""


@pytest.mark.parametrize(
    ("broken", "step", "said"),
    [
        (NO_BYTE, "reply-received", "the source was chosen: writes"),
        (BYTE_FIRST, "mirror_one_iteration", "the target was chosen: "),
        (GUEST_BEFORE_BYTE, "guest_goes_on", "the source was chosen: writes"),
    ],
    ids=["the byte is never written", "the byte is written first", "the guest goes on before the byte"],
)
def test_a_broken_protocol_is_seen(broken: str, step: str, said: str) -> None:
    """The lab can fail: with another order of the same things a write is lost, and it says where."""
    done = lab("--part", "with-witness", "--kill", "both", "--step", step, before=broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"with-witness/{step}/both: {said}" in done.stdout
    assert "WRONG" in done.stdout


def test_a_byte_that_is_not_durable_is_seen_by_a_power_cut_only() -> None:
    """What a kill leaves with the kernel, the host takes along."""
    done = lab("--part", "with-witness", "--step", "reply-received", before=NO_SYNC)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "with-witness/reply-received/host: the source was chosen: writes" in done.stdout
    assert "kills went WRONG" in done.stdout


@pytest.mark.parametrize(
    "broken", [LOST_COPY, UNSEEN_FAILURE], ids=["the mirror does not finish", "a write fails unseen"]
)
def test_what_is_wrong_without_a_crash_is_seen(broken: str) -> None:
    """Nobody has to be killed for that: the control runs say it."""
    done = lab("--step", "later", before=broken)
    assert done.returncode == 1
    assert "nobody was killed, and yet this came out" in done.stderr


# ------------------------------------------------------------------------------------------------------- its command line


def test_the_steps_are_found_and_described() -> None:
    """--list: those of management, and every trace event of drive-reopen, each with a sentence."""
    done = lab("--list")
    assert done.returncode == 0, done.stderr
    steps = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert set(STEP_TEXTS) < set(steps)
    assert steps["drive_reopen_witness_synced"] == "The byte is durable"
    assert list(steps).index("drive_reopen_done") < list(steps).index("reply-received")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kill", "everybody"], "--kill takes management, machine, both, host"),
        (["--part", "no"], "--part takes with-witness, refused-witness, without-witness"),
        (["here"], "there is nothing to be said about 'here'"),
        (["--recompute", "x", "--seed", "1"], "--seed is for a new run"),
        (["--output", "yaml"], "--output takes human or json"),
        (["--keeep", "x"], "did you mean --keep?"),
    ],
)
def test_wrong_command_lines_are_told_by_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is started."""
    assert lab_witness.main(args) == 2
    assert said in capsys.readouterr().err


def test_files_of_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--keep takes a new or an empty directory; --recompute one that a run has left."""
    (tmp_path / "thesis.txt").write_text("all of it")
    assert lab_witness.main(["--keep", str(tmp_path)]) == 2
    assert lab_witness.main(["--recompute", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "does not hold a run of this experiment" in said and "No such file or directory: " in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_may_be_kept_at_a_relative_place_and_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict does not depend on where the files are."""
    monkeypatch.chdir(tmp_path)
    done = lab("--part", "with-witness", "--kill", "host", "--step", "later", "--keep", "here")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "here/with-witness/later/host/verdict.json").read_text())
    assert verdict["decision"] == {"image": "target", "ground": "journal"}
    (tmp_path / "here").rename(tmp_path / "there")
    assert lab("--recompute", "there").returncode == 0


def test_an_unknown_step_is_told_with_those_that_there_are() -> None:
    """They are known only after a run in which nobody is killed."""
    done = lab("--step", "coffee")
    assert done.returncode == 2
    assert "there is no step 'coffee'; there are before-mirror, " in done.stderr


# ------------------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize(
    ("lines", "witness", "expected"),
    [
        ([], None, (Image.SOURCE, Ground.JOURNAL)),
        (["in sync"], b"", (Image.SOURCE, Ground.JOURNAL)),
        (["about to reopen"], b"", (Image.SOURCE, Ground.BYTE)),
        (["about to reopen"], b"1", (Image.TARGET, Ground.BYTE)),
        (["about to reopen"], None, (None, Ground.NOTHING)),
        (["about to reopen", "not switched"], None, (Image.SOURCE, Ground.JOURNAL)),
        (["about to reopen", "switched"], b"1", (Image.TARGET, Ground.JOURNAL)),
        (["about to reopen", "restarted", "the machine says: source"], b"", (Image.SOURCE, Ground.MACHINE)),
    ],
)
def test_management_decides_by_the_rule(
    lines: list[str], witness: bytes | None, expected: tuple[Image, Ground]
) -> None:
    """The machine knows best, then the journal, then the byte; without any of them nobody knows."""
    assert decide(lines, witness) == Decision(*expected)


def history(tmp_path: Path, kind: GuestKind, count: int, flushed: int) -> History:
    """Of a guest that has written ``count`` times."""
    path = tmp_path / "journal"
    entries = [write_entry(make_write(kind, number)) for number in range(1, count + 1)]
    path.write_bytes(b"".join(entries) + flushed_entry(flushed) + b'{"write": 99, "off')
    return History.read(path)


def test_an_image_is_searched_for_every_flushed_write(tmp_path: Path) -> None:
    """Written over is not lost, not flushed is not lost, and what nobody wrote is damage."""
    make_disk(tmp_path)
    known = history(tmp_path, GuestKind.COUNTER, 40, 39)
    assert len(known.writes) == 40 and known.flushed == 39
    with qblock.open(tmp_path / "source.qcow2", writable=True, fmt="qcow2", backing=True) as image:
        for write in known.writes[:38]:
            image.write(write.offset, write.content)
    found = examine(tmp_path / "source.qcow2", known)
    assert (found.lost, found.damaged, found.corruptions) == ((39,), (), 0)
    with qblock.open(tmp_path / "source.qcow2", writable=True, fmt="qcow2", backing=True) as image:
        image.write(8192, b"?")
    assert examine(tmp_path / "source.qcow2", known).damaged == (8192,)
    assert examine(tmp_path / "target.qcow2", known).error == "there is no such file"


def test_a_door_that_was_shut_again_hides_nothing(tmp_path: Path) -> None:
    """The same contents come back: only what the disk holds at the end counts."""
    known = history(tmp_path, GuestKind.DOOR, 4, 4)
    place = known.writes[0].offset
    content = bytearray(first_content())
    content[place : place + 4096] = b"the door is shut" * 256
    (tmp_path / "target.raw").write_bytes(content)
    assert examine(tmp_path / "target.raw", known).sound
    content[place : place + 4096] = b"the door is open" * 256
    (tmp_path / "target.raw").write_bytes(content)
    assert examine(tmp_path / "target.raw", known).lost == (4,)


def test_twins_need_the_same_view_and_no_common_right_image() -> None:
    """Two crashes after which either image will do prove nothing."""

    def verdict(step: str, view: str, source: Mapping[str, Any], target: Mapping[str, Any]) -> Verdict:
        plan = Plan(step, Victim.BOTH, Part.WITHOUT)
        members = {"plan": plan.dump(), "decision": {"image": None, "ground": "nothing"}, "flushed": 1, "byte": None}
        members |= {"journal": [], "view": view, "said": "go on with: what? (nothing)", "files": {}}
        return Verdict.load(members | {"source": source, "target": target})

    fine: Json = {}
    lossy = {"lost": [1]}
    early, late = verdict("early", "same", fine, lossy), verdict("late", "same", lossy, fine)
    assert twins([late, early]) == [(early, late)]
    assert twins([early, verdict("late", "other", lossy, fine)]) == []
    assert twins([early, verdict("late", "same", fine, fine)]) == []
    assert twins([early, verdict("late", "same", lossy, lossy)]) == []
