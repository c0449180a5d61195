"""``qblock lab compare`` as a whole: the same files give the same report, and the report says what the announcement claims."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qblock.lab.compare.comparison import compare
from qblock.lab.compare.crashes import SOURCE_NAME, UNKNOWN, CrashPoint, make_left_files
from qblock.lab.compare.history import Answered, Issued, read_history
from qblock.lab.compare.judging import State
from qblock.lab.compare.load import BLOCK, FIRST_TAG, WRITE, initial_tags, marked
from qblock.lab.compare.picture import draw
from qblock.lab.compare.report import OPERATION, Report, RunReport, as_json, differences, examine, save_verdicts
from qblock.lab.compare.running import AFTER, COPYING, GAVE_UP, IN_STEP, SWITCHING, Settings
from qblock.lab.compare.storage import SOURCE, TARGET
from qblock.lab.compare.strategies import STRATEGIES, TARGET_NAME
from qblock.lab.compare.table import WIDTH, Painter, aligned, knowledge, render
from qblock.tools import lab_compare
from qblock.units import MiB

SETTINGS = Settings(seed=7, disk="ssd", size=8 * MiB)
NAMES = [strategy.name for strategy in STRATEGIES]


def compared(directory: Path, names: list[str], settings: Settings = SETTINGS) -> Path:
    directory.mkdir(exist_ok=True)
    chosen = [strategy for strategy in STRATEGIES if strategy.name in names]
    compare(settings, chosen, directory, progress=lambda _: None)
    return directory


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared(tmp_path_factory.mktemp("lab") / "kept", NAMES)


@pytest.fixture(scope="module")
def report(kept: Path) -> Report:
    found = examine(kept)
    save_verdicts(kept, found)
    return found


def run_of(report: Report, name: str) -> RunReport:
    return next(run for run in report.runs if run.name == name)


def points(report: Report, name: str, phase: str) -> list[CrashPoint]:
    found = [point for point in run_of(report, name).crashes if point.phase == phase]
    assert found, f"no moment of {name} was looked at while {phase}"
    return found


# ------------------------------------------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_report(report: Report, tmp_path: Path) -> None:
    """Whoever doubts a number can run it again, in another directory, and gets that number."""
    again = examine(compared(tmp_path / "elsewhere", ["blkmirror", "mirror"]))
    for run in again.runs:
        before = run_of(report, run.name)
        assert (run.crashes, run.latency, run.phases, run.probes, run.cost) == (
            before.crashes, before.latency, before.phases, before.probes, before.cost,
        )  # fmt: skip


def test_another_seed_gives_another_load(report: Report, tmp_path: Path) -> None:
    """Otherwise the seed would be an option that is accepted and ignored."""
    other = Settings(seed=8, disk="ssd", size=8 * MiB)
    again = examine(compared(tmp_path / "other", ["mirror"], other))
    assert again.runs[0].latency != run_of(report, "mirror").latency


def test_everything_can_be_computed_again_from_the_kept_files(
    kept: Path, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by somebody else, later: from a copy of the directory."""
    copy = tmp_path / "copy"
    shutil.copytree(kept, copy)
    assert lab_compare.main(["--recompute", str(copy), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json(report)))


def test_the_files_can_be_made_again_from_the_history_byte_for_byte(kept: Path, tmp_path: Path) -> None:
    """So what is judged at earlier moments is what was there, too: nothing happened that was not recorded."""
    for name in NAMES:
        records = read_history(kept / name)
        make_left_files(kept / name, records, tmp_path / name, len(records))
        for image in (SOURCE_NAME, TARGET_NAME):
            assert (tmp_path / name / "kill" / image).read_bytes() == (kept / name / image).read_bytes(), (name, image)


