"""``qblock-img measure`` and ``dd`` beside the real ones: the same numbers, the same bytes, the same exit codes."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from image_tools import Run, qemu

MiB = 1 << 20


def random_image(rng: random.Random, path: Path, base: Path | None) -> None:
    """An image with random options and content, made by the real programs."""
    size = rng.choice([0, 512, 70_144, 3 * MiB, 3 * MiB + 1024, 40 * MiB])
    if base is None and rng.random() < 0.3:
        path.write_bytes(rng.randbytes(min(size, 3 * MiB)))
        with path.open("r+b") as file:
            file.truncate(size + rng.choice([0, 5]))
        return
    bits = rng.randrange(9, 18)
    options = f"cluster_size={1 << bits}" + (",extended_l2=on" if bits > 13 and rng.random() < 0.3 else "")
    if base is None and rng.random() < 0.3:
        options += ",preallocation=metadata"
    backing = ["-b", base.name, "-F", "qcow2" if base.suffix == ".q" else "raw"] if base else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, "-o", options, path, str(size)], check=True)
    commands = []
    for _ in range(rng.randrange(12) if size else 0):
        at = rng.randrange(size) & ~511
        length = min(rng.randrange(1, 40) * rng.choice([512, 4096]), size - at)
        commands += ["-c", f"write {rng.choice(['-P 7', '-z', '-z -u', '-P 0'])} {at} {length}"]
    if commands:
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True, stdout=subprocess.DEVNULL)


def random_options(rng: random.Random) -> list[str]:
    """Creation options to measure with; not all combinations can be."""
    options = []
    if rng.random() < 0.7:
        options.append(f"cluster_size={1 << rng.randrange(9, 22)}")
    if rng.random() < 0.3:
        options.append("extended_l2=on")
    if rng.random() < 0.4:
        options.append(f"refcount_bits={1 << rng.randrange(7)}")
    if rng.random() < 0.4:
        options.append(f"preallocation={rng.choice(['off', 'metadata', 'falloc', 'full'])}")
    if rng.random() < 0.2:
        options.append("backing_file=base,backing_fmt=raw")
    if rng.random() < 0.2:
        options.append("compat=0.10")
    return ["-o", ",".join(options)] if options else []


@pytest.mark.parametrize("seed", range(12))
def test_measured_sizes_are_those_of_qemu(
    seed: int, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes a volume of the size that measure tells relies on each byte of it."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    base, top = tmp_path / "base.q", tmp_path / "top.q"
    random_image(rng, base, None)
    images = [base]
    if qemu("info", "base.q")[1].find("file format: qcow2") >= 0:
        random_image(rng, top, base)
        images.append(top)
    for image in images:
        for _ in range(4):
            words = ["measure", "--output=json", "-O", rng.choice(["qcow2"] * 5 + ["raw"])]
            words += [*(random_options(rng) if words[-1] == "qcow2" else []), image.name]
            assert ours(*words) == qemu(*words), words
    for _ in range(8):
        size = rng.choice(["0", "1", "1000", "64k", "10M", "1.5G", "127G", "129G", "3T", "5P"])
        words = ["measure", "-O", "qcow2", *random_options(rng), "--size", size]
        assert ours(*words) == qemu(*words), words


def test_measure_reckons_with_persistent_bitmaps(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitmaps are told apart, since convert copies them on demand only; broken ones take no part in it or do, as in QEMU."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.q", "3G"], check=True)
    for name, granularity in (("b0", "64k"), ("fine", "512"), ("a-long-name-" * 6, "2M")):
        subprocess.run(["qemu-img", "bitmap", "--add", "-g", granularity, "a.q", name], check=True)
    for options in ([], ["-o", "cluster_size=512"], ["-o", "cluster_size=2M"], ["-o", "compat=0.10"]):
        words = ["measure", "--output=json", "-O", "qcow2", *options, "a.q"]
        assert ours(*words) == qemu(*words)
    assert json.loads(ours("measure", "--output=json", "-O", "qcow2", "a.q")[1])["bitmaps"] > 0
    assert ours("measure", "-O", "raw", "a.q") == qemu("measure", "-O", "raw", "a.q")


def test_measure_of_a_snapshot(ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there then counts, in a disk of the present size."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.q", "10M"], check=True)
    for commands in (["write 0 2M"], ["write 0 8M", "write -z 1M 64k"]):
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", *words, "a.q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "snapshot", "-c", f"s{len(commands)}", "a.q"], check=True)
    for option in ("s1", "s2", "snapshot.name=s1", "2", "gone"):
        words = ["measure", "-O", "qcow2", "-l", option, "a.q"]
        assert ours(*words) == qemu(*words), option


@pytest.mark.parametrize(
    "line",
    [
        "measure", "measure --size 1G a b", "measure a b", "measure --size 1 -f raw", "measure --size 8E", "measure nosuch",
        "measure --size x", "measure -O nosuch --size 1", "measure -O null-co --size 1", "measure --output=xml --size 1",
        "measure --size 1 -o foo=1", "measure --size 1001 --output json", "measure --size 1 -U", "measure in",
        "measure --image-opts driver=raw,file.filename=in", "measure -O qcow2 -o help --size 1", "measure --object x --size 1",
        "measure --object secret,id=a,data=b --size 4k", "measure -O qcow2 -o cluster_size=3000 --size 1M",
    ],
)  # fmt: skip
def test_measure_ends_as_qemu_does(line: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes and what is printed are the same for every kind of mistake."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(b"a" * 1001)
    assert ours(*line.split()) == qemu(*line.split())


DD_LINES = (
    "", "bs=1000", "bs=1000 count=3", "skip=3", "skip=3 count=2", "skip=3 count=5", "skip=100", "skip=14", "skip=100 count=1",
    "count=0", "count=100000", "bs=0", "bs=1k count=2k", "bs=3G", "bs=2147483647", "bs=-1", "bs=x", "count=x", "skip=x", "seek=1",
    "extra", "-O qcow2", "-O nosuch", "-O null-co", "-f qcow2", "-f nosuch", "-U bs=1M", "--force-share", "bs=1.5k count=1",
    "bs=1 count=1000", "-O qcow2 bs=1000 count=1 skip=2", "-O qcow2 bs=3000 skip=1", "count=1 count=2", "-n", "-q", "if=nosuch",
    "of=nodir/out", "if= ", "--object secret,id=x,data=y",
)  # fmt: skip


@pytest.mark.parametrize("line", DD_LINES)
def test_dd_copies_what_qemu_copies(line: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code, size, format and every byte of the output agree, also where 7.2 is peculiar (count with skip)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(random.Random(1).randbytes(4000) + bytes(3000) + b"abcdefg")
    words = ["dd", "if=in", "of=out", *line.split()]
    results = []
    for run in (qemu, ours):
        (tmp_path / "out").write_bytes(b"old" * 5000)
        code, out = run(*words)
        facts = [qemu("info", "--output=json", "out")[1].partition('"actual-size"')[0], qemu("map", "out")[1]] if not code else []
        qemu("convert", "-O", "raw", "out", "content")
        results.append((code, out, facts, (tmp_path / "content").read_bytes() if not code else b""))
    assert results[0] == results[1]


def test_dd_reads_through_chains_and_image_options(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input may be any image; the output's name is always a plain file."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(5)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base.q", "3M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 5 100k 2M", "base.q"], check=True, stdout=subprocess.DEVNULL)
    random_image(rng, tmp_path / "top.q", tmp_path / "base.q")
    for words in (["if=top.q"], ["--image-opts", "if=driver=qcow2,file.filename=top.q"], ["-f", "raw", "if=top.q"]):
        assert ours("dd", *words, "bs=64k", "skip=1", "of=ours")[0] == 0
        assert qemu("dd", *words, "bs=64k", "skip=1", "of=real")[0] == 0
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()


def test_dd_does_not_empty_its_input(ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """7.2 makes the output first and reads zeroes then; a disk is worth a question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(b"x" * 1024)
    (tmp_path / "alias").symlink_to("disk")
    assert ours("dd", "if=disk", "of=alias")[0] == 1
    assert (tmp_path / "disk").read_bytes() == b"x" * 1024
