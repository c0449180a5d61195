"""Compressed clusters beside the real programs: what one packs the other reads, and both say the same of it."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools import io as io_tool
from qblock.tools.img import main

Run = Callable[..., tuple[int, str]]
MiB = 1 << 20


def qemu(*args: str | Path) -> str:
    """Standard output of a real program that must succeed."""
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (args, done.stdout, done.stderr)
    return done.stdout


def facts(image: str) -> dict[str, object]:
    """What the real check counts, which must find nothing wrong; places apart."""
    found: dict[str, object] = json.loads(qemu("qemu-img", "check", "--output=json", image))
    keys = ("allocated-clusters", "compressed-clusters", "total-clusters", "leaks", "corruptions")
    return {key: found.get(key) for key in keys}


def random_source(rng: random.Random, name: str, base: str | None = None) -> None:
    """A qcow2 image with data, zeroes and holes of all lengths, half of it incompressible."""
    size = rng.choice([512, 70_144, MiB, 3 * MiB + 1536])
    backing = ["-b", base, "-F", "qcow2"] if base else []
    bits = rng.randrange(9, 18)
    cluster = f"cluster_size={1 << bits}" + (",extended_l2=on" if bits > 13 and rng.random() < 0.5 else "")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, "-o", cluster, name, str(size))
    Path("noise").write_bytes(rng.randbytes(70_000))
    commands = []
    for _ in range(rng.randrange(14)):
        at = rng.randrange(size) & ~511
        length = min(rng.randrange(1, 60) * rng.choice([512, 4096]), size - at)
        commands += ["-c", f"write {rng.choice(['-P 7', '-z', '-P 0', '-s noise'])} {at} {length}"]
    if commands:
        qemu("qemu-io", "-f", "qcow2", *commands, name)


@pytest.mark.parametrize("seed", range(20))
def test_convert_c_makes_what_qemu_makes(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sources, joined or chained, at random geometries: the same content, as many compressed clusters, no larger file."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    sources = [f"s{i}" for i in range(rng.choice([1, 1, 1, 2, 3]))]
    for name in sources:
        random_source(rng, name)
    words: list[str] = rng.choice([[], ["-S", "0"], ["-W"], ["-m", "1"], ["-m", "16"], ["-S", "64k"]])
    if len(sources) == 1 and rng.random() < 0.3:
        random_source(rng, "top", "s0")
        sources = ["top"]
    kind = rng.choice(["zlib", "zstd"])
    bits = rng.randrange(9, 22)
    extended = "on" if bits > 13 and rng.random() < 0.3 else "off"
    shape = f"cluster_size={1 << bits},extended_l2={extended},refcount_bits={1 << rng.randrange(7)},compression_type={kind}"
    words = ["convert", "-c", "-O", "qcow2", "-o", shape, *words, *sources]
    qemu("qemu-img", *words, "real")
    assert main([*words, "ours"]) == 0
    assert facts("ours") == facts("real")
    qemu("qemu-img", "convert", "-O", "raw", *sources, "flat")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "flat", "ours")
    assert main(["compare", "-q", "real", "ours"]) == 0
    assert main(["check", "-q", "ours"]) == 0
    assert Path("ours").stat().st_size <= Path("real").stat().st_size * 1.02 + 4096


def test_convert_c_over_a_backing_file_keeps_what_lies_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters that the layer above has only in part are packed whole, those it has not at all are left to the backing file."""
    monkeypatch.chdir(tmp_path)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "base", "3M")
    qemu("qemu-io", "-c", "write -P 1 0 2M", "base")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "qcow2", "top")
    qemu("qemu-io", "-c", "write -P 2 100k 4k", "-c", "write -z 1M 200k", "-c", "write -P 3 2500k 8k", "top")
    words = ["convert", "-c", "-O", "qcow2", "-B", "base", "-F", "qcow2", "top"]
    qemu("qemu-img", *words, "real")
    assert main([*words, "ours"]) == 0
    qemu("qemu-img", "compare", "top", "ours")
    assert facts("ours") == facts("real")


