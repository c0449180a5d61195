"""libvirt and its emulators: what it says is answered alike by the real program and by ours; and libvirt itself runs ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from libvirt_words import PROBE, PROBE_OPTIONS, domain_commands, domain_options, make_images
from qmp_pair import Pair, both, transcript

PROBED: Final = ("-display", "none", *PROBE_OPTIONS, "-qmp", "unix:{socket},server=on,wait=off")
EMULATORS: Final = Pair(
    real=("qemu-system-x86_64", *PROBED), ours=(sys.executable, "-m", "qblock.tools.system", *PROBED)
)


def _shapes(value: Any) -> set[str]:
    """The paths of all members in a reply, with the kinds of their values."""
    if isinstance(value, dict):
        return {f".{key}{rest}" for key, member in value.items() for rest in _shapes(member)}
    if isinstance(value, list):
        return {f"[]{rest}" for member in value for rest in _shapes(member)} or {"[]"}
    return {f":{type(value).__name__}"}


def test_questions_about_an_emulator_are_answered_in_the_layout_of_the_real_one(tmp_path: Path) -> None:
    """Members of ours are members of the real one's replies, of the same types; what it has not, ours has not."""
    real, ours = both(EMULATORS, tmp_path, [step for step in PROBE if step["execute"] != "query-qmp-schema"])
    for theirs, mine in zip(real, ours, strict=True):
        command, reply = theirs["step"], mine["reply"]
        if "error" in reply and command["execute"] == "device-list-properties":
            continue  # ours has fewer models, and says so
        assert "error" not in reply, command
        extra = {shape for shape in _shapes(reply["return"]) - _shapes(theirs["reply"]["return"]) if "default-value" not in shape}
        empty = {shape for shape in extra if shape.endswith("[]")}
        assert extra == empty, command


def test_the_life_of_a_domain_is_the_same(tmp_path: Path) -> None:
    """The same commands succeed, and the same images come out of it."""
    outcomes = {}
    for name, program in (("real", ["qemu-system-x86_64"]), ("ours", [sys.executable, "-m", "qblock.tools.system"])):
        place = tmp_path / name
        place.mkdir()
        make_images(place, ["qemu-img"])
        options = [word.replace("{", "{{").replace("}", "}}") for word in domain_options(place, place / "qmp.sock")]
        steps = transcript([*program, *options], place, domain_commands(place))
        outcomes[name] = [(step["step"]["execute"], "error" in step["reply"]) for step in steps if "reply" in step]
    differing = [pair for pair in zip(*outcomes.values(), strict=True) if pair[0] != pair[1]]
    assert differing == [(("qom-list", False), ("qom-list", True))]  # the processor
    for image in ("copy.qcow2", "sda.s2", "full.qcow2", "inc.qcow2"):
        described = [_described(tmp_path / name / image) for name in outcomes]
        assert described[0] == described[1]
        # The bitmap of the checkpoint is gone, and nothing else was left.
        assert "bitmaps" not in described[1]["format-specific"]["data"]


def _described(image: Path) -> Any:
    """What `qemu-img info` tells of an image, but for the space that it takes."""
    done = subprocess.run(["qemu-img", "info", "--output=json", image], capture_output=True, check=True)
    info = json.loads(done.stdout.replace(str(image.parent).encode(), b"DIR"))
    del info["actual-size"]
    return info


# ------------------------------------------------------------------------------------------------------------ libvirt itself

SETTINGS: Final = """
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
seccomp_sandbox = 0
stdio_handler = "file"
"""
DOMAIN: Final = """
<domain type='qemu'>
  <name>machine</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>{dir}/emulator</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{dir}/vda.qcow2'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/><source file='{dir}/cd2.iso'/><target dev='hdc' bus='ide'/><readonly/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>
"""
BACKUP: Final = """
<domainbackup mode='push'>
  {increment}
  <disks>
    <disk name='vda' type='file'><target file='{dir}/{name}'/><driver type='qcow2'/></disk>
    <disk name='hdc' backup='no'/>
  </disks>
</domainbackup>
"""
CHECKPOINT: Final = """
<domaincheckpoint>
  <name>{name}</name>
  <disks><disk name='vda' checkpoint='bitmap'/><disk name='hdc' checkpoint='no'/></disks>
</domaincheckpoint>
"""
BEGINNING: Final = (
    "define {dir}/machine.xml",
    "start machine --paused",
    "domblklist machine",
)
SNAPSHOTS: Final = (
    "snapshot-create-as machine s1 --disk-only --no-metadata --diskspec vda,file={dir}/one --diskspec hdc,snapshot=no",
    "snapshot-create-as machine s2 --disk-only --no-metadata --diskspec vda,file={dir}/two --diskspec hdc,snapshot=no",
    "snapshot-create-as machine s3 --disk-only --no-metadata --diskspec vda,file={dir}/three --diskspec hdc,snapshot=no",
    "snapshot-create-as machine whole",
    "snapshot-create-as machine later",
    "snapshot-revert machine whole",
    "snapshot-delete machine later",
    "snapshot-delete machine whole",
)
JOBS: Final = (
    "blockcommit machine vda --top {dir}/two --base {dir}/one --wait",
    "blockcommit machine vda --active --base {dir}/one --pivot --wait",
    "blockpull machine vda --wait",
    "blockcopy machine vda --dest {dir}/copied --format qcow2 --pivot --wait --transient-job",
    "blockcopy machine vda --dest {dir}/given-up --format qcow2 --wait --transient-job",
    "blockjob machine vda --info",
    "blockjob machine vda --abort",
)
DISKS: Final = (
    "attach-disk machine {dir}/add.qcow2 vdb --subdriver qcow2 --serial ADDED",
    "blockresize machine vdb 32M",
    "attach-disk machine {dir}/sdb.qcow2 sda --subdriver qcow2 --targetbus scsi",
    "detach-disk machine sda",
    "change-media machine hdc --eject",
    "change-media machine hdc {dir}/cd2.iso --insert",
    "blkdeviotune machine vda --total-iops-sec 1000 --write-bytes-sec 100000000",
    "blkdeviotune machine vda",
    "domblkthreshold machine vda 1048576",
    "domblkerror machine",
    "domblkinfo machine vda",
    "domblkstat machine vda",
    "domstats machine --block",
    "resume machine",
    "suspend machine",
    "domblklist machine",
)


