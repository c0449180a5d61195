"""I/O threads beside the real programs: their settings, which nodes can be moved to which, and what devices keep together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import DAEMONS, QMP, Pair, both, do, wait

pytestmark = pytest.mark.qemu

IMAGES: Final = [["qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "1M"] for name in ("c", "d", "o")]
LINE: Final = ("-S", "-nodefaults", "-display", "none", "-machine", "pc", *QMP)
MACHINES: Final = Pair(real=("qemu-system-x86_64", *LINE), ours=(sys.executable, "-m", "qblock.tools.system", *LINE))
PROPERTIES: Final = ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max")
VALUES: Final = (0, 1, -1, 64, 65, 1 << 31, (1 << 63) - 1, 1 << 63, "x", "7", True, None, 1.5)


def thread(name: str, **members: Any) -> dict[str, Any]:
    """object-add."""
    return do("object-add", qom_type="iothread", id=name, **members)


def settings() -> list[dict[str, Any]]:
    """Each property, made and set with each value."""
    steps = [thread("t0"), do("qom-list", path="/objects"), do("qom-list-properties", typename="iothread")]
    for name in PROPERTIES:
        for number, value in enumerate(VALUES):
            made = f"{name}-{number}"
            steps += [thread(made, **{name: value}), do("qom-get", path=made, property=name), do("object-del", id=made)]
        for value in (2, -1, "x"):
            steps += [do("qom-set", path="t0", property=name, value=value), do("qom-get", path="t0", property=name)]
    return [
        *steps, thread("a", thread_pool_min=5, thread_pool_max=4), thread("a", bogus=1), thread("9"), thread("t0"),
        do("qom-get", path="t0", property="bogus"), do("object-del", id="t0"), do("object-del", id="t0"),
    ]  # fmt: skip


def move(node: str, to: Any, **members: Any) -> dict[str, Any]:
    """x-blockdev-set-iothread."""
    return do("x-blockdev-set-iothread", node_name=node, iothread=to, **members)


def force(node: str, to: Any) -> dict[str, Any]:
    """The same though a backend uses the node directly."""
    return move(node, to, force=True)


def null(name: str, **members: Any) -> dict[str, Any]:
    """A node without an image."""
    return do("blockdev-add", driver="null-co", node_name=name, size=1 << 20, **members)


def over(name: str, image: str, backing: str) -> dict[str, Any]:
    """An image on top of a node."""
    storage = {"driver": "file", "filename": f"{image}.qcow2", "node-name": f"{name}-file"}
    return do("blockdev-add", driver="qcow2", node_name=name, file=storage, backing=backing)


def disk(name: str, drive: str, controller: str) -> dict[str, Any]:
    """A disk on a controller, which shares it with other writers."""
    return do("device_add", driver="scsi-hd", id=name, drive=drive, bus=f"{controller}.0", share_rw=True)


def controller(name: str, **members: Any) -> dict[str, Any]:
    """A controller, maybe on an I/O thread."""
    return do("device_add", driver="virtio-scsi-pci", id=name, **members)


THREADS: Final = [thread("t0"), thread("t1"), null("a"), null("b")]
READY: Final = wait("JOB_STATUS_CHANGE", status="ready")
JOBS: Final = [
    *THREADS, move("a", "t0"), move("a", "nope"), move("nope", "t0"), move("a", None), move("a", None), move("a", 5),
    move("a", ""), do("x-blockdev-set-iothread", node_name="a"),
    do("blockdev-mirror", job_id="m", device="a", target="b", sync="full"), wait("BLOCK_JOB_READY"), move("a", "t0"), READY,
    move("b", "t0"), force("a", "t0"), force("b", "t0"), force("b", None), READY, force("b", "t1"), READY,
    do("block-job-cancel", device="m"), wait("JOB_STATUS_CHANGE", status="null"), move("a", "t1"), move("b", None),
    move("b", "t0"),
]  # fmt: skip
DISKS: Final = [
    *THREADS, controller("s", iothread="t0"), controller("u", iothread="t1"), controller("w"), controller("x", iothread="nope"),
    do("qom-get", path="s", property="iothread"), over("c", "c", "a"), over("d", "d", "a"), disk("h", "c", "s"),
    disk("i", "d", "u"), disk("i", "d", "w"), do("device_add", driver="virtio-blk-pci", id="i", drive="d"),
    disk("i", "d", "s"), move("c", "t0"), force("c", "t0"), force("c", "t1"), move("a", "t0"), move("a", None),
    null("r", read_only=True), disk("j", "r", "u"),
    do("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "c", "file": "c-file", "backing": "r"}]),
    do("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "c", "file": "c-file", "backing": "b"}]), move("b", "t1"),
    disk("k", "b", "w"), null("e"), disk("l", "e", "u"), do("blockdev-backup", job_id="m", device="d", target="e", sync="none"),
    do("query-jobs"), do("query-named-block-nodes", flat=True), force("e", "t1"),
    do("device_add", driver="virtio-blk-pci", id="v", drive="v", iothread="t0"), null("v"),
    do("device_add", driver="virtio-blk-pci", id="v", drive="v", iothread="t0"), force("v", "t0"), force("v", None),
]  # fmt: skip
MEDIA: Final = [
    *THREADS, controller("s", iothread="t0"), do("device_add", driver="scsi-cd", id="cd", bus="s.0"),
    do("blockdev-open-tray", id="cd"), do("blockdev-insert-medium", id="cd", node_name="a"), force("a", None), force("a", "t0"),
    do("blockdev-remove-medium", id="cd"), move("a", None), disk("h", "b", "s"), over("o", "o", "a"),
    do("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "o", "file": "o-file", "backing": None}]), move("o", "t1"),
    do("blockdev-snapshot", node="b", overlay="o"), force("o", None), do("object-del", id="t0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "script"),
    [(DAEMONS, settings()), (DAEMONS, JOBS), (MACHINES, DISKS), (MACHINES, MEDIA)],
    ids=["settings", "jobs", "disks", "media"],
)
def test_both_answer_alike(pair: Pair, script: list[dict[str, Any]], tmp_path: Path) -> None:
    """What is refused for the sake of a disk on another thread, and what moves."""
    real, ours = both(pair, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert _by_name(got) == _by_name(expected)


def _by_name(step: dict[str, Any]) -> dict[str, Any]:
    """Properties may be listed in any order."""
    if not step["step"].get("execute", "").startswith("qom-list"):
        return step
    return step | {"reply": {"return": sorted(step["reply"]["return"], key=lambda item: str(item["name"]))}}
