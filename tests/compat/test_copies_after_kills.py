"""What live block copy and semi-synchronous mirroring leave in their files, at whatever moment, as the real qemu-img sees it.

A killed process leaves its files as they are, so a kill is a copy of the files between two steps of virtual time.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest

from qblock.drivers.file import FileDriver
from qblock.jobs.block_copy import start_block_copy
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.units import KiB, MiB

pytestmark = pytest.mark.qemu

SIZE = 8 * MiB
LEAKS = 3
"""Exit code of a check that found clusters nobody uses, which a kill may leave."""


class Disk:
    """The guest's disk ``virtio0`` on a machine, and a model of what it holds and of what was flushed."""

    def __init__(self, local: LocalMachine, seed: int, content: bytes) -> None:
        self.local = local
        self.random = Random(seed)
        self.model = bytearray(content)
        self.flushed = bytes(content)

    def write(self, times: int) -> None:
        for _ in range(times):
            offset, length = self.random.randrange(SIZE // 4096) * 4096, 4096
            pattern = self.random.randrange(1, 256)
            self.local.guest_write("virtio0", offset, length, pattern)
            self.model[offset : offset + length] = bytes([pattern]) * length

    def flush(self) -> None:
        self.local.run(self.local.machine.system.graph.find_backend("virtio0").flush())
        self.flushed = bytes(self.model)


def copied(directory: Path, into: Path) -> Path:
    """The images of a directory as a kill would leave them."""
    into.mkdir()
    for path in directory.iterdir():
        shutil.copy(path, into)
    return into


def content(image: Path) -> bytes:
    """What the real qemu-img reads from an image that passes its check."""
    checked = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert checked.returncode in (0, LEAKS), checked.stdout + checked.stderr
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("incremental", [False, True], ids=["full", "incremental"])
def test_a_block_copy_leaves_two_good_images_at_any_moment(tmp_path: Path, incremental: bool) -> None:
    """Before the switch the source has what was flushed, afterwards the target; both can always be opened."""
    home = tmp_path / "home"
    home.mkdir()
    data = Random(1).randbytes(4 * MiB)
    base, source = make_chain(home, SIZE, [("base", {0: data}), ("top", {})])
    target = home / "new"
    start = bytes(data) + bytes(SIZE - len(data))
    options = MachineOptions(
        drives=(drive_text(source, "virtio0", "qcow2"),), seed=0, dialect=Dialect.BLOCK_COPY_2011
    )
    sides = []
    with LocalMachine(options=options) as local:
        disk = Disk(local, 1, start)
        disk.write(20)
        local.run(
            start_block_copy(
                local.machine.system, device="virtio0", filename=str(target), incremental=incremental, speed=2 * MiB
            )
        )
        for step in range(14):
            disk.write(5)
            disk.flush()
            left = copied(home, tmp_path / f"left{step}")
            switched = local.qmp.hmp("info block-jobs").startswith("No active")
            assert content(left / ("new" if switched else "top")) == disk.flushed
            content(left / ("top" if switched else "new"))
            sides.append(switched)
            local.advance("500ms")
            disk.write(2)
    assert sides == sorted(sides) and set(sides) == {False, True}
    assert content(target) == bytes(disk.model)
    info = subprocess.run(["qemu-img", "info", target], capture_output=True, text=True, check=True).stdout
    assert (str(base) in info) is incremental


def test_a_semi_synchronous_mirror_has_what_was_flushed_in_the_file(tmp_path: Path) -> None:
    """The target alone, copied after each flush; and in the machine's own words it was ready all the time."""
    home = tmp_path / "home"
    home.mkdir()
    data = Random(2).randbytes(2 * MiB)
    source, target = make_image(home / "old", SIZE, {0: data}), make_image(home / "new", SIZE)
    with LocalMachine(options=MachineOptions(drives=(drive_text(source, "virtio0", "qcow2"),), seed=0)) as local:
        disk = Disk(local, 2, bytes(data) + bytes(SIZE - len(data)))
        local.qmp.execute(
            "drive-mirror", device="virtio0", target=str(target), sync="full", mode="existing", copy_mode="semi-sync",
            granularity=64 * KiB,
        )  # fmt: skip
        local.qmp.wait_event("BLOCK_JOB_READY")
        for step in range(8):
            disk.write(12)
            if step == 3:
                local.qmp.execute("block-job-pause", device="virtio0")
            disk.flush()
            assert content(copied(home, tmp_path / f"left{step}") / "new") == disk.flushed
            if step % 2:
                local.advance("30ms")
        assert local.qmp.execute("query-block-jobs")[0]["ready"]


class KilledAtEachStep(FileDriver):
    """Storage that keeps a copy of all images as they are before each of its steps."""

    name: ClassVar[str] = "file"
    home: ClassVar[Path]
    left: ClassVar[list[Path]]

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        self._kill()
        await super().write_from(offset, buffer, fua=fua)

    async def flush(self) -> None:
        self._kill()
        await super().flush()

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        self._kill()
        await super().truncate(length, exact=exact, preallocation=preallocation)

    def _kill(self) -> None:
        self.left.append(copied(self.home, self.home.parent / f"left{len(self.left)}"))


def snapshot_of(image: Path) -> bytes | None:
    """The disk as the snapshot ``one`` keeps it; None where there is none."""
    if b"one" not in subprocess.run(["qemu-img", "snapshot", "-l", image], capture_output=True, check=True).stdout:
        return None
    raw = image.with_suffix(".one")
    subprocess.run(["qemu-img", "convert", "-l", "snapshot.name=one", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


def test_a_snapshot_of_a_machine_is_whole_in_each_disk_or_not_there_at_any_step(tmp_path: Path) -> None:
    """Killed while it is made, loaded or deleted: each disk is that of before or of after, and so is what its snapshot keeps."""
    KilledAtEachStep.home, KilledAtEachStep.left = tmp_path / "home", []
    KilledAtEachStep.home.mkdir()
    disks = [make_image(KilledAtEachStep.home / name, MiB) for name in ("a", "b")]
    old, new = (bytes([value]) * (64 * KiB) + bytes(MiB - 64 * KiB) for value in (1, 2))
    with LocalMachine() as local:
        local.machine.system.registry.register(KilledAtEachStep)
        for disk in disks:
            local.qmp.execute("blockdev-add", driver="qcow2", node_name=disk.name, file={"driver": "file", "filename": str(disk)})

        def write(value: int) -> None:
            for disk in disks:
                for line in (f"write -P {value} 0 64k", "flush"):
                    assert not local.qmp.hmp(f'qemu-io {disk.name} "{line}"')

        def killed(verb: str, current: set[bytes], kept: set[bytes | None]) -> None:
            for path in KilledAtEachStep.left:
                shutil.rmtree(path)
            KilledAtEachStep.left.clear()
            members = {} if verb == "delete" else {"vmstate": "a"}
            local.qmp.execute(f"snapshot-{verb}", job_id=verb, tag="one", devices=["a", "b"], **members)
            local.advance("1s")
            assert [(job["id"], job["status"], job.get("error")) for job in local.qmp.execute("query-jobs")] == [
                (verb, "concluded", None)
            ]
            local.qmp.execute("job-dismiss", id=verb)
            seen = set()
            for path in KilledAtEachStep.left:
                for disk in disks:
                    seen.add((content(path / disk.name), snapshot_of(path / disk.name)))
            assert {one for one, _ in seen} == current and {one for _, one in seen} == kept

        write(1)
        killed("save", {old}, {None, old})
        write(2)
        killed("load", {old, new}, {old})
        killed("delete", {old}, {old, None})
