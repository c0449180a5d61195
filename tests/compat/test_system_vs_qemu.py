"""qblock-system and qemu-system-x86_64 side by side: the same command lines give the same drives, devices, replies and events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.system_help import answer
from qblock.tools.system_options import Given

from .qmp_pair import Pair, both, comparable, do, hmp, transcript, wait

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]

QMP = ("-display", "none", "-qmp", "unix:{socket},server=on,wait=off")
REAL = "qemu-system-x86_64"
OURS = (sys.executable, "-m", "qblock.tools.system")
IMAGES = (
    ("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "16M"),
    ("qemu-img", "create", "-q", "-f", "raw", "f.raw", "1440k"),
    ("qemu-img", "create", "-q", "-f", "raw", "c.iso", "4M"),
)
RAW = "format=raw,file=f.raw"
DISK = "if=none,id=x,file=a.qcow2"


def system(*options: str) -> Pair:
    """Both programs with these options, stopped before the first step of the guest."""
    line = ("-S", *options, *QMP)
    return Pair(real=(REAL, *line), ours=(*OURS, *line))


def null(name: str, **more: str) -> tuple[str, ...]:
    options = {"driver": "null-co", "node-name": name, "size": "1474560", **more}
    return ("-blockdev", ",".join(f"{key}={value}" for key, value in options.items()))


# --------------------------------------------------------------------------------------------------------- command lines

DRIVES = (
    "-hda a.qcow2",
    "-smp 2 -vga none -net none -serial none -parallel none -cdrom c.iso -fdb f.raw",
    "-machine q35 -hda a.qcow2 -device VGA",
    "-machine none -hda a.qcow2",
    f"-nodefaults -drive file=a.qcow2,if=ide,bus=1,unit=1 -drive {RAW},if=virtio,index=3 -drive if=none,id=e c.iso",
    f"-nodefaults -netdev user,id=n -device virtio-net-pci,netdev=n -drive if=virtio,{RAW},cache=writethrough",
    f"-nodefaults -usb -drive {DISK} -device usb-storage,drive=x,removable=on,id=u -drive if=pflash,{RAW}",
    f"-nodefaults -device ahci,id=sata -device ide-cd,bus=sata.3 -drive {DISK} -device nvme,drive=x,serial=1,id=n",
    f"-nodefaults -drive {DISK} -set drive.x.werror=stop -device virtio-blk,drive=x,id=v,write-cache=off",
    "-nodefaults -machine pc,pflash0=f -blockdev driver=raw,file.driver=file,file.filename=f.raw,node-name=f",
    "-nodefaults -drive file=a.qcow2,if=ide,unit=-1,cache=off,snapshot,read-only=on",
    f"-nodefaults -smp 0 -boot menu=yes,once=d -rtc base=2020-1-1 -drive {DISK},detect-zeroes=unmap,bps=0x400",
    f"-nodefaults -drive {DISK} -device ide-hd,drive=x,wwn=-1 -device ide-cd,drive=",
    # refused
    f"-nodefaults -drive {DISK},bps=1k",
    f"-nodefaults -drive {DISK} -device virtio-blk,drive=x,queue-size=3",
    f"-nodefaults -drive {DISK} -device nvme,drive=x,serial=1,max_ioqpairs=0",
    f"-nodefaults -drive {DISK} -device floppy,drive=x,physical_block_size=4096",
    f"-nodefaults -drive {DISK} -device ide-hd,drive=x,discard_granularity=4096",
    "-nodefaults -drive file=a.qcow2,if=none,id=",
    "-nodefaults -hdc c.iso -cdrom c.iso",
    "-nodefaults -drive file=a.qcow2,if=ide,readonly=on",
    "-nodefaults -drive file=a.qcow2,if=floppy,werror=stop",
    f"-nodefaults -drive {DISK} -device virtio-blk,drive=x -device virtio-blk,drive=x",
    "-nodefaults -device ide-cd -device ide-cd -device ide-cd",
    "-nodefaults -nosuch",
)


@pytest.mark.parametrize("line", DRIVES)
def test_a_command_line_gives_the_same_drives_or_is_refused_by_both(line: str, tmp_path: Path) -> None:
    """Names, qdev paths, trays and I/O status of query-block; the number in a path counts what the board has made."""
    shown = []
    for command in ((REAL,), OURS):
        place = tmp_path / ("real" if command == (REAL,) else "ours")
        place.mkdir()
        for image in IMAGES:
            subprocess.run(image, cwd=place, check=True)
        shown.append(drives(place, (*command, "-S", *line.split(), *QMP)))
    assert shown[0] == shown[1]


def drives(place: Path, argv: Sequence[str]) -> Any:
    """What query-block shows of the drives, without their images; None when the program refuses to start."""
    script = [do("query-block")]
    with contextlib.suppress(AssertionError, OSError, TypeError):
        (step,) = comparable(transcript(argv, place, script), place)
        entries = step["reply"]["return"]
        for entry in entries:
            if "inserted" in entry:
                entry["inserted"] = {key: entry["inserted"][key] for key in ("file", "ro", "drv", "cache")}
        return entries
    return None


# ---------------------------------------------------------------------------------------------------------------- scripts

CD = ("-nodefaults", "-device", "virtio-scsi-pci,id=scsi0")


def run_both(tmp_path: Path, options: Sequence[str], script: Sequence[Any]) -> None:
    real, ours = both(system(*options), tmp_path, script, IMAGES)
    for one, other in zip(real, ours, strict=True):
        assert one == other


def test_trays_and_media_move_as_in_the_real_program(tmp_path: Path) -> None:
    """Every command, in an order in which each is refused at least once."""
    options = (
        *CD, *null("n0", **{"read-only": "on"}), *null("n1"), *null("n2"), *null("f0"),
        "-device", "ide-cd,id=cd,drive=n0", "-device", "scsi-cd,id=scd", "-device", "floppy,id=fl,drive=f0",
        "-device", "ide-hd,id=hd,drive=n1,bus=ide.0", "-drive", "if=none,id=lone,file=c.iso,format=raw,media=cdrom",
    )  # fmt: skip
    script = [
        do("blockdev-open-tray", id="cd"), do("blockdev-open-tray", id="cd"), do("query-block"),
        do("blockdev-remove-medium", id="cd"), do("blockdev-remove-medium", id="cd"),
        do("blockdev-insert-medium", id="cd", node_name="nope"), do("blockdev-insert-medium", id="cd", node_name="n1"),
        do("blockdev-insert-medium", id="cd", node_name="n2"), do("blockdev-insert-medium", id="cd", node_name="n2"),
        do("blockdev-close-tray", id="cd"), do("blockdev-close-tray", id="cd"),
        do("blockdev-insert-medium", id="cd", node_name="n0"), do("blockdev-remove-medium", id="cd"),
        do("blockdev-open-tray", id="fl"), do("blockdev-insert-medium", id="fl", node_name="n0"),
        do("blockdev-remove-medium", id="fl"), do("blockdev-insert-medium", id="fl", node_name="n0"),
        do("blockdev-open-tray", id="hd"), do("blockdev-close-tray", id="hd"), do("blockdev-remove-medium", id="hd"),
        do("blockdev-open-tray", id="nope"), do("blockdev-open-tray", device="nope"),
        do("blockdev-open-tray", device="lone"), do("blockdev-open-tray"), do("blockdev-open-tray", id="cd", device="lone"),
        do("eject", id="cd"), do("eject", id="cd"), do("eject", device="lone"), do("eject", id="fl"), do("eject", id="hd"),
        do("blockdev-change-medium", id="cd", filename="/nosuch"),
        do("blockdev-change-medium", id="cd", filename="c.iso", format="raw"), do("query-block"),
        do("blockdev-change-medium", id="cd", filename="a.qcow2", format="nosuch"),
        do("blockdev-change-medium", id="fl", filename="f.raw", format="raw"),
        do("blockdev-change-medium", id="hd", filename="f.raw", format="raw"),
        do("blockdev-change-medium", device="lone", filename="c.iso", format="raw", read_only_mode="read-only"),
        hmp("eject lone"), hmp("change lone c.iso raw read-only"), hmp("info block"),
        do("blockdev-open-tray", id="scd"), do("system_reset"), do("query-block"),
    ]  # fmt: skip
    run_both(tmp_path, options, script)


def test_devices_come_and_go_as_in_the_real_program(tmp_path: Path) -> None:
    """SCSI devices at once, PCI devices with the reset, which takes what is plugged into them along."""
    options = (*CD, *null("n0"), *null("n1"), *null("n2"), "-drive", "if=none,id=d0,file=a.qcow2")
    gone = {"event": "DEVICE_DELETED"}
    script = [
        do("device_add", driver="virtio-blk-pci", id="v0", drive="n0"),
        do("device_add", driver="scsi-hd", id="s0", drive="n1", bus="scsi0.0"),
        do("device_add", driver="scsi-hd", id="s0", drive="n1", bus="scsi0.0"),
        do("device_add", driver="scsi-hd", id="s1", drive="n1", bus="scsi0.0"),
        do("device_add", driver="scsi-hd", id="s1", drive="nope", bus="scsi0.0"),
        do("device_add", driver="nosuch", id="s1"), do("device_add", id="x"),
        do("device_add", driver="scsi-hd", id="s1", drive="n2", foo=1),
        do("device_add", driver="scsi-hd", id="s1", drive="n2", lun="x"),
        do("device_add", driver="scsi-hd", id="s1", drive="n2", lun=1, serial="abc"),
        do("device_add", driver="ide-cd", id="i0"), do("device_add", driver="floppy", id="i0"),
        do("device_add", driver="scsi-cd", id="scd"), do("device_add", driver="scsi-hd", id="sd0", drive="d0"),
        do("query-block"), do("blockdev-del", node_name="n1"), do("x-debug-query-block-graph"),
        do("device_del", id="s0"), {"wait": gone}, do("device_del", id="v0"), do("device_del", id="v0"),
        do("device_del", id="nope"), do("device_del", id="sd0"), {"wait": gone}, hmp("info block"),
        do("device_del", id="/machine/peripheral/scd"), {"wait": gone}, do("device_del", id="scsi0"),
        do("blockdev-del", node_name="n1"), do("system_reset"), {"wait": gone | {"data": {"device": "v0"}}},
        do("query-block"), do("query-named-block-nodes"),
    ]  # fmt: skip
    run_both(tmp_path, options, script)


def unix(path: str, **members: Any) -> dict[str, Any]:
    """A socket file as a character device."""
    return {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, **members}}


def test_character_devices_come_and_go_as_in_the_real_program(tmp_path: Path) -> None:
    """One that a monitor uses stays; a change keeps the id; what cannot be made changes nothing."""
    null, nowhere = {"type": "null", "data": {}}, {"type": "file", "data": {"out": "/nosuch/x"}}

    def plug(name: str, backend: dict[str, Any]) -> dict[str, Any]:
        return do("chardev-add", id=name, backend=backend)

    inet = {"type": "inet", "data": {"host": "127.0.0.1", "port": "x"}}
    script = [
        plug("n", null), plug("n", null), plug("x", {"type": "nosuch", "data": {}}), plug("x", {"type": "null"}),
        plug("x", {"type": "null", "data": {"x": 1}}), plug("f", nowhere), plug("f", {"type": "file", "data": {"out": "of"}}),
        plug("s", unix("s", server=True, wait=False)), plug("s2", unix("s2")), plug("c", unix("s", server=False)),
        plug("x", unix("nosuch", server=False)), plug("x", unix("x", server=False, wait=True)),
        plug("x", unix("x", server=True, wait=False, reconnect=5)),
        plug("x", {"type": "socket", "data": {"addr": inet, "wait": False}}),
        do("chardev-remove", id="n"), do("chardev-remove", id="n"), do("chardev-remove", id="compat_monitor0"),
        do("chardev-change", id="f", backend=null), do("chardev-change", id="nosuch", backend=null),
        do("chardev-change", id="compat_monitor0", backend=null), hmp("chardev-add null,id=h"), hmp("chardev-remove h"),
        hmp("chardev-add socket,id=h,path=h,server,nowait"), hmp("chardev-change h null"), do("chardev-remove", id="f"),
    ]  # fmt: skip
    shown = both(system("-nodefaults", "-machine", "none"), tmp_path, [*script, do("query-chardev")], IMAGES)
    for program in shown:
        for step in program:
            reply = step["reply"].get("return")
            if isinstance(reply, str):  # QEMU warns of words that stand alone
                lines = [line for line in reply.splitlines() if "=o" not in line and "short" not in line]
                step["reply"]["return"] = "\n".join(lines)
        program[-1]["reply"]["return"].sort(key=lambda entry: entry["label"])
    for one, other in zip(*shown, strict=True):
        assert one == other


def test_the_run_state_changes_as_in_the_real_program(tmp_path: Path) -> None:
    """Which events there are, and where a reset leads."""
    steps = ["query-status", "stop", "system_reset", "query-status", "system_powerdown", "query-status"]
    run_both(tmp_path, ("-nodefaults", "-machine", "none"), [
        *map(do, steps), do("cont"), do("query-status"), do("cont"), do("stop"), do("stop"), do("query-status"),
        do("system_reset"), do("query-status"), hmp("info status"), do("query-name"), do("quit"),
    ])  # fmt: skip


@pytest.mark.parametrize("action", [("-no-reboot", "-no-shutdown"), ("-action", "reboot=shutdown,shutdown=pause")])
def test_a_reset_can_stop_the_machine_instead(action: tuple[str, ...], tmp_path: Path) -> None:
    """And it must be reset before it goes on, which it is not in this way."""
    run_both(tmp_path, ("-nodefaults", "-machine", "none", *action), [
        do("system_reset"), do("query-status"), do("cont"), do("system_reset"), {"wait": {"event": "STOP"}},
        do("query-status"), do("cont"), do("set-action", reboot="reset"), do("system_reset"), do("query-status"), do("cont"),
    ])  # fmt: skip


def test_statistics_and_histograms_are_shown_as_in_the_real_program(tmp_path: Path) -> None:
    """Of devices that nobody has used; qemu-io on a device counts nowhere."""
    options = ("-nodefaults", "-drive", "if=virtio,file=a.qcow2,id=d", "-drive", "if=none,id=e,file=f.raw,format=raw",
               "-device", "ide-hd,id=ih,drive=e,account-failed=off")  # fmt: skip
    histogram = "block-latency-histogram-set"
    script = [
        do(histogram, id="ih", boundaries_read=[5, 6], boundaries_flush=[7]), do(histogram, id="d", boundaries=[5]),
        do(histogram, id="ih", boundaries_write=[7, 6]), do(histogram, id="ih", boundaries=[0, 5]),
        do("query-blockstats"), do(histogram, id="ih", boundaries_read=[]), do("query-blockstats"),
        do(histogram, id="/machine/peripheral-anon/device[0]/virtio-backend", boundaries=[5, 10]), do(histogram, id="ih"),
        hmp('qemu-io -d ih "read 0 512"'), do("query-blockstats"),
    ]  # fmt: skip
    run_both(tmp_path, options, script)


@pytest.mark.parametrize("mode", ["cache=none,aio=native", "cache=unsafe", "aio=io_uring"])
def test_an_overlay_and_a_copy_are_opened_as_the_drive_was(mode: str, tmp_path: Path) -> None:
    """Management gives a cache mode once, for the drive: a snapshot must not take the page cache back into use."""
    options = ("-nodefaults", "-machine", "none", "-drive", f"if=none,file=a.qcow2,id=d,discard=unmap,{mode}")
    wanted: list[Any] = [
        do("blockdev-snapshot-sync", device="d", snapshot_file="o.qcow2", format="qcow2"),
        do("drive-mirror", device="d", target="m.qcow2", format="qcow2", sync="full", job_id="m"),
        wait("BLOCK_JOB_READY"), do("query-named-block-nodes"), do("query-block"), do("block-job-cancel", device="m", force=True),
        wait("BLOCK_JOB_CANCELLED"), do("blockdev-snapshot-sync", device="d", snapshot_file="p.qcow2", format="qcow2"),
        do("query-named-block-nodes"),
    ]  # fmt: skip
    run_both(tmp_path, options, wanted)


def test_an_error_stops_the_machine_that_the_guest_runs_on(tmp_path: Path) -> None:
    """The real guest is the BIOS, which reads the first sector; ours is told to. Then `cont` tries again."""
    rules = {"event": "none", "iotype": "read", "errno": "5", "sector": "0"}
    failing = "driver=blkdebug,node-name=n0,image=f," + ",".join(f"inject-error.0.{k}={v}" for k, v in rules.items())
    options = ("-nodefaults", "-blockdev", "driver=raw,node-name=f,file.driver=file,file.filename=c.iso",
               "-blockdev", failing, "-device", "ide-hd,drive=n0,id=v0,rerror=stop")  # fmt: skip
    stopped = {"wait": {"event": "STOP"}}
    then = [do("query-status"), hmp("info status"), do("cont"), stopped, do("system_reset"), do("query-status")]
    pair = system(*options)
    shown = []
    for name, argv in (("real", pair.real), ("ours", pair.ours)):
        place = tmp_path / name
        place.mkdir()
        for image in IMAGES:
            subprocess.run(image, cwd=place, check=True)
        begin = [do("cont"), *([hmp("guest read v0 0 512")] if name == "ours" else []), stopped]
        shown.append(comparable(transcript(argv, place, [*begin, *then]), place)[len(begin) :])
    assert shown[0] == shown[1]


# -------------------------------------------------------------------------------------------------------------- questions


def asked(*argv: str) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_help_has_the_layout_of_the_real_program() -> None:
    """What we offer is shown as it is there; explanations are our own."""
    real = set(asked(REAL, "-device", "help"))
    assert not [line for line in asked(*OURS, "-device", "help") if line not in real]
    machines = {line.split()[0] for line in asked(REAL, "-machine", "help")}
    assert {line.split()[0] for line in asked(*OURS, "-machine", "help")} <= machines
    assert re.match(r"QEMU emulator version 7\.2\.\d+ \(", asked(*OURS, "-version")[0])


@pytest.mark.parametrize("model", ["virtio-blk-pci", "scsi-cd", "ide-hd", "floppy", "nvme", "usb-storage", "megasas"])
def test_a_device_has_the_properties_of_the_real_one(model: str) -> None:
    """Names, types and defaults."""

    def facts(lines: list[str]) -> list[tuple[str, ...]]:
        line = re.compile(r"  (\S+?)=<(.+?>?)>(?=\s|$)(?:.*\(default: (.*)\))?")
        return [found.groups() for found in map(line.match, lines) if found is not None]

    ours = answer(Given("device", f"{model},help")) or ""
    assert facts(ours.splitlines()) == facts(asked(REAL, "-device", f"{model},help"))


def test_a_client_that_knows_only_qemu_launches_both_by_one_line(tmp_path: Path) -> None:
    """As libvirt does: a socket that listens already, everything in JSON, and QEMU's own client library."""
    qemu_qmp = pytest.importorskip("qemu.qmp", reason="QEMU's QMP library is not installed")
    disk = {"driver": "virtio-blk-pci", "bus": "rp", "drive": "n", "id": "v", "serial": "x"}
    memory = {"qom-type": "memory-backend-ram", "id": "ram", "size": 1 << 26}
    line = (
        "-S", "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-machine", "q35,accel=tcg", "-cpu", "max",
        "-m", "64", "-device", "pcie-root-port,id=rp", "-object", json.dumps(memory),
        "-blockdev", json.dumps({"driver": "null-co", "node-name": "n", "size": 1 << 20}), "-device", json.dumps(disk),
    )  # fmt: skip

    async def talk(path: Path) -> Any:
        client = qemu_qmp.QMPClient("test")
        await client.connect(str(path))
        answers = [await client.execute(name) for name in ("query-status", "query-block")]
        await client.execute("device_del", {"id": "v"})
        await client.execute("quit")
        with contextlib.suppress(EOFError):  # the program may have hung up first
            await client.disconnect()
        return answers[0], [(entry["qdev"], entry["inserted"]["node-name"]) for entry in answers[1]]

    def launched(command: Sequence[str], path: Path) -> Any:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            fd = listener.fileno()
            monitor = ("-chardev", f"socket,id=m,fd={fd},server=on,wait=off", "-mon", "chardev=m,id=monitor,mode=control")
            with subprocess.Popen([*command, *line, *monitor], pass_fds=(fd,)) as process:
                try:
                    return asyncio.run(talk(path)), process.wait(30)
                finally:
                    process.kill()

    assert launched((REAL,), tmp_path / "real") == launched(OURS, tmp_path / "ours")
