"""Jobs whose files fail in real ways, on the real daemon and on qblock: no room, requests that fail, files cut off from outside.

Both tell the same, wait for the same, and leave the same on disk. How often an error is told, and how far the copying was, is a
matter of how many requests are under way together: of errors that follow each other one is compared, and progress only at a
good end.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from qmp_pair import DAEMONS, both, do, outside, wait
from test_jobs_vs_qemu import CONCLUDED, READY, Script

pytestmark = pytest.mark.qemu

STARTS: Final[dict[str, dict[str, Any]]] = {
    "stream": do("block-stream", device="top"),
    "commit": do("block-commit", device="top", top_node="mid"),
    "active commit": do("block-commit", device="top"),
    "mirror": do("blockdev-mirror", device="top", target="out", sync="full"),
    "backup": do("blockdev-backup", device="top", target="out", sync="full"),
    "drive-mirror": do("drive-mirror", device="top", target="small/out.qcow2", format="qcow2", sync="full"),
    "drive-backup": do("drive-backup", device="top", target="small/out.qcow2", format="qcow2", sync="full"),
}
WRITTEN: Final = {"stream": "top", "commit": "base", "active commit": "base"}
"""Where a kind of job writes; the others write to ``out``."""
BECOME_READY: Final = ("active commit", "mirror", "drive-mirror")
ERROR, PAUSED, QUERY = wait("BLOCK_JOB_ERROR"), wait("JOB_STATUS_CHANGE", status="paused"), do("query-block-jobs")
COMPLETE, RESUME = do("job-complete", id="j"), do("job-resume", id="j")


def start(kind: str, policy: str) -> dict[str, Any]:
    """The command that starts a job ``j`` of a kind, with a policy for all its errors."""
    command = STARTS[kind]
    two = ("mirror", "backup")
    names = ("on-source-error", "on-target-error") if kind.endswith(two) else ("on-error",)
    policies = dict.fromkeys(names, policy)
    return do(command["execute"], command["arguments"] | policies | {"job-id": "j", "auto-dismiss": False})


def chain(places: dict[str, str], faulty: str = "", **rule: Any) -> Script:
    """The nodes of a chain and of a target; one request to the file of ``faulty`` fails as the rule says."""
    script = []
    for name, below in (("base", {}), ("mid", {"backing": "base"}), ("top", {"backing": "mid"}), ("out", {})):
        file: dict[str, Any] = {"driver": "file", "filename": places[name]}
        if name == faulty:
            file = {"driver": "blkdebug", "image": file, "inject-error": [rule | {"errno": 5, "once": True}]}
        script.append(do("blockdev-add", driver="qcow2", node_name=name, file=file, discard="unmap", **below))
    return script


def images(places: dict[str, str], size: str, *writes: tuple[str, str]) -> list[list[str]]:
    """What makes the images, linked by the nodes only, and writes to them."""
    made = [["qemu-img", "create", "-q", "-f", "qcow2", place, size] for place in places.values()]
    return made + [["qemu-io", "-f", "qcow2", "-c", f"write -q {what}", places[name]] for name, what in writes]


def told(transcript: list[Any]) -> tuple[list[Any], list[Any]]:
    """The events in their order, and the replies."""
    events = [event for step in transcript for event in step["events"]]
    for event in events:
        if event["event"] != "BLOCK_JOB_READY" and ("error" in event["data"] or "len" not in event["data"]):
            event["data"].pop("offset", None)
            event["data"].pop("len", None)
    replies = [step["reply"] for step in transcript if "reply" in step]
    for reply in replies:
        for job in reply.get("return", ()):
            if job["status"] == "paused" or "error" in job:
                del job["offset"]
    return [event for event, _ in itertools.groupby(events)], replies


def compare(place: Path, script: Script, prepare: list[list[str]]) -> None:
    """All that is told is the same."""
    real, ours = both(DAEMONS, place, script, prepare)
    expected, got = told(real), told(ours)
    assert got[0] == expected[0]
    assert got[1] == expected[1]


def same_image(place: Path, name: str) -> None:
    """The image is sound, and holds by itself what that of the real one holds."""
    dumps = []
    for who in ("real", "ours"):
        image = place / who / name
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)
        alone = json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(image)}})
        subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{alone}", place / f"{who}.raw"], check=True)
        dumps.append((place / f"{who}.raw").read_bytes())
    assert dumps[0] == dumps[1]


# ------------------------------------------------------------------------------------------------------------ no room


@pytest.fixture
def small(tmp_path: Path) -> Iterator[list[list[str]]]:
    """The commands that mount a file system of 4 MiB at ``small``."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    yield [["mkdir", "small"], ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "small"]]
    for who in ("real", "ours"):
        subprocess.run(["umount", tmp_path / who / "small"], check=False, stderr=subprocess.DEVNULL)


ROOM = outside("mount", "-o", "remount,size=64m", "small")