def test_the_same_source_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads pack in any order; what comes out is laid out in the source's, to the byte."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    Path("raw").write_bytes(b"".join(rng.choice([rng.randbytes(5000), bytes(9000), b"abc" * 7000]) for _ in range(900)))
    for name in ("one", "two"):
        assert main(["convert", "-c", "-f", "raw", "-O", "qcow2", "raw", name]) == 0
    assert Path("one").read_bytes() == Path("two").read_bytes()


IO_COMMANDS = (
    "write -c -P 1 0 64k", "write -c -P 2 0 64k", "write -c -P 2 64k 32k", "write -c -P 2 100k 64k", "write -c -P 3 128k 192k",
    "write -c -P 3 983040 16384", "write -c -P 3 983040 65536", "write -P 9 0 512", "write -c 0 64k", "write -z -c 512k 64k",
    "write -c -P 3 512k 64k", "write -c -P 3 640k 100k", "read -P 1 512 1k", "write -c -P 1 704k 0", "write -cq 320k 64k",
    "write -c -s noise 576k 128k", "write -c -P 4 983040 17408", "write -c -u 0 64k", "write -P 5 128k 64k", "discard 192k 64k",
    "write -c -P 6 192k 64k", "map", "read 0 960k",
)  # fmt: skip


@pytest.mark.parametrize(
    "options", ["", "compression_type=zstd", "cluster_size=512", "compat=0.10", "refcount_bits=1", "extended_l2=on"]
)
def test_write_c_answers_as_qemu_io_does(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which compressed writes are refused, what later commands see, and what they leave behind."""
    monkeypatch.chdir(tmp_path)
    Path("noise").write_bytes(random.Random(1).randbytes(65536))
    words = [word for command in IO_COMMANDS for word in ("-c", command)]
    outputs = []
    for name in ("real", "ours"):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), name, "1000448")
        if name == "real":
            done = subprocess.run(["qemu-io", *words, name], capture_output=True, text=True, check=False)
            code, out = done.returncode, done.stdout
        else:
            capfd.readouterr()
            code, out = io_tool.main([*words, name]), capfd.readouterr().out
        lines = [line for line in out.splitlines() if "ops/sec" not in line and "options" not in line]
        outputs.append((code, lines, facts(name)))
    assert outputs[0] == outputs[1]
    qemu("qemu-img", "compare", "real", "ours")


def test_raw_images_and_data_files_refuse_compressed_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They say so before anything is written."""
    monkeypatch.chdir(tmp_path)
    Path("raw").write_bytes(bytes(MiB))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "split", "1M")
    for fmt, name in (("raw", "raw"), ("qcow2", "split")):
        assert io_tool.main(["-f", fmt, "-c", "write -c 0 64k", name]) == 1
        assert re.search("write failed: Operation not supported", capfd.readouterr().out)


def test_the_wrong_options_for_compressing_end_as_in_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-c wants a format that has it, and neither preallocation, nor offloading, nor encryption."""
    monkeypatch.chdir(tmp_path)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "source", "1M")
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    for words in (
        ["-c", "-O", "raw"], ["-c", "-C", "-O", "qcow2"], ["-c", "-O", "qcow2", "-o", "preallocation=metadata"],
        ["-c", "-O", "qcow2", "-o", "preallocation=off"], ["-c", "-W", "-O", "qcow2"], ["-c", "-O", "qcow2", *secret],
    ):  # fmt: skip
        real = subprocess.run(["qemu-img", "convert", *words, "source", "real"], capture_output=True, check=False).returncode
        assert main(["convert", *words, "source", "ours"]) == real, words


def test_an_existing_target_is_filled_with_packed_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-n -c: into an image that is longer than the source and not empty."""
    monkeypatch.chdir(tmp_path)
    random_source(random.Random(4), "source")
    for name in ("real", "ours"):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", name, "5M")
        qemu("qemu-io", "-c", "write -P 9 0 5M", name)
    assert main(["convert", "-n", "-c", "-O", "qcow2", "source", "ours"]) == 0
    qemu("qemu-img", "compare", "source", "ours")
    assert facts("ours")["leaks"] is None
