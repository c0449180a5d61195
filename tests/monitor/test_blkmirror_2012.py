"""The dialect of March 2012: a mirror by driver is installed, shown, undone, streamed through, and left; and where it is weak."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

import qblock
from qblock.drivers.blkmirror import BlkmirrorDriver
from qblock.errors import BlockIOError
from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.node import BlockDriverState
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine
from qblock.units import KiB, MiB

SIZE = 4 * MiB


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A chain of two: ``top.qcow2`` over ``base.qcow2``."""
    make_chain(tmp_path, SIZE, [("base.qcow2", {0: b"b" * 256 * KiB, 2 * MiB: b"B" * MiB}), ("top.qcow2", {65536: b"t" * 512})])
    return tmp_path


def machine(directory: Path, drive: str = "top.qcow2,format=qcow2") -> LocalMachine:
    return LocalMachine(
        options=MachineOptions(
            seed=0, dialect=Dialect.BLKMIRROR_2012, drives=(f"if=virtio,id=virtio0,file={directory}/{drive}",)
        )
    )


def mirror(local: LocalMachine, target: Path, *, mode: str = "no-backing-file", fmt: str = "qcow2") -> None:
    local.qmp.execute("drive-mirror", device="virtio0", target=str(target), format=fmt, mode=mode)


def reopen(local: LocalMachine, image: Path) -> None:
    local.qmp.execute("drive-reopen", {"device": "virtio0", "new-image-file": str(image)})


def shape(local: LocalMachine) -> dict[str, tuple[str, list[str], bool]]:
    """What of the graph a command that was undone must leave as it was; automatic names included."""
    graph = local.machine.system.graph
    return {
        name: (node.driver.name, [edge.node.node_name for edge in node.children.values()], node.read_only)
        for name, node in graph.nodes.items()
    }


def driver_shown(local: LocalMachine) -> str:
    return str(local.qmp.execute("query-block")[0]["inserted"]["drv"])


def read(path: Path, offset: int, length: int) -> bytes:
    with qblock.open(path, backing=True) as image:
        return image.read(offset, length)


# -------------------------------------------------------------------------------------------------- install and show


def test_the_device_shows_the_mirror_over_its_image(images: Path) -> None:
    """``drv`` is blkmirror, the file name tells both sides, and the chain below is the source's."""
    with machine(images) as local:
        assert local.qmp.hmp(f"drive_mirror -s virtio0 {images}/copy.qcow2 qcow2") == ""
        inserted = local.qmp.execute("query-block")[0]["inserted"]
        assert inserted["drv"] == "blkmirror"
        assert "top.qcow2" in inserted["file"] and "copy.qcow2" in inserted["file"]
        assert inserted["image"]["virtual-size"] == SIZE
        assert inserted["image"]["backing-image"]["filename"].endswith("top.qcow2")
        assert "(blkmirror)" in local.qmp.hmp("info block")
        assert local.qmp.hmp("info block-jobs") == "No active jobs\n"


@pytest.mark.parametrize(
    ("flags", "backing"), [("", "base.qcow2"), ("-s ", None), ("-n ", "base.qcow2"), ("-n -s ", "base.qcow2")]
)
def test_the_flags_say_what_is_made(flags: str, backing: str | None, images: Path) -> None:
    """-s: no backing file; -n: the image exists, whatever its header says."""
    copy = images / "copy.qcow2"
    if "-n" in flags:
        make_image(copy, SIZE, backing="base.qcow2")
    with machine(images) as local:
        assert local.qmp.hmp(f"drive_mirror {flags}virtio0 {copy} qcow2") == ""
        node = local.machine.system.graph.lookup("virtio0")
        assert isinstance(node.driver, BlkmirrorDriver)
        assert node.driver.target.node.backing is None, "it is opened without"
    with qblock.open(copy, backing=True) as image:
        written = image.info().backing_filename
    assert written == (None if backing is None else str(images / backing) if "-n" not in flags else backing)


def test_the_target_is_opened_as_the_source_was(images: Path) -> None:
    """A discard that frees space in the one frees it in the other."""
    with machine(images, "top.qcow2,format=qcow2,discard=unmap,cache=unsafe") as local:
        mirror(local, images / "copy.qcow2")
        node = local.machine.system.graph.lookup("virtio0")
        assert isinstance(node.driver, BlkmirrorDriver)
        target = node.driver.target.node
        assert node.discard_unmap and target.discard_unmap and target.cache_no_flush