def test_a_changed_history_changes_the_verdict(kept: Path, tmp_path: Path) -> None:
    """The verdicts come from the files: an image whose data were tampered with is not called good."""
    copy = tmp_path / "copy"
    shutil.copytree(kept, copy)
    settings = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({**settings, "runs": ["mirror"]}))
    writes = copy / "mirror" / "writes.bin"
    data = bytearray(writes.read_bytes())
    tag = max(r.number for r in read_history(copy / "mirror") if isinstance(r, Issued) and r.op == WRITE) + FIRST_TAG
    for place in range(0, len(data) - 8, 16):
        if int.from_bytes(data[place : place + 8], "little") == tag:
            data[place] ^= 0xFF
    writes.write_bytes(data)
    assert examine(copy).runs[0].crashes[-1].kill.target.state is State.INCOMPLETE


def test_every_kept_file_is_noticed_when_it_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one of which the report would be the same, as of an image below the one that is moved."""
    keep = tmp_path / "keep"
    assert lab_compare.main(["--only", "mirror", "--size", "8M", "--keep", str(keep)]) == 0
    files = [path for path in keep.rglob("*") if path.is_file() and path.name != "verdicts.json"]
    assert len(files) == 13
    assert lab_compare.main(["--recompute", str(keep), "--crash", "mirror:10"]) == 0  # leaves files that are nobody's word
    report = examine(keep)
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"[", b"[ ", 1) if path.suffix == ".jsonl" else data + b" ")
        assert f"{path.relative_to(keep)}: this is not the file that was kept" in differences(keep, report)
        path.write_bytes(data)
    assert differences(keep, report) == []
    (keep / "mirror/source/more.qcow2").touch()
    assert differences(keep, report) == ["mirror/source/more.qcow2: this is not the file that was kept"]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ("mirror/target/copy.qcow2", "mirror/target/copy.qcow2: this is not the image that the history leads to"),
        ("start/base.qcow2", "mirror: the files say something else"),
        ("mirror/probes.json", "mirror: the files say something else"),
        ("verdicts.json", "mirror: the files say something else"),
    ],
)
def test_changed_files_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, complaint: str
) -> None:
    """Each of them: what was told of them is kept with them."""
    keep = tmp_path / "keep"
    assert lab_compare.main(["--only", "mirror", "--size", "8M", "--keep", str(keep)]) == 0
    assert lab_compare.main(["--recompute", str(keep)]) == 0
    assert not capsys.readouterr().err
    data = (keep / changed).read_bytes()
    if changed.endswith(".json"):
        data = data.replace(b"busy", b"idle")
    else:
        data = data.replace(data[-64:], bytes(64))
    (keep / changed).write_bytes(data)
    assert lab_compare.main(["--recompute", str(keep)]) == 1
    assert complaint in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what the announcement claims


def test_every_strategy_brings_the_guest_to_a_good_target(report: Report) -> None:
    """Whatever else differs, all of them do the job, and the old source is left behind."""
    for run in report.runs:
        assert run.outcome == "switched", run.name
        assert run.crashes[-1].kill.target.good, run.name
        assert run.crashes[-1].kill.source.state is State.INCOMPLETE, run.name


def test_streaming_through_blkmirror_writes_the_source_again(report: Report) -> None:
    """Every bit of the source is rewritten, where the job-based mirror leaves the source alone."""
    content = 8 * MiB * 6 // 10
    assert run_of(report, "blkmirror").cost[SOURCE].written > content
    for name in NAMES:
        if name != "blkmirror":
            assert abs(run_of(report, name).cost[SOURCE].written) < MiB, name
        assert run_of(report, name).cost[TARGET].written > content, name


def test_the_mirror_of_2012_copies_a_whole_chunk_for_each_small_write(report: Report) -> None:
    """Its bitmap knows megabytes only; that of 7.2 knows clusters."""
    assert run_of(report, "rfc-2012").cost[TARGET].written > run_of(report, "mirror").cost[TARGET].written + MiB


def test_the_source_of_a_job_is_busy_and_that_of_blkmirror_is_not(report: Report) -> None:
    """Because the source is busy in a job, it does not allow live snapshots and so on."""
    for name in ("rfc-2012", "mirror", "write-blocking", "semi-sync"):
        answers = [probe for probe in run_of(report, name).probes if probe.name in ("live snapshot", "stream", "resize")]
        assert len(answers) == 6
        assert not any(probe.allowed for probe in answers), name
        assert all("busy" in probe.text and "mirror" in probe.text for probe in answers), name
    in_step = {probe.name: probe.allowed for probe in run_of(report, "blkmirror").probes if probe.phase == IN_STEP}
    assert in_step["live snapshot"]
    assert in_step["resize"]


def test_it_is_told_what_was_tried_and_what_became_of_the_operation(report: Report) -> None:
    """Each dialect is asked in its own words; and what is allowed may still do harm."""
    again = {
        run.name: next(probe.command for probe in run.probes if probe.name == "another mirror") for run in report.runs
    }
    assert again["block-copy"] == 'block_copy virtio0 "target/other.qcow2"'
    assert "'full': True" in again["rfc-2012"]
    assert "'mode': 'no-backing-file'" in again["blkmirror"]
    assert "'sync': 'full'" in again["mirror"]
    removed = next(probe for probe in run_of(report, "rfc-2012").probes if probe.name == "drive_del")
    assert removed.allowed
    assert removed.then == "the operation fails: the job has ended"
    stream = [probe for probe in run_of(report, "blkmirror").probes if probe.name == "stream"]
    assert [probe.allowed for probe in stream] == [False, True]
    assert "stream job 'virtio0' was not done" in stream[1].then


def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    """Names go through options, QMP and HMP, each with a quoting of its own."""
    again = examine(compared(tmp_path / 'a "quoted", name=\\', ["block-copy", "mirror"]))
    assert [run.outcome for run in again.runs] == ["switched", "switched"]


def test_before_the_switch_the_source_is_good_at_every_moment(report: Report) -> None:
    """A crash while copying costs the copy and nothing else, whichever way was taken."""
    for run in report.runs:
        for point in run.crashes:
            if point.phase in (COPYING, IN_STEP):
                assert point.kill.source.good, (run.name, point)
                assert point.power.source.good, (run.name, point)


def test_only_the_semi_synchronous_target_survives_a_power_cut_at_every_flush(report: Report) -> None:
    """The guest's flush is answered only when the target is durable, too: the idea that was never merged."""
    assert all(point.power.target.good for point in points(report, "semi-sync", IN_STEP))
    for name in ("rfc-2012", "blkmirror", "mirror", "write-blocking"):
        assert not all(point.power.target.good for point in points(report, name, IN_STEP)), name