def full(kind: str) -> tuple[dict[str, str], list[list[str]]]:
    """Places of the images, of which the one that is written has not room for all that comes; and what makes them."""
    places = {name: f"{name}.qcow2" for name in ("base", "mid", "top", "out")}
    written = WRITTEN.get(kind, "out")
    if not kind.startswith("drive"):
        places[written] = f"small/{written}.qcow2"
    return places, images(places, "16M", ("mid", "-P 2 0 8M"), ("top", "-P 3 6M 1M"))


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("stream", "stop"), ("commit", "enospc"), ("active commit", "stop"), ("mirror", "enospc"), ("backup", "stop"),
     ("drive-mirror", "stop")],
)
def test_a_job_without_room_stops_and_goes_on_when_there_is(
    kind: str, policy: str, small: list[list[str]], tmp_path: Path
) -> None:
    """The job waits until somebody has made room and resumes it; then it ends well, and nothing is missing."""
    places, prepare = full(kind)
    ending = [READY, COMPLETE] if kind in BECOME_READY else []
    script = [*chain(places), start(kind, policy), ERROR, PAUSED, QUERY, ROOM, RESUME, *ending, CONCLUDED, QUERY]
    compare(tmp_path, script, small + prepare)
    same_image(tmp_path, places[WRITTEN.get(kind, "out")] if not kind.startswith("drive") else "small/out.qcow2")


@pytest.mark.parametrize("kind", ["commit", "mirror", "backup"])
def test_an_ignored_lack_of_room_is_over_when_there_is_some(kind: str, small: list[list[str]], tmp_path: Path) -> None:
    """It is told each time, the job tries again by itself, and ends well once it can."""
    places, prepare = full(kind)
    ending = [READY, COMPLETE] if kind in BECOME_READY else []
    compare(tmp_path, [*chain(places), start(kind, "ignore"), ERROR, ROOM, *ending, CONCLUDED, QUERY], small + prepare)
    same_image(tmp_path, places[WRITTEN.get(kind, "out")])


@pytest.mark.parametrize(("kind", "policy"), [("commit", "report"), ("drive-backup", "report"), ("stream", "ignore")])
def test_a_job_without_room_fails_and_leaves_what_was_there(
    kind: str, policy: str, small: list[list[str]], tmp_path: Path
) -> None:
    """The job ends with the error, once; the disk reads as before."""
    places, prepare = full(kind)
    compare(tmp_path, [*chain(places), start(kind, policy), CONCLUDED, QUERY, ROOM], small + prepare)
    for who in ("real", "ours"):
        for name in ("base", "mid", "top"):
            result = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / who / places[name]], check=False)
            assert result.returncode in (0, 3), (who, name)


def test_a_target_that_finds_no_room_is_not_left_behind(small: list[list[str]], tmp_path: Path) -> None:
    """The command fails, there is no job, and no half of an image."""
    kind = "drive-mirror"
    places, prepare = full(kind)
    fill = outside("sh", "-c", "head -c 4100k /dev/zero > small/filler || true")
    compare(tmp_path, [*chain(places), fill, start(kind, "stop"), QUERY], small + prepare)
    assert [path.name for who in ("real", "ours") for path in (tmp_path / who / "small").iterdir()] == ["filler"] * 2


# ---------------------------------------------------------------------------------------------------- requests that fail


PLACES: Final = {name: f"{name}.qcow2" for name in ("base", "mid", "top", "out")}
DATA: Final = images(PLACES, "4M", ("base", "-P 1 0 64k"), ("mid", "-P 2 512k 128k"), ("top", "-P 3 2M 64k"))
FAULTS: Final = (
    ("stream", "mid", "l2_load"), ("stream", "top", "write_aio"), ("commit", "mid", "read_aio"), ("commit", "base", "l2_load"),
    ("active commit", "base", "flush_to_disk"), ("mirror", "out", "write_aio"), ("backup", "top", "read_aio"),
)  # fmt: skip
"""Kind of job, layer whose file fails, and step at which it does."""


@pytest.mark.parametrize(("kind", "layer", "event"), FAULTS)
def test_after_one_failed_request_the_same_place_is_tried_again(kind: str, layer: str, event: str, tmp_path: Path) -> None:
    """The job stops, is resumed, and the copy is whole."""
    iotype = {"iotype": "flush"} if event.startswith("flush") else {}
    ending = [READY, COMPLETE] if kind in BECOME_READY else []
    nodes = chain(PLACES, layer, event=event, **iotype)
    compare(tmp_path, [*nodes, start(kind, "stop"), ERROR, PAUSED, QUERY, RESUME, *ending, CONCLUDED, QUERY], DATA)
    same_image(tmp_path, PLACES[WRITTEN.get(kind, "out")])


@pytest.mark.parametrize("kind", ["active commit", "mirror"])
def test_a_source_that_cannot_say_what_it_holds_ends_a_mirror(kind: str, tmp_path: Path) -> None:
    """No policy is asked, and no BLOCK_JOB_ERROR is sent."""
    compare(tmp_path, [*chain(PLACES, "top", event="l2_load"), start(kind, "stop"), CONCLUDED, QUERY], DATA)


# ---------------------------------------------------------------------------------------------- files cut off from outside


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [("stream", "mid", "256K"), ("commit", "base", "384K"), ("mirror", "top", "256K"), ("backup", "base", "256K")],
)
def test_a_file_that_was_cut_off_is_read_alike(kind: str, name: str, size: str, tmp_path: Path) -> None:
    """Somebody has made the file of a layer shorter: what is gone reads as zeroes or is an error, with nobody left waiting."""
    ending = outside("truncate", "-s", size, PLACES[name])
    complete = [READY, COMPLETE] if kind in BECOME_READY else []
    compare(tmp_path, [*chain(PLACES), ending, start(kind, "report"), *complete, CONCLUDED, QUERY], DATA)
    if WRITTEN.get(kind, "out") != name:
        same_image(tmp_path, PLACES[WRITTEN.get(kind, "out")])