def test_a_write_that_comes_while_the_target_is_opened_goes_to_both(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the mirror. On its way to the source alone it could end after that place has been streamed."""
    with machine(images) as local:
        system = local.machine.system
        disk, opened = system.graph.find_backend("virtio0"), system.opener.open_image
        writes: list[asyncio.Future[None]] = []

        async def meanwhile(filename: str, **options: Any) -> BlockDriverState:
            writes.append(asyncio.ensure_future(disk.write(0, b"late" * 1024)))
            await system.clock.sleep_ns(10**9)
            return await opened(filename, **options)

        monkeypatch.setattr(system.opener, "open_image", meanwhile)
        mirror(local, images / "copy.qcow2")
        local.run(asyncio.wait_for(writes[0], 1))
    assert read(images / "copy.qcow2", 0, 4096) == b"late" * 1024 == read(images / "top.qcow2", 0, 4096)


def test_a_disk_that_gets_another_image_meanwhile_gets_no_mirror(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target has been made for the image that was there."""
    with machine(images) as local:
        system = local.machine.system
        disk, opened = system.graph.find_backend("virtio0"), system.opener.open_image

        async def meanwhile(filename: str, **options: Any) -> BlockDriverState:
            disk.remove()
            disk.insert(await system.opener.open_blockdev({"driver": "memory", "node-name": "other", "size": SIZE}))
            return await opened(filename, **options)

        monkeypatch.setattr(system.opener, "open_image", meanwhile)
        with pytest.raises(QmpError, match="its images have changed meanwhile"):
            mirror(local, images / "copy.qcow2")
        assert driver_shown(local) == "memory"


def test_a_mirror_can_be_put_over_a_mirror(images: Path) -> None:
    """It is a filter like others: each writes to what it knows of. Streaming goes through all of them."""
    with machine(images) as local:
        for name in ("one.qcow2", "two.qcow2"):
            mirror(local, images / name)
        local.guest_write("virtio0", MiB, 4096, 7)
        local.qmp.execute("block-stream", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED")
    for name in ("one.qcow2", "two.qcow2"):
        assert read(images / name, 0, SIZE) == read(images / "top.qcow2", 0, SIZE)


def test_installed_by_its_name_like_a_snapshot(images: Path) -> None:
    """A filter's name stands where a file's can: blockdev-snapshot-sync appends what it names."""
    make_image(images / "copy.qcow2", SIZE)
    make_image(images / "short.qcow2", SIZE // 2)
    with machine(images) as local:
        before = shape(local)
        for wrong, why in (("qcow9:copy.qcow2", "qcow9"), ("qcow2:short.qcow2", "too few"), ("qcow2:", "no")):
            fmt, _, name = wrong.partition(":")
            printed = local.qmp.hmp(f"snapshot_blkdev -n virtio0 blkmirror:{fmt}:{images / name if name else ''}")
            assert why in printed
            assert shape(local) == before
        assert local.qmp.hmp(f"snapshot_blkdev -n virtio0 blkmirror:qcow2:{images}/copy.qcow2") == ""
        assert driver_shown(local) == "blkmirror"
        local.guest_write("virtio0", MiB, 4096, 7)
    assert read(images / "copy.qcow2", MiB, 4096) == b"\7" * 4096 == read(images / "top.qcow2", MiB, 4096)


# ---------------------------------------------------------------------------------------------------- all or nothing


def test_a_transaction_that_fails_takes_the_mirror_away_again(images: Path) -> None:
    """The snapshot before it, too. What stays are the files that were made, and the guest writes where it wrote."""
    with machine(images) as local:
        before = shape(local)
        actions = [
            ("blockdev-snapshot-sync", {"device": "virtio0", "snapshot-file": str(images / "new.qcow2")}),
            ("drive-mirror", {"device": "virtio0", "target": str(images / "copy.qcow2"), "format": "qcow2"}),
            ("drive-mirror", {"device": "virtio0", "target": str(images / "none" / "copy"), "format": "qcow2"}),
        ]
        with pytest.raises(QmpError):
            local.qmp.execute("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])
        assert shape(local) == before
        local.guest_write("virtio0", MiB, 4096, 7)
        # Nothing holds the files that were made: they can be made again.
        local.qmp.execute("transaction", actions=[{"type": kind, "data": data} for kind, data in actions[:2]])
        local.guest_write("virtio0", MiB, 4096, 8)
    assert read(images / "copy.qcow2", MiB, 4096) == b"\10" * 4096 == read(images / "new.qcow2", MiB, 4096)
    assert read(images / "top.qcow2", MiB, 4096) == b"\7" * 4096


# ------------------------------------------------------------------------------------------------------------- leaving


def test_leaving_for_an_image_that_is_not_there_keeps_the_mirror(images: Path) -> None:
    """drive-reopen has closed both sides by then; both are opened again, and get what comes next."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.guest_write("virtio0", MiB, 4096, 7)
        with pytest.raises(QmpError, match=r"it keeps '.*top\.qcow2'"):
            reopen(local, images / "absent.qcow2")
        assert driver_shown(local) == "blkmirror"
        local.guest_write("virtio0", MiB + 4096, 4096, 8)
        assert local.guest_read("virtio0", MiB, 8192) == b"\7" * 4096 + b"\10" * 4096
    assert read(images / "copy.qcow2", MiB, 8192) == b"\7" * 4096 + b"\10" * 4096


def test_leaving_before_the_stream_has_ended_is_refused(images: Path) -> None:
    """The job is cancelled, as any job is; the mirror stays, and the stream can begin anew."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.qmp.execute("block-stream", device="virtio0", speed=64 * KiB)
        with pytest.raises(QmpError) as refused:
            reopen(local, images / "copy.qcow2")
        assert refused.value.error_class == "DeviceInUse"
        local.qmp.wait_event("BLOCK_JOB_CANCELLED", device="virtio0")
        assert driver_shown(local) == "blkmirror"
        local.qmp.execute("block-stream", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED", device="virtio0")
        reopen(local, images / "copy.qcow2")
        assert driver_shown(local) == "qcow2"
        assert local.machine.system.graph.lookup("virtio0").backing is None
    assert read(images / "copy.qcow2", 0, SIZE) == read(images / "top.qcow2", 0, SIZE)


def test_without_a_mirror_streaming_is_what_it_always_was(images: Path) -> None:
    """What is in the device's image already is not written again."""
    with machine(images) as local:
        seen: list[str] = []
        local.machine.system.env.trace.listen("stream_*", lambda name, _: seen.append(name))
        local.qmp.execute("block-stream", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert "stream_start" in seen and not any(name.startswith("stream_through") for name in seen)


def test_everything_is_written_again_and_the_job_says_so(images: Path) -> None:
    """Progress, speed, pause points and trace events are those of a job; each stored byte of the chain passes the mirror once."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        parts: list[tuple[int, int]] = []
        local.machine.system.env.trace.listen(
            "stream_through_one_iteration", lambda _, members: parts.append((members["offset"], members["length"]))
        )
        local.qmp.execute("block-stream", device="virtio0", speed=256 * KiB)
        local.advance("1s")
        (job,) = local.qmp.execute("query-block-jobs")
        assert (job["type"], job["len"], job["speed"]) == ("stream", SIZE, 256 * KiB) and 0 < job["offset"] < SIZE
        local.qmp.execute("block-job-set-speed", {"device": "virtio0", "speed": 0})
        ended = local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert ended.data["offset"] == ended.data["len"] == SIZE
        covered = sorted(parts)
        assert sum(length for _, length in covered) == 256 * KiB + MiB
        assert covered[0][0] == 0 and sum(covered[-1]) == 3 * MiB


def test_a_disk_that_cannot_be_written_can_be_mirrored_and_not_streamed(images: Path) -> None:
    """Every bit of the source would have to be written."""
    with machine(images, "top.qcow2,format=qcow2,readonly=on") as local:
        mirror(local, images / "copy.qcow2")
        with pytest.raises(QmpError, match="read-only"):
            local.qmp.execute("block-stream", device="virtio0")
        assert driver_shown(local) == "blkmirror"
        assert local.qmp.execute("query-block-jobs") == []


# -------------------------------------------------------------------------------------------- what was said against it


def test_while_it_is_streamed_the_disk_is_busy_and_otherwise_anything_goes(images: Path) -> None:
    """A job on the source refuses snapshots; a filter does not, and that is the trouble."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.qmp.execute("block-stream", device="virtio0", speed=64 * KiB)
        snapshot = {"device": "virtio0", "snapshot-file": str(images / "new.qcow2")}
        for command, arguments in (
            ("blockdev-snapshot-sync", snapshot),
            ("block-stream", {"device": "virtio0"}),
            ("drive-mirror", {"device": "virtio0", "target": str(images / "two.qcow2"), "format": "qcow2"}),
        ):
            with pytest.raises(QmpError) as refused:
                local.qmp.execute(command, arguments)
            assert refused.value.error_class == "DeviceInUse"
        local.qmp.execute("block-job-cancel", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_CANCELLED")
        local.qmp.execute("blockdev-snapshot-sync", snapshot)


def test_a_live_snapshot_goes_above_the_mirror_and_silently_ends_the_mirroring(images: Path) -> None:
    """What the guest writes from then on is in the overlay alone: the copy stays behind, and who moves there loses it. The
    announcement of job-based mirroring has this in mind when it speaks of strange interactions."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.qmp.execute("block-stream", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        local.guest_write("virtio0", MiB, 4096, 7)
        local.qmp.execute("blockdev-snapshot-sync", {"device": "virtio0", "snapshot-file": str(images / "new.qcow2")})
        local.guest_write("virtio0", MiB, 512, 8)
        graph = local.machine.system.graph
        overlay = graph.lookup("virtio0")
        assert overlay.driver.name == "qcow2" and overlay.backing is not None
        assert overlay.backing.node.driver.name == "blkmirror"
        assert graph.skip_filters(overlay.backing.node).driver.filename() == str(images / "top.qcow2")
        reopen(local, images / "copy.qcow2")
        lost = local.run(local.machine.guest("virtio0").disk.backend.read(MiB, 512))
        assert lost == b"\7" * 512
    assert read(images / "new.qcow2", MiB, 1024) == b"\10" * 512 + b"\7" * 512


def test_moving_before_anything_was_streamed_loses_the_disk(images: Path) -> None:
    """Nothing stops management from it: the driver does not know what the target lacks."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.guest_write("virtio0", MiB, 4096, 7)
        reopen(local, images / "copy.qcow2")
        guest = local.machine.guest("virtio0")
        assert local.run(guest.disk.backend.read(MiB, 4096)) == b"\7" * 4096
        assert local.run(guest.disk.backend.read(0, 4096)) == bytes(4096)


def test_quitting_leaves_both_images_whole(images: Path) -> None:
    """And equal, once everything was streamed: the target is flushed when it is closed."""
    with machine(images) as local:
        mirror(local, images / "copy.qcow2")
        local.qmp.execute("block-stream", device="virtio0")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        local.guest_write("virtio0", 3 * MiB, 64 * KiB, 9)
        local.qmp.execute("quit")
    assert read(images / "copy.qcow2", 0, SIZE) == read(images / "top.qcow2", 0, SIZE)


def test_a_target_that_fails_fails_the_guest(images: Path) -> None:
    """Though the source has the data. The way out is drive-reopen to the source itself."""
    (images / "copy.raw").write_bytes(bytes(SIZE))
    (images / "rules").write_text('[inject-error]\nevent = "pwritev"\nerrno = "5"\n')
    with machine(images) as local:
        failing = f"blkdebug:{images}/rules:{images}/copy.raw"
        local.qmp.execute("drive-mirror", device="virtio0", target=failing, format="raw", mode="existing")
        with pytest.raises(BlockIOError) as failure:
            local.guest_write("virtio0", MiB, 4096, 7)
        assert failure.value.errno == errno.EIO
        assert local.run(local.machine.guest("virtio0").disk.backend.read(MiB, 4096)) == b"\7" * 4096
        local.qmp.execute("block-stream", device="virtio0")
        ended = local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert "error" in ended.data and driver_shown(local) == "blkmirror"
        reopen(local, images / "top.qcow2")
        assert driver_shown(local) == "qcow2"
        local.guest_write("virtio0", MiB, 4096, 8)
    assert read(images / "top.qcow2", MiB, 4096) == b"\10" * 4096
