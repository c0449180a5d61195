"""A guest is moved to another image by blkmirror, streaming and drive-reopen; the real qemu-img looks at the images.

The guest works all the time, on real files and on virtual time: it writes, zeroes, discards and flushes, before the mirror is
there, while the disk is streamed through it, while the drive is reopened, and afterwards on the target.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

import pytest

from qblock.guest import UNKNOWN, Guest, Workload, byte_tag, expected_bytes
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_image
from qblock.testing.machines import LocalMachine
from qblock.testing.schedules import Seeded
from qblock.units import KiB, MiB

SIZE = 8 * MiB
BUSY = Workload(interval_ns=4_000_000, sizes=(512, 4096, 16 * KiB, 128 * KiB), discards=6, zero_writes=4)
LAYERS = (("base.qcow2", ((0, 3 * MiB, 1), (5 * MiB, MiB, 2))), ("top.qcow2", ((MiB, MiB, 3), (7 * MiB, 64 * KiB, 4))))


def qemu_img(*arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    """Run it, with one of these exit codes."""
    code = subprocess.run(["qemu-img", *arguments], check=False, stdout=subprocess.DEVNULL).returncode
    assert code in allowed, f"qemu-img {' '.join(arguments)}: {code}"
    return code


def make_layers(directory: Path) -> None:
    below = None
    for name, pieces in LAYERS:
        data = {offset: bytes([byte]) * length for offset, length, byte in pieces}
        make_image(directory / name, SIZE, data, backing=below, cluster_size=64 * KiB)
        below = name


def machine(seed: int) -> LocalMachine:
    return LocalMachine(Seeded(seed), MachineOptions(seed=seed, dialect=Dialect.BLKMIRROR_2012))


def begin(local: LocalMachine, directory: Path) -> Guest:
    """The drive with its chain, and a guest at work on it that knows what the disk holds."""
    local.run(
        local.machine.add_drive(f"if=virtio,id=virtio0,file={directory}/top.qcow2,format=qcow2,discard=unmap")
    )
    guest = local.machine.guest("virtio0")
    guest.expect(0, SIZE, 0)
    for _, pieces in LAYERS:
        for offset, length, byte in pieces:
            guest.expect(offset, length, byte_tag(byte))

    async def start() -> None:
        guest.start(BUSY)

    local.run(start())
    local.advance("50ms")
    return guest


def save_expected(guest: Guest, image: Path, path: Path) -> None:
    """The disk as the guest knows it, as a raw file; what it has discarded is taken from ``image``."""
    qemu_img("convert", "-O", "raw", str(image), str(path))
    with path.open("r+b") as file:
        for run, tag in guest.content.runs():
            if tag != UNKNOWN:
                file.seek(run.offset)
                file.write(expected_bytes(tag, run.offset, run.length))


def assert_is_the_guests_disk(guest: Guest, image: Path, fmt: str) -> None:
    """qemu-img finds nothing wrong with the image, and finds in it what the guest has written."""
    if fmt != "raw":
        qemu_img("check", str(image))
    expected = image.with_suffix(".expected")
    save_expected(guest, image, expected)
    qemu_img("compare", "-f", fmt, "-F", "raw", str(image), str(expected))


MODES = [
    # mode, format of the target, what is in it before, base for the stream
    ("no-backing-file", "qcow2", None, None),
    ("no-backing-file", "raw", None, None),
    ("absolute-paths", "qcow2", None, None),
    ("absolute-paths", "qcow2", None, "base.qcow2"),
    ("existing", "qcow2", "old content", None),
    ("existing", "qcow2", "backing base, small clusters", "base.qcow2"),
    ("existing", "qcow2", "backing base, large clusters", None),
    ("existing", "raw", "old content", None),
]


def make_existing(directory: Path, fmt: str, what: str | None) -> None:
    match what:
        case "old content":
            make_image(directory / "copy", SIZE, {0: b"old!" * (SIZE // 4)}, fmt=fmt)
        case "backing base, small clusters":
            make_image(directory / "copy", SIZE, {}, fmt=fmt, backing="base.qcow2", cluster_size=4096)
        case "backing base, large clusters":
            make_image(directory / "copy", SIZE, {}, fmt=fmt, backing="base.qcow2", cluster_size=MiB)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("mode", "fmt", "before", "base"), MODES)
def test_after_stream_and_reopen_the_target_is_the_guests_disk(
    mode: str, fmt: str, before: str | None, base: str | None, seed: int, tmp_path: Path
) -> None:
    """In every mode, while the guest works on; the source that was left is whole, and needs nothing below the base."""
    make_layers(tmp_path)
    make_existing(tmp_path, fmt, before)
    copy = tmp_path / "copy"
    with machine(seed) as local:
        guest = begin(local, tmp_path)
        qmp = local.qmp
        qmp.execute("drive-mirror", device="virtio0", target=str(copy), format=fmt, mode=mode)
        local.advance("20ms")
        qmp.execute("block-stream", device="virtio0", speed=8 * MiB, **({"base": base} if base else {}))
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        local.advance("20ms")
        qmp.execute("drive-reopen", {"device": "virtio0", "new-image-file": str(copy), "format": fmt})
        assert qmp.execute("query-block")[0]["inserted"]["drv"] == fmt
        local.advance("50ms")
        local.run(guest.stop())
        local.run(guest.verify(guest.disk.read_into))
        qmp.execute("quit")
    qemu_img("check", str(tmp_path / "top.qcow2"))
    assert guest.counters.writes > 50 and guest.counters.discards > 5 and guest.counters.failed == 0
    assert_is_the_guests_disk(guest, copy, fmt)


@pytest.mark.parametrize("seed", [4, 5])
def test_a_snapshot_with_a_mirror_of_its_top_needs_no_streaming(seed: int, tmp_path: Path) -> None:
    """In one transaction both begin empty over the same backing file, at the same moment: the copy is complete at once."""
    make_layers(tmp_path)
    with machine(seed) as local:
        guest = begin(local, tmp_path)
        snapshot = {"device": "virtio0", "snapshot-file": str(tmp_path / "new.qcow2")}
        mirror = {"device": "virtio0", "target": str(tmp_path / "copy"), "format": "qcow2"}
        local.qmp.execute(
            "transaction",
            actions=[
                {"type": "blockdev-snapshot-sync", "data": snapshot},
                {"type": "drive-mirror", "data": mirror},
            ],
        )
        local.advance("100ms")
        local.qmp.execute("drive-reopen", {"device": "virtio0", "new-image-file": str(tmp_path / "copy")})
        local.advance("50ms")
        local.run(guest.stop())
        local.qmp.execute("quit")
    assert guest.counters.failed == 0
    assert_is_the_guests_disk(guest, tmp_path / "copy", "qcow2")


@pytest.mark.parametrize("moment_ms", [1, 40, 80, 130, 200])
@pytest.mark.parametrize("mode", ["no-backing-file", "absolute-paths"])
def test_after_a_kill_the_source_is_complete_and_the_target_is_not_before_it_was_streamed(
    moment_ms: int, mode: str, tmp_path: Path
) -> None:
    """Whatever was under way, the source opens clean with everything that was flushed. That is where management has to go on
    when it does not know how far the streaming was."""
    make_layers(tmp_path)
    copy, crash = tmp_path / "copy", tmp_path / "crash"
    crash.mkdir()
    random = Random(moment_ms)
    with machine(moment_ms) as local:
        guest = begin(local, tmp_path)
        local.qmp.execute("drive-mirror", device="virtio0", target=str(copy), format="qcow2", mode=mode)
        local.qmp.execute("block-stream", device="virtio0", speed=40 * MiB)
        local.advance(moment_ms * 1_000_000 + random.randrange(1_000_000))
        local.run(guest.stop())
        local.run(guest.flush())
        jobs = local.qmp.execute("query-block-jobs")
        # What a killed process leaves is what the files hold now.
        for name in ("base.qcow2", "top.qcow2", "copy"):
            (crash / name).write_bytes((tmp_path / name).read_bytes())
    source = crash / "top.qcow2"
    qemu_img("check", str(source), allowed=(0, 3))  # leaks are allowed
    expected = crash / "source.expected"
    save_expected(guest, source, expected)
    qemu_img("compare", "-F", "raw", str(source), str(expected))
    if jobs:  # and nobody could tell from the image that it is not complete
        save_expected(guest, crash / "copy", expected)
        qemu_img("compare", "-F", "raw", str(crash / "copy"), str(expected), allowed=(1,))
