"""Copies of unusual disks to unusual places, on the real program and on qblock: the same is told, and the same is stored.

Left out of the comparison is what `qmp_pair.comparable` leaves out.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import SYSTEMS, add, both, do, hmp, io, outside, wait
from test_backup_vs_qemu import described_image
from test_jobs_vs_qemu import GONE, GRAPH, READY, Script

IMAGES: Final = [
    ["truncate", "-s", "4M", "holes.raw"],
    ["qemu-io", "-f", "raw", "-c", "write -P 1 64k 128k", "-c", "write -P 1 3M 64k", "holes.raw"],
    ["truncate", "-s", "1000448", "odd.raw"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "parts.qcow2", "4M"],
    ["qemu-io", "-c", "write -P 2 4k 4k", "-c", "write -P 2 300k 8k", "-c", "write -z 1M 300k", "-c", "write -P 2 3M 1M",
     "parts.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "space.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "out4k.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "out2M.qcow2", "4M"],
    ["cp", "out4k.qcow2", "out.qcow2"], ["cp", "odd.raw", "odd-out.raw"],
]  # fmt: skip
HOLES = do("blockdev-add", driver="file", node_name="top", filename="holes.raw")
NOTHING = do("blockdev-add", driver="null-co", node_name="top", size=4 << 20)
JOBS, NODES = [do("query-jobs"), do("query-block-jobs")], do("query-named-block-nodes", flat=True)


def job(command: str, **members: Any) -> dict[str, Any]:
    """A job ``j`` on top; a full copy unless something else is said."""
    return do(command, **({"job_id": "j", "device": "top", "sync": "full"} | members))


def raw(name: str, filename: str, **members: Any) -> dict[str, Any]:
    """blockdev-add of a raw image."""
    return do("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": filename}, **members)


def alike(script: Script, place: Path) -> None:
    """Both answer the script alike, step by step."""
    real, ours = both(SYSTEMS, place, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


def stored(image: Path) -> Any:
    """What the real program says of an image, and which parts of it are data, zeroes or nothing; holes inside of data aside."""
    info, areas = described_image(image)
    kinds = [(area["depth"], area["data"], area["present"], area["zero"] and not area["data"]) for area in areas]
    starts = [area["start"] for area, kind, before in zip(areas, kinds, [None, *kinds], strict=False) if kind != before]
    return info, starts, [kind for kind, _ in itertools.groupby(kinds)]


def same_image(place: Path, name: str) -> None:
    """Both have stored the same, in the same way."""
    images = [place / who / name for who in ("real", "ours")]
    assert stored(images[1]) == stored(images[0])
    subprocess.run(["qemu-img", "compare", "-q", *images], check=True)


EXISTING: Final = {"target": "out.qcow2", "mode": "existing"}


@pytest.mark.parametrize("command", ["drive-mirror", "drive-backup"])
def test_a_copy_of_storage_without_a_format_is_storage_without_a_format(command: str, tmp_path: Path) -> None:
    """An existing target is not probed then, and what has no format names no backing file; nothing is left of a refusal."""
    script = [
        HOLES, job(command, target="new.raw", sync="none"), job(command, **EXISTING), GONE, *JOBS,
        do("blockdev-del", node_name="top"), NOTHING, job(command, target="new.qcow2"),
        job(command, target="new.qcow2", format="qcow2", sync="none"), NODES, do("job-cancel", id="j"), GONE, NODES,
    ]  # fmt: skip
    if command == "drive-backup":
        script[2:4] = [job(command, **EXISTING)]  # of another size: told at once
    alike(script, tmp_path)
    assert not any((tmp_path / who / "new.raw").exists() for who in ("real", "ours"))
    headers = [subprocess.check_output(["qemu-img", "info", "-U", tmp_path / who / "new.qcow2"]) for who in ("real", "ours")]
    names = [[line for line in header.splitlines() if line.startswith(b"backing file")] for header in headers]
    assert names[0] and names[1] == names[0]


@pytest.mark.parametrize(
    ("source", "target", "granularity"),
    [("parts.qcow2", "out4k.qcow2", 128 << 10), ("parts.qcow2", "out2M.qcow2", 512), ("space.qcow2", "out4k.qcow2", 0),
     ("holes.raw", "out2M.qcow2", 0), ("nothing", "out4k.qcow2", 0)],
)
def test_a_mirror_copies_whole_granules_and_zeroes_whole_clusters(
    source: str, target: str, granularity: int, tmp_path: Path
) -> None:
    """Which places of the target are data, zeroes or nothing is what later commits, backups and measurements start from."""
    top = NOTHING if source == "nothing" else raw("top", source) if source.endswith("raw") else add("top", source)
    mirror = job("blockdev-mirror", target="out", granularity=granularity)
    alike([top, add("out", target, discard="unmap"), mirror, READY, *JOBS, do("job-cancel", id="j"), GONE], tmp_path)
    same_image(tmp_path, target)


def test_a_mirror_to_an_existing_image_without_layers_zeroes_it_first(tmp_path: Path) -> None:
    """With sync=top as well, since there is nothing below: whatever the target held, it must not show through."""
    script = [raw("top", "holes.raw"), job("drive-mirror", sync="top", format="qcow2", **EXISTING), READY, *JOBS]
    alike([*script, do("job-cancel", id="j"), GONE], tmp_path)
    same_image(tmp_path, "out.qcow2")


@pytest.mark.parametrize("compress", [False, True])
def test_a_backup_finds_the_zeroes_between_data(compress: bool, tmp_path: Path) -> None:
    """What drive-backup makes is as small as it can be, also where it is packed, which the storage cannot do by itself."""
    members = {"compress": compress, "x-perf": {"use-copy-range": True}}
    alike([raw("top", "holes.raw"), job("drive-backup", target="new.qcow2", format="qcow2", **members), GONE], tmp_path)
    same_image(tmp_path, "new.qcow2")


def test_a_backup_counts_whole_clusters_of_a_disk_with_an_odd_size(tmp_path: Path) -> None:
    """In the events and in the queries; and the filter can be written through whether or not its source can."""
    script = [
        raw("top", "odd.raw", read_only=True), raw("out", "odd-out.raw"),
        job("blockdev-backup", target="out", auto_dismiss=False), wait("JOB_STATUS_CHANGE", status="concluded"), *JOBS,
        do("job-dismiss", id="j"), job("blockdev-backup", target="out", sync="none"), *JOBS, NODES,
    ]  # fmt: skip
    alike(script, tmp_path)


def test_what_is_refused_before_or_after_a_target_was_made(tmp_path: Path) -> None:
    """A number that does not fit leaves no file behind, a name that will not do does; both leave no node and no job."""
    script = [
        raw("top", "holes.raw"), job("drive-mirror", target="a.raw", granularity=-1), *JOBS,
        job("drive-mirror", target="b.raw", node_name=""), job("drive-mirror", target="c.raw", granularity=3000), *JOBS, NODES,
    ]  # fmt: skip
    alike(script, tmp_path)
    made = [[(tmp_path / who / f"{name}.raw").exists() for name in "abc"] for who in ("real", "ours")]
    assert made == [[False, True, True]] * 2


@pytest.mark.parametrize("command", ["blockdev-mirror", "blockdev-backup"])
def test_a_command_of_qemu_io_lets_the_jobs_of_a_node_rest(command: str, tmp_path: Path) -> None:
    """Its user of the node goes away again, which is told; what the node's other users forbid is told at the monitor."""
    ready = [READY] if command == "blockdev-mirror" else []
    script = [raw("top", "holes.raw"), add("out", "out4k.qcow2"), job(command, target="out", sync="none"), *ready]
    alike([*script, io("top", "read 0 4k"), io("out", "read 0 4k"), GRAPH], tmp_path)