def _lacks() -> str | None:
    """Why libvirt cannot be tried here, if so."""
    if shutil.which("virsh") is None:
        return "libvirt is not installed (Debian: libvirt-clients, libvirt-daemon-driver-qemu)"
    folders: Iterable[Path] = Path("/usr/lib").glob("*/libvirt/connection-driver")
    if not any((folder / "libvirt_driver_qemu.so").exists() for folder in folders):
        return "libvirt's driver for QEMU is not installed (Debian: libvirt-daemon-driver-qemu)"
    for kind in ("passwd", "group"):
        if subprocess.run(["getent", kind, "libvirt-qemu"], capture_output=True, check=False).returncode:
            return f"there is no {kind} entry libvirt-qemu, which libvirt looks for (Debian: libvirt-daemon-system makes it)"
    return None


@pytest.mark.skipif(_lacks() is not None, reason=_lacks() or "")
@pytest.mark.timeout(600)
def test_libvirt_runs_a_domain_whose_emulator_is_ours() -> None:
    """The real libvirt, its driver inside virsh with a folder of its own: no daemon, nothing of the host's is touched."""
    with tempfile.TemporaryDirectory(prefix="libvirt-") as folder:  # libvirt's sockets lie far below it: its name is short
        _run_domain(Path(folder))


END: Final = "that was all"


class Virsh:
    """A shell of libvirt's that is told one line after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        argv = ["virsh", "-q", "-c", f"qemu:///embed?root={folder}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, bufsize=0)

    def __call__(self, line: str) -> str:
        """What it answers, which must be no error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = line.replace("{dir}", str(self.folder))
        spaced = END.replace(" ", "  ")  # it repeats what it is told, but says it with single spaces
        self.process.stdin.write(f"{line}\necho {spaced}\n".encode())
        answer = ""
        while END not in answer:
            said = self.process.stdout.read(4096)
            assert said, (line, answer)
            answer += said.decode()
        assert "error:" not in answer, (line, answer)
        return answer.partition(line)[2].partition("virsh #")[0]

    def close(self) -> None:
        """End it, and its domains with it."""
        self.process.communicate(b"quit\n", timeout=60)


def _run_domain(folder: Path) -> None:
    make_images(folder, ["qemu-img"])
    (folder / "etc").mkdir()
    (folder / "etc" / "qemu.conf").write_text(SETTINGS)
    emulator = folder / "emulator"
    emulator.write_text(f'#!/bin/sh\nexec {sys.executable} -m qblock.tools.system "$@"\n')
    emulator.chmod(0o755)
    (folder / "machine.xml").write_text(DOMAIN.replace("{dir}", str(folder)))
    virsh = Virsh(folder)
    try:
        for line in (*BEGINNING, *SNAPSHOTS, *JOBS):
            virsh(line)
        _back_up(virsh, "everything", "first", "")
        _back_up(virsh, "changes", "second", "<incremental>first</incremental>")
        assert virsh("checkpoint-list machine --name").split() == ["first", "second"]
        for name in ("first", "second"):
            virsh(f"checkpoint-delete machine {name}")
        answers = [virsh(line) for line in DISKS]
        virsh("destroy machine")
    finally:
        virsh.close()
    assert f"{folder}/copied" in answers[-1] and f"{folder}/add.qcow2" in answers[-1] and "sda" not in answers[-1]
    assert "total_iops_sec : 1000" in answers[DISKS.index("blkdeviotune machine vda")]
    assert "block.0.threshold=1048576" in answers[DISKS.index("domstats machine --block")]
    assert _described(folder / "add.qcow2")["virtual-size"] == 32 << 20


def _back_up(virsh: Virsh, name: str, checkpoint: str, increment: str) -> None:
    """A backup with a checkpoint, to its end."""
    words = {"{dir}": str(virsh.folder), "{name}": name, "{increment}": increment}
    backup = BACKUP
    for word, value in words.items():
        backup = backup.replace(word, value)
    (virsh.folder / "backup.xml").write_text(backup)
    (virsh.folder / "checkpoint.xml").write_text(CHECKPOINT.replace("{name}", checkpoint))
    virsh("backup-begin machine {dir}/backup.xml {dir}/checkpoint.xml")
    while "None" not in virsh("domjobinfo machine"):
        pass
    assert "Completed" in virsh("domjobinfo machine --completed")
    assert _described(virsh.folder / name)["format"] == "qcow2"