def test_the_witness_tells_management_which_image_to_take(report: Report) -> None:
    """With it there is no moment at which management must guess; drive-reopen without it has some."""
    rfc = run_of(report, "rfc-2012")
    assert all(point.pick != UNKNOWN for point in rfc.crashes)
    assert all(point.kill.safe and point.power.safe for point in rfc.crashes)
    assert {point.pick for point in points(report, "rfc-2012", SWITCHING)} == {SOURCE, TARGET}
    assert knowledge(rfc, "kill") == "always knows"
    assert any(point.pick == UNKNOWN for point in points(report, "blkmirror", SWITCHING))


def test_live_block_copy_leaves_management_in_the_dark_from_the_start(report: Report) -> None:
    """It switches by itself, so a crash at any moment of the copying may have been after the switch."""
    run = run_of(report, "block-copy")
    assert IN_STEP not in run.phases
    assert all(point.pick == UNKNOWN for point in points(report, "block-copy", COPYING)[:-1])


def test_a_guest_without_pauses_keeps_the_mirror_of_2012_from_ever_being_in_step(tmp_path: Path) -> None:
    """Write-blocking mode converges under the same load: nothing becomes dirty behind its back."""
    busy = Settings(seed=7, disk="ssd", size=8 * MiB, steady=True)
    again = examine(compared(tmp_path / "busy", ["rfc-2012", "write-blocking"], busy))
    rfc, blocking = again.runs
    assert rfc.outcome.startswith("given up: offset was not len")
    assert GAVE_UP in rfc.phases
    assert AFTER not in rfc.phases
    assert all(point.pick == SOURCE and point.kill.safe for point in rfc.crashes)
    assert blocking.switched


