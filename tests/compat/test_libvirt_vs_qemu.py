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
LIFE: Final = (
    "define {dir}/machine.xml",
    "start machine --paused",
    "domblklist machine",
    "snapshot-create-as machine s1 --disk-only --no-metadata --diskspec vda,file={dir}/one --diskspec hdc,snapshot=no",
    "snapshot-create-as machine s2 --disk-only --no-metadata --diskspec vda,file={dir}/two --diskspec hdc,snapshot=no",
    "snapshot-create-as machine whole",
    "snapshot-create-as machine later",
    "snapshot-revert machine whole",
    "snapshot-delete machine later",
    "snapshot-delete machine whole",
    "blockcommit machine vda --active --base {dir}/one --pivot --wait",
    "blockpull machine vda --wait",
    "blockcopy machine vda --dest {dir}/copied --format qcow2 --pivot --wait --transient-job",
    "attach-disk machine {dir}/add.qcow2 vdb --subdriver qcow2 --serial ADDED",
    "blockresize machine vdb 32M",
    "change-media machine hdc --eject",
    "domblkinfo machine vda",
    "resume machine",
    "suspend machine",
    "domblklist machine",
    "destroy machine",
)


def _lacks() -> str | None:
    """Why libvirt cannot be tried here, if so."""
    if shutil.which("virsh") is None:
        return "libvirt is not installed (Debian: libvirt-clients, libvirt-daemon-driver-qemu)"
    folders: Iterable[Path] = Path("/usr/lib").glob("*/libvirt/connection-driver")
    if not any((folder / "libvirt_driver_qemu.so").exists() for folder in folders):
        return "libvirt's driver for QEMU is not installed (Debian: libvirt-daemon-driver-qemu)"
    if subprocess.run(["id", "libvirt-qemu"], capture_output=True, check=False).returncode:
        return "there is no user libvirt-qemu, which libvirt looks for (Debian: libvirt-daemon-system makes it)"
    return None


@pytest.mark.skipif(_lacks() is not None, reason=_lacks() or "")
@pytest.mark.timeout(600)
def test_libvirt_runs_a_domain_whose_emulator_is_ours() -> None:
    """The real libvirt, its driver inside virsh with a folder of its own: no daemon, nothing of the host's is touched."""
    with tempfile.TemporaryDirectory(prefix="libvirt-") as folder:  # libvirt's sockets lie far below it: its name is short
        _run_domain(Path(folder))


def _run_domain(tmp_path: Path) -> None:
    make_images(tmp_path, ["qemu-img"])
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "qemu.conf").write_text(SETTINGS)
    emulator = tmp_path / "emulator"
    emulator.write_text(f'#!/bin/sh\nexec {sys.executable} -m qblock.tools.system "$@"\n')
    emulator.chmod(0o755)
    (tmp_path / "machine.xml").write_text(DOMAIN.replace("{dir}", str(tmp_path)))
    lines = "".join(f"{line}\n" for line in LIFE).replace("{dir}", str(tmp_path))
    virsh = ["virsh", "-c", f"qemu:///embed?root={tmp_path}"]
    done = subprocess.run(virsh, input=lines, capture_output=True, text=True, timeout=600, check=False)
    assert "error:" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert f"vda      {tmp_path}/copied" in done.stdout
    assert f"vdb      {tmp_path}/add.qcow2" in done.stdout
    assert _described(tmp_path / "add.qcow2")["virtual-size"] == 32 << 20
