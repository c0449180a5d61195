"""Internal snapshots beside the real programs: the same random commands on both, images swapped in the middle."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.tools import img
from qblock.tools import io as io_tool

pytestmark = pytest.mark.qemu

Tool = Callable[..., tuple[int, str]]


def real(*args: str | Path) -> tuple[int, str]:
    """Exit code and output of the real qemu-img."""
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def ours(*args: str | Path) -> tuple[int, str]:
    """Exit code and output of qblock-img."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = img.main([str(arg) for arg in args])
    return code, out.getvalue()


def real_io(image: Path, command: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(image)], check=True, stdout=subprocess.DEVNULL)


def our_io(image: Path, command: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert io_tool.main(["-f", "qcow2", "-c", command, str(image)]) == 0


class Pair:
    """Two images that must stay alike: one that qblock works on, one for the real programs; `swap` exchanges them."""

    def __init__(self, folder: Path, random: Random, options: str, cluster: int) -> None:
        self.folder, self.random, self.cluster = folder, random, cluster
        self.narrow = "refcount_bits=1" in options or "refcount_bits=2" in options
        self.mine, self.theirs = folder / "mine.qcow2", folder / "theirs.qcow2"
        for tool, image in ((ours, self.mine), (real, self.theirs)):
            assert tool("create", "-q", "-f", "qcow2", "-o", options, image, str(40 * cluster))[0] == 0

    def both(self, *args: str) -> None:
        """One qemu-img command on both images; the same exit code is asked for."""
        codes = []
        for tool, image in ((ours, self.mine), (real, self.theirs)):
            words: list[str | Path] = [*args, image]
            if args[0] == "resize":
                words[-2:] = [image, args[-1]]
            codes.append(tool(*words)[0])
        if codes == [0, 1] and args[0] == "snapshot" and self.narrow:
            # The real one counts new users before the old ones are gone, and keeps more clusters: its counts overflow earlier.
            real("check", "-q", "-r", "leaks", self.theirs)
            shutil.copy(self.theirs, self.mine)
        else:
            assert codes[0] == codes[1], args

    def snapshots(self, tool: Tool, image: Path) -> list[dict[str, Any]]:
        found = json.loads(tool("info", "--output=json", image)[1]).get("snapshots", [])
        return [{key: value for key, value in one.items() if not key.startswith("date")} for one in found]

    def step(self) -> None:
        known = self.snapshots(real, self.theirs)
        pick = self.random.random()
        if pick < 0.5:
            self.write()
        elif pick < 0.7:
            self.both("snapshot", "-c", f"s{self.random.randrange(5)}")
        elif pick < 0.8 and known:
            self.both("snapshot", "-a", self.random.choice(known)[self.random.choice(["id", "name"])])
        elif pick < 0.9 and known:
            self.both("snapshot", "-d", self.random.choice(known)[self.random.choice(["id", "name", "name"])])
        elif pick >= 0.9:
            self.both("resize", "-q", "--shrink", str(self.random.randrange(1, 80) * self.cluster))

    def write(self) -> None:
        size = json.loads(real("info", "--output=json", self.theirs)[1])["virtual-size"]
        a, b = sorted(self.random.randrange(size // 512) * 512 for _ in range(2))
        kind = self.random.choice([f"write -P {self.random.randrange(1, 256)}", "write -z", "write -z -u", "discard"])
        if kind == "discard":
            a, b = a // self.cluster * self.cluster, b // self.cluster * self.cluster
        command = f"{kind} {a} {b - a}"
        if a < b:
            our_io(self.mine, command)
            real_io(self.theirs, command)

    def check(self) -> None:
        """What qblock wrote is clean; both show the same, in the disk and in every snapshot."""
        code, out = real("check", self.mine)
        assert code == 0, out
        # The real one leaves leaks where a snapshot could not be made.
        real("check", "-q", "-r", "leaks", self.theirs)
        assert real("check", self.theirs)[0] == 0
        assert ours("check", self.theirs)[0] == 0
        assert real("compare", self.mine, self.theirs)[0] == 0
        known = self.snapshots(real, self.theirs)
        assert known == self.snapshots(ours, self.mine) == self.snapshots(real, self.mine) == self.snapshots(ours, self.theirs)
        for snapshot in known:
            self.compare_snapshot(f"snapshot.id={snapshot['id']}")

    def compare_snapshot(self, which: str) -> None:
        """Each of the programs reads it from each of the images."""
        contents = []
        for tool, image in ((real, self.theirs), (real, self.mine), (ours, self.mine), (ours, self.theirs)):
            raw = self.folder / "content.raw"
            assert tool("convert", "-O", "raw", "-l", which, image, raw)[0] == 0
            contents.append(raw.read_bytes())
            raw.unlink()
        assert contents[0] == contents[1] == contents[2] == contents[3], which

    def swap(self) -> None:
        self.mine, self.theirs = self.theirs, self.mine


OPTIONS = [
    "compat=1.1",
    "compat=1.1,refcount_bits=1",
    "compat=1.1,refcount_bits=2",
    "compat=1.1,refcount_bits=64",
    "compat=0.10",
    "extended_l2=on",
]


@pytest.mark.parametrize("seed", range(12))
def test_the_same_commands_leave_the_same_snapshots(seed: int, tmp_path: Path) -> None:
    """Writes, zeroes, discards, snapshots made, applied and deleted, sizes changed: with both, and with each on the other's."""
    random = Random(seed)
    options = OPTIONS[seed % len(OPTIONS)]
    cluster = random.choice([16384, 65536] if "extended" in options else [512, 4096, 65536])
    pair = Pair(tmp_path, random, f"{options},cluster_size={cluster}", cluster)
    for number in range(14):
        pair.step()
        if number % 3 == 2:
            pair.check()
            pair.swap()
    pair.check()


def test_compressed_clusters_are_shared_and_given_back(tmp_path: Path) -> None:
    """Several compressed clusters lie in one host cluster, which counts each of them once for every snapshot."""
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"".join(bytes([number]) * 65536 for number in range(1, 33)))
    assert real("convert", "-O", "qcow2", "-c", raw, image)[0] == 0
    for number in range(3):
        assert ours("snapshot", "-c", f"s{number}", image)[0] == 0
        our_io(image, f"write -P 200 {number * 256 * 1024} 128k")
        assert real("check", image)[0] == 0
    for name in ("s1", "s0", "s2"):
        assert ours("snapshot", "-a", name, image)[0] == 0
        assert real("check", image)[0] == 0
        assert ours("snapshot", "-d", name, image)[0] == 0
        code, out = real("check", image)
        assert code == 0, out
    real_io(image, "read -P 200 256k 128k")
    real_io(image, "read -P 200 0 128k")


def test_the_state_of_a_machine_goes_with_its_snapshot(tmp_path: Path) -> None:
    """savevm of a real machine: applied and carried by qblock, and given back when the disk grows or shrinks."""
    image = tmp_path / "vm.qcow2"
    assert real("create", "-q", "-f", "qcow2", image, "64M")[0] == 0
    script = "\n".join(
        json.dumps(command)
        for command in (
            {"execute": "qmp_capabilities"},
            {"execute": "human-monitor-command", "arguments": {"command-line": "savevm first"}},
            {"execute": "human-monitor-command", "arguments": {"command-line": "savevm second"}},
            {"execute": "quit"},
        )
    )
    machine = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-m", "16", "-qmp", "stdio"]
    drive = ["-drive", f"if=none,file={image},format=qcow2,id=d"]
    subprocess.run([*machine, *drive], input=script, text=True, check=True, stdout=subprocess.DEVNULL, timeout=60)
    listed = ours("snapshot", "-l", image)
    assert listed == real("snapshot", "-l", image)
    assert len(listed[1].splitlines()) == 4
    assert ours("info", "--output=json", image) == real("info", "--output=json", image)
    assert ours("snapshot", "-a", "first", image)[0] == 0
    assert ours("snapshot", "-c", "third", image)[0] == 0
    assert ours("snapshot", "-d", "first", image)[0] == 0
    assert real("check", image)[0] == 0
    for size in ("1G", "1M"):
        assert ours("resize", "-q", "--shrink", image, size)[0] == 0
        assert real("check", image)[0] == 0
    # The state that is left is the one that the real machine can load.
    load = [*machine, *drive, "-loadvm", "second"]
    shutil.copy(image, tmp_path / "copy.qcow2")
    done = subprocess.run(
        load, input='{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n', text=True, check=False,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert real("check", image)[0] == 0


def test_names_and_extra_data_that_qblock_does_not_know_are_kept(tmp_path: Path) -> None:
    """Bytes that are no text in a name, and extra data of the future: they are there after the table was written anew."""
    image = tmp_path / "a.qcow2"
    assert ours("create", "-q", "-f", "qcow2", image, "1M")[0] == 0
    assert ours("snapshot", "-c", "abc", image)[0] == 0
    raw = bytearray(image.read_bytes())
    table = int.from_bytes(raw[64:72], "big")
    entry = raw[table : table + 40]
    entry[36:40] = (40).to_bytes(4, "big")
    changed = entry + raw[table + 40 : table + 64] + b"of the future..." + b"1\xffbc"
    raw[table : table + len(changed)] = changed
    image.write_bytes(raw)
    assert ours("snapshot", "-c", "other", image)[0] == 0
    raw = bytearray(image.read_bytes())
    table = int.from_bytes(raw[64:72], "big")
    assert raw[table + 64 : table + 84] == b"of the future...1\xffbc"
    assert real("check", image)[0] == 0
    assert [one["id"] for one in json.loads(real("info", "--output=json", image)[1])["snapshots"]] == ["1", "2"]


LINES: list[list[str]] = [
    ["-l", "IMAGE"],
    ["IMAGE"],
    ["-l", "-q", "IMAGE"],
    ["-U", "-l", "IMAGE"],
    ["-l", "-l", "IMAGE"],
    ["-c", "a", "-d", "b", "IMAGE"],
    ["-d", "nobody", "IMAGE"],
    ["-d", "2", "IMAGE"],
    ["-a", "nobody", "IMAGE"],
    ["-a", "2", "IMAGE"],
    ["-c", "", "IMAGE"],
    ["-c", "x" * 300, "IMAGE"],
    ["-U", "-c", "x", "IMAGE"],
    ["IMAGE", "IMAGE"],
    [],
    ["-l", "RAW"],
    ["-c", "x", "RAW"],
    ["-a", "x", "RAW"],
    ["-d", "x", "RAW"],
    ["-l", "nowhere"],
    ["--image-opts", "-l", "driver=qcow2,file.filename=IMAGE"],
]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_command_lines_have_the_same_end(words: list[str], tmp_path: Path) -> None:
    """Exit code and output of each, and the snapshots that are left."""
    image, raw = tmp_path / "a.qcow2", tmp_path / "a.raw"
    real("create", "-q", "-f", "qcow2", image, "1M")
    real("create", "-q", "-f", "raw", raw, "1M")
    for name in ("one", "two", "2x"):
        real("snapshot", "-c", name, image)
    healthy = image.read_bytes()
    given = [word.replace("IMAGE", str(image)).replace("RAW", str(raw)) for word in words]
    theirs = real("snapshot", *given)
    left = len(real("snapshot", "-l", image)[1].splitlines())
    image.write_bytes(healthy)
    assert ours("snapshot", *given) == theirs
    assert len(real("snapshot", "-l", image)[1].splitlines()) == left
    assert real("check", image)[0] == 0