# ------------------------------------------------------------------------------------------------------ the real programs


def expected_disk(kept: Path, name: str, path: Path) -> None:
    """Write the guest's disk at the end as a raw image, from the requests that it sent."""
    base, top = initial_tags(SETTINGS.seed, SETTINGS.size)
    tags = base | top
    sent: dict[int, Issued] = {}
    for record in read_history(kept / name):
        if isinstance(record, Issued):
            sent[record.number] = record
        elif isinstance(record, Answered) and sent[record.number].op == WRITE:
            assert not record.error
            request = sent[record.number]
            first = request.offset // BLOCK
            tags.update(dict.fromkeys(range(first, first + request.length // BLOCK), FIRST_TAG + record.number))
    path.write_bytes(b"".join(marked(tags.get(block, 0), block) for block in range(SETTINGS.size // BLOCK)))


@pytest.mark.qemu
@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_the_guests_disk_as_qemu_reads_it(kept: Path, tmp_path: Path, name: str) -> None:
    """At the end the target alone holds the initial content and all the guest has written, and checks clean."""
    target, expected = kept / name / TARGET_NAME, tmp_path / "expected.raw"
    expected_disk(kept, name, expected)
    for command in (
        ["qemu-img", "check", "-q", "-f", "qcow2", str(target)],
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(expected), str(target)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.mark.qemu
def test_qemu_agrees_with_the_verdicts_on_crashes(kept: Path, report: Report, tmp_path: Path) -> None:
    """Whatever we call good or incomplete, the real qemu-img finds no corruption in (leaks are allowed)."""
    for name in ("rfc-2012", "blkmirror", "semi-sync"):
        chosen = run_of(report, name).crashes[::6]
        for point in chosen:
            scratch = tmp_path / f"{name}-{point.moment}"
            make_left_files(kept / name, read_history(kept / name), scratch, point.moment)
            for crash, left in (("kill", point.kill), ("power", point.power)):
                for verdict, image in ((left.source, SOURCE_NAME), (left.target, TARGET_NAME)):
                    assert verdict.state in (State.GOOD, State.INCOMPLETE, State.ABSENT, State.UNREADABLE)
                    if verdict.state in (State.GOOD, State.INCOMPLETE):
                        command = ["qemu-img", "check", "-q", "-f", "qcow2", str(scratch / crash / image)]
                        done = subprocess.run(command, check=False, capture_output=True, timeout=60)
                        assert done.returncode in (0, 3), (point, crash, image, done.stdout, done.stderr)
            shutil.rmtree(scratch)


# ----------------------------------------------------------------------------------------------------- what people see


def test_the_table_has_a_row_for_every_strategy_and_no_colours_in_a_file(report: Report) -> None:
    """Six tables with six rows; whoever pipes it gets plain text."""
    text = render(report, Painter(colours=False))
    assert "\x1b" not in text
    for name in NAMES:
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 7, name
    assert text.count("guest alone") == 3
    assert "\x1b[1mTIME AND COST" in render(report, Painter(colours=True))


@pytest.mark.parametrize("width", [52, 60, 70, 80, 85])
def test_on_a_narrow_terminal_nothing_is_cut_and_nothing_is_missing(report: Report, width: int) -> None:
    """No line is longer than the terminal, so none is broken in a word; every cell is there, beside its strategy's name."""
    wide, narrow = (render(report, Painter(False, columns)) for columns in (WIDTH, width))
    assert max(map(len, narrow.splitlines())) <= width
    assert set(wide.split()) <= set(narrow.split())
    for run in report.runs:
        written = f"{run.cost[TARGET].written / MiB:.1f} MiB"
        assert any(line.startswith(run.name) and written in line for line in narrow.splitlines()), run.name
        told = knowledge(run, "power cut")
        assert any("power cut" in line and told in line for line in narrow.splitlines()), run.name


def test_a_table_is_parted_between_columns_and_evenly() -> None:
    """As few parts as fit, each with the names of the rows; a column that does not fit anywhere has a part of its own."""
    rows = [("", "one", "two", "three", "four"), ("name", "1", "2", "3", "4")]
    assert aligned(rows, width=27) == [["      one  two  three  four", "name    1    2      3     4"]]
    assert aligned(rows, width=26) == [["      one  two", "name    1    2"], ["      three  four", "name      3     4"]]
    assert [lines[1].split() for lines in aligned(rows, width=5)] == [["name", str(n)] for n in (1, 2, 3, 4)]


def test_the_picture_is_valid_svg_that_names_every_strategy(report: Report) -> None:
    """It can be put on a page as it is."""
    picture = draw(report)
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert words >= set(NAMES)
    circles = len(list(root.iter("{http://www.w3.org/2000/svg}circle")))
    looked_at = sum(len(run.crashes) for run in report.runs)
    assert circles == 2 * looked_at + 3 * (len(NAMES) + 1) + 3  # verdicts, ends of curves, key


def test_the_json_has_the_percentiles_of_each_stage(report: Report) -> None:
    """Programs get everything that the tables show, and more."""
    told = json.loads(json.dumps(as_json(report)))
    run = next(run for run in told["runs"] if run["name"] == "mirror")
    assert run["latency"][OPERATION]["read"]["percentiles"].keys() >= {"p50", "p90", "p99"}
    assert run["latency"].keys() == {OPERATION, COPYING, IN_STEP, SWITCHING, AFTER}
    assert run["crashes"][0]["kill"]["source"]["state"] == "good"


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "magic"], "there is no strategy 'magic'"),
        (["--size", "1M"], "must have 8M to 1024M"),
        (["--size", "many"], "--size"),
        (["--disk", "tape"], "--disk takes ssd or hdd"),
        (["--recompute", "d", "--seed", "3"], "--seed does not go with it"),
        (["--crash", "mirror:100"], "--recompute"),
        (["now"], "options only"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and a line that says what is wrong."""
    assert lab_compare.main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_files_are_not_put_among_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--keep wants an empty directory; and --recompute one that --keep has filled."""
    (tmp_path / "mine").touch()
    assert lab_compare.main(["--keep", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert lab_compare.main(["--recompute", str(tmp_path)]) == 1
    assert "does not hold what --keep has left" in capsys.readouterr().err


def test_the_files_of_a_crash_can_be_made_again(kept: Path, report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    """So that people can look with their own tools at what a moment left."""
    point = points(report, "mirror", IN_STEP)[0]
    assert lab_compare.main(["--recompute", str(kept), "--crash", f"mirror:{point.moment}"]) == 0
    where = Path(capsys.readouterr().out.strip())
    assert (where / "kill" / TARGET_NAME).exists()
    assert (where / "power" / SOURCE_NAME).exists()
    assert lab_compare.main(["--recompute", str(kept), "--crash", "mirror:99999999"]) == 2
    assert lab_compare.main(["--recompute", str(kept), "--crash", "magic:1"]) == 2


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--output", "yaml"], 2, "--output takes human or json"),
        (["--picture", "picture.png"], 2, "should end with .svg"),
        (["--picture", "nowhere/picture.svg"], 1, "No such file or directory"),
    ],
)
def test_what_cannot_be_told_is_refused_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], code: int,
    complaint: str,
) -> None:  # fmt: skip
    """Not after a minute of work."""
    monkeypatch.chdir(tmp_path)
    assert lab_compare.main(["--only", "mirror", "--keep", "kept", *options]) == code
    told = capsys.readouterr()
    assert complaint in told.err
    assert not told.out
    assert list(tmp_path.iterdir()) == []


def test_one_strategy_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way a person runs it, with a picture and files to keep."""
    picture, keep = tmp_path / "picture.svg", tmp_path / "keep"
    arguments = ["--only", "write-blocking", "--size", "8M", "--picture", str(picture), "--keep", str(keep)]
    assert lab_compare.main(arguments) == 0
    assert "write-blocking" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    assert sorted(path.name for path in keep.iterdir()) == [
        "control", "settings.json", "start", "verdicts.json", "write-blocking",
    ]  # fmt: skip