def test_what_comes_beside_or_above_a_disk_gives_space_back_if_the_disk_does(tmp_path: Path) -> None:
    """The target of a mirror, which is zeroed first then, and the overlay of a snapshot, whose guest goes on discarding."""
    script = [
        hmp("drive_add 0 if=none,id=d,file=parts.qcow2,format=qcow2,discard=unmap"),
        job("drive-mirror", device="d", format="qcow2", **EXISTING), READY, *JOBS, do("job-cancel", id="j"), GONE,
        do("blockdev-snapshot-sync", device="d", snapshot_file="over.qcow2"), io("d", "write 0 128k"), io("d", "discard 64k 64k"),
    ]  # fmt: skip
    alike(script, tmp_path)
    same_image(tmp_path, "out.qcow2")
    same_image(tmp_path, "over.qcow2")


def test_a_target_that_was_emptied_from_outside_is_found_to_be_damaged(tmp_path: Path) -> None:
    """Its header seems to be free space: the job fails with the first write, before the image is made to look sound."""
    script = [
        raw("top", "holes.raw"), add("out", "out.qcow2"), outside("truncate", "-s", "0", "out.qcow2"),
        job("blockdev-backup", target="out", auto_dismiss=False), wait("JOB_STATUS_CHANGE", status="concluded"), *JOBS,
    ]  # fmt: skip
    transcripts = both(SYSTEMS, tmp_path, script, IMAGES)
    told = [event for steps in transcripts for step in steps for event in step["events"]]
    assert [event["data"].pop("msg", None) is not None for event in told].count(True) == 2
    assert transcripts[1] == transcripts[0]


def test_a_new_file_has_at_least_one_block_unless_it_is_empty(tmp_path: Path) -> None:
    """Its first block is written, so that file systems tell where it is; an image does not keep its data in itself."""
    def create(**options: Any) -> Script:
        end = wait("JOB_STATUS_CHANGE", status="concluded")
        return [do("blockdev-create", job_id="j", options=options), end, do("query-jobs"), do("job-dismiss", id="j")]

    sizes = (0, 1, 511, 513)
    files = [step for size in sizes for step in create(driver="file", filename=f"{size}.raw", size=size)]
    storage = do("blockdev-add", driver="file", node_name="out", filename="odd.raw")
    itself = create(driver="qcow2", file="out", size=1 << 20, **{"data-file": {"driver": "file", "filename": "odd.raw"}})
    alike([*files, storage, *itself], tmp_path)
    for who in ("real", "ours"):
        assert [(tmp_path / who / f"{size}.raw").stat().st_size for size in sizes] == [0, 512, 512, 513]
