"""qblock-img beside the real qemu-img: same exit codes, same output, images that each other can read."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from image_tools import Run, qemu, qemu_io


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, made by the real tools."""
    folder = tmp_path_factory.mktemp("gallery")
    before = Path.cwd()
    os.chdir(folder)
    try:
        _fill_gallery(folder)
    finally:
        os.chdir(before)
    return folder


def _fill_gallery(folder: Path) -> None:
    def create(*args: str) -> None:
        assert qemu("create", "-q", *args)[0] == 0, args

    create("-f", "qcow2", "base.q", "10M")
    qemu_io("base.q", "write 0 1M", "write -z 1M 1M", "write -P 7 5M 64k")
    create("-f", "qcow2", "-b", "base.q", "-F", "qcow2", "top.q", "12M")
    qemu_io("top.q", "write -P 1 512k 64k", "write -P 2 11M 64k", "write -z 3M 1M", "write -P 3 4100k 5k")
    assert qemu("convert", "-q", "-f", "qcow2", "-O", "qcow2", "-c", "top.q", "compressed.q")[0] == 0
    assert qemu("convert", "-q", "-f", "qcow2", "-O", "raw", "top.q", "top.raw")[0] == 0
    create("-f", "raw", "hole.raw", "3M")
    (folder / "odd.raw").write_bytes(b"x" * 1001)
    (folder / "empty.raw").write_bytes(b"")
    (folder / "tiny.raw").write_bytes(b"abc")
    create("-f", "qcow2", "-o", "compat=0.10", "old.q", "1M")
    create("-f", "qcow2", "-o", "cluster_size=512,refcount_bits=1", "small.q", "1M")
    qemu_io("small.q", "write 1000 3000", "write 700k 20k")
    create("-f", "qcow2", "-o", "cluster_size=2M,lazy_refcounts=on", "big.q", "40M")
    create("-f", "qcow2", "-o", "preallocation=metadata", "prealloc.q", "10M")
    create("-f", "qcow2", "-o", "compression_type=zstd", "zstd.q", "10M")
    create("-f", "qcow2", "-u", "-b", "gone.q", "-F", "qcow2", "orphan.q", "5M")
    (folder / "sub").mkdir()
    create("-f", "qcow2", "-b", "../top.q", "-F", "qcow2", "sub/third.q")
    qemu_io("sub/third.q", "write -P 9 2M 100k")
    damaged = bytearray((folder / "base.q").read_bytes())
    refcount_block = int.from_bytes(damaged[0x10000:0x10008], "big")
    damaged[refcount_block + 10 : refcount_block + 12] = b"\0\0"
    (folder / "corrupt.q").write_bytes(damaged)
    leaky = bytearray((folder / "base.q").read_bytes())
    cluster = len(leaky) // 65536
    leaky[refcount_block + 2 * cluster : refcount_block + 2 * cluster + 4] = b"\0\1\0\1"
    (folder / "leaky.q").write_bytes(leaky + bytes(3 * 65536))


IMAGES = (
    "base.q", "top.q", "compressed.q", "top.raw", "hole.raw", "odd.raw", "empty.raw", "tiny.raw", "old.q", "small.q",
    "big.q", "prealloc.q", "zstd.q", "sub/third.q",
)  # fmt: skip


PROTOCOL_NAMES = (
    "null-co://", "null-aio://", "null-co://x", "blkdebug::top.q", "blkdebug::odd.raw", "blkdebug:gone:top.q", "blkdebug:q",
)  # fmt: skip


@pytest.mark.parametrize("image", [*IMAGES, "orphan.q", "corrupt.q", "missing.q", *PROTOCOL_NAMES])
@pytest.mark.parametrize("options", [(), ("--output=json",), ("-U",)])
def test_info_prints_what_qemu_prints(
    image: str, options: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts parse this output; it is the same to the byte."""
    monkeypatch.chdir(gallery)
    assert ours("info", *options, image) == qemu("info", *options, image)


@pytest.mark.parametrize("options", [(), ("--output", "json")])
@pytest.mark.parametrize("image", ["top.q", "sub/third.q", "base.q", "hole.raw", "orphan.q"])
def test_info_of_a_chain_lists_all_layers(
    image: str, options: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain is followed through relative names, and a broken link is a failure."""
    monkeypatch.chdir(gallery)
    assert ours("info", "--backing-chain", *options, image) == qemu("info", "--backing-chain", *options, image)


@pytest.mark.parametrize(
    "args",
    [
        ("info",),
        ("info", "a", "b"),
        ("info", "--output=xml", "base.q"),
        ("info", "-x", "base.q"),
        ("info", "-f", "nonsense", "base.q"),
        ("info", "-f", "qcow2", "hole.raw"),
        ("info", "-f", "raw", "base.q"),
        ("info", "base.q", "-f", "qcow2"),
        ("info", "file:base.q"),
        ("info", "--image-opts", "driver=qcow2,file.filename=base.q"),
        ("info", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.q"}}'),
        ("info", "sub"),
        ("check",),
        ("check", "-r", "some", "base.q"),
        ("check", "missing.q"),
        ("map",),
        ("map", "-s", "x", "base.q"),
        ("compare", "base.q"),
        ("compare", "missing.q", "base.q"),
        ("compare", "base.q", "missing.q"),
        ("compare", "-f", "nonsense", "base.q", "top.q"),
        ("compare", "-T", "nonsense", "base.q", "top.q"),
        ("convert",),
        ("convert", "base.q"),
        ("convert", "-S", "1000", "base.q", "x"),
        ("convert", "-m", "0", "base.q", "x"),
        ("convert", "-m", "17", "base.q", "x"),
        ("convert", "-C", "-S", "4k", "base.q", "x"),
        ("convert", "--target-is-zero", "base.q", "x"),
        ("convert", "-n", "base.q", "missing.raw"),
        ("convert", "-n", "-O", "raw", "base.q", "tiny.raw"),
        ("convert", "-B", "base.q", "-O", "qcow2", "top.q", "x"),
        ("convert", "-B", "base.q", "-F", "qcow2", "-O", "raw", "top.q", "x"),
        ("convert", "-O", "nonsense", "base.q", "x"),
        ("convert", "-O", "raw", "orphan.q", "x"),
        ("convert", "-O", "raw", "base.q", "missing/x"),
        ("create",),
        ("create", "-f", "qcow2", "x"),
        ("create", "-f", "qcow2", "x", "1M", "2M"),
        ("create", "-f", "qcow2", "x", "words"),
        ("create", "-f", "nonsense", "x", "1M"),
        ("create", "-f", "qcow2", "-b", "base.q", "x"),
        ("create", "-f", "qcow2", "-b", "missing.q", "-F", "qcow2", "x"),
        ("create", "-f", "raw", "-b", "base.q", "-F", "qcow2", "x", "1M"),
        ("create", "-f", "qcow2", "-o", "nonsense=1", "x", "1M"),
        ("create", "-f", "qcow2", "-b", "x", "-F", "qcow2", "x"),
        ("create", "-f", "qcow2", "x", "8E"),
        ("nonsense",),
        (),
    ],
)
def test_mistakes_end_with_the_same_status(
    args: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts look at the exit code; the words on stderr are our own."""
    monkeypatch.chdir(gallery)
    code, _ = ours(*args)
    assert code == qemu(*args)[0]
    assert not (gallery / "x").exists()


@pytest.mark.parametrize("options", [(), ("--output=json",), ("-q",), ("-U",)])
@pytest.mark.parametrize("image", [*IMAGES, "corrupt.q", "leaky.q", "orphan.q"])
def test_check_prints_what_qemu_prints(
    image: str, options: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same verdict, same numbers, same exit code: 0, 2, 3 or 63."""
    monkeypatch.chdir(gallery)
    assert ours("check", *options, image) == qemu("check", *options, image)


@pytest.mark.parametrize("options", [(), ("--output=json",), ("-s", "512k", "-l", "4M"), ("-s", "100", "-l", "1000")])
@pytest.mark.parametrize("image", IMAGES)
def test_map_prints_what_qemu_prints(
    image: str, options: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every byte lies, seen by both."""
    monkeypatch.chdir(gallery)
    assert ours("map", *options, image) == qemu("map", *options, image)


def test_map_of_a_part_as_json(gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that begin and end inside areas, and parts behind the end."""
    monkeypatch.chdir(gallery)
    for part in (("-s", "100", "-l", "1000"), ("-s", "20M"), ("-l", "0"), ("--start-offset=0x80000",)):
        args = ("map", "--output=json", *part, "top.q")
        assert ours(*args) == qemu(*args), part


@pytest.mark.parametrize("options", [(), ("-s",), ("-q",), ("-p",)])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("top.q", "top.raw"), ("top.raw", "top.q"), ("top.q", "base.q"), ("base.q", "top.q"), ("compressed.q", "top.q"),
        ("hole.raw", "old.q"), ("empty.raw", "hole.raw"), ("base.q", "base.q"), ("top.raw", "hole.raw"),
    ],
)  # fmt: skip
def test_compare_finds_what_qemu_finds(
    one: str, two: str, options: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same verdict, same place of the first difference. Progress lines are compared by their last one."""
    monkeypatch.chdir(gallery)
    code, text = ours("compare", *options, one, two)
    expected_code, expected = qemu("compare", *options, one, two)
    assert code == expected_code
    assert text.split("\r")[-1].strip() == expected.split("\r")[-1].strip()
    assert text.count("\n") == expected.count("\n")


CREATIONS = (
    ("-f", "qcow2", "NEW", "10M"),
    ("NEW", "10M"),
    ("-f", "raw", "NEW", "1000"),
    ("-f", "qcow2", "NEW", "1000"),
    ("-f", "qcow2", "-q", "NEW", "1.5M"),
    ("-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts=on", "NEW", "1G"),
    ("-f", "qcow2", "-o", "cluster_size=64k", "-o", "refcount_bits=64", "NEW", "1G"),
    ("-f", "qcow2", "-o", "size=3M", "NEW"),
    ("-f", "qcow2", "-o", "compat=0.10", "NEW", "5M"),
    ("-f", "qcow2", "-o", "compat=v3,compression_type=zstd", "NEW", "5M"),
    ("-f", "qcow2", "-o", "preallocation=metadata", "NEW", "5M"),
    ("-f", "raw", "-o", "preallocation=falloc", "NEW", "1M"),
    ("-f", "qcow2", "-b", "base.q", "-F", "qcow2", "NEW"),
    ("-f", "qcow2", "-b", "base.q", "-F", "qcow2", "NEW", "20M"),
    ("-f", "qcow2", "-o", "backing_file=top.raw,backing_fmt=raw", "NEW"),
    ("-f", "qcow2", "-u", "-b", "gone.q", "-F", "qcow2", "NEW", "20M"),
    ("-f", "qcow2", "-o", "cluster_size=5", "NEW", "1M"),
    ("-f", "qcow2", "-o", "compat=0.10,refcount_bits=1", "NEW", "1M"),
)


@pytest.mark.parametrize("args", CREATIONS, ids=" ".join)
def test_create_makes_what_qemu_makes(
    args: tuple[str, ...], gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line on the screen is the same, and the real tools see the same image."""
    monkeypatch.chdir(gallery)
    words = ["new.img" if word == "NEW" else word for word in args]
    Path("new.img").unlink(missing_ok=True)
    expected = qemu("create", *words)
    report = _real_report("new.img") if expected[0] == 0 else None
    Path("new.img").unlink(missing_ok=True)
    assert ours("create", *words) == expected
    if report is None:
        assert not Path("new.img").exists()
        return
    assert _real_report("new.img") == report
    assert qemu("check", "new.img")[0] in (0, 63) or "gone.q" in words


def _real_report(image: str) -> dict[str, object]:
    """What the real tool says of an image, apart from the space it takes on the host."""
    report = dict(json.loads(qemu("info", "--output=json", image)[1]))
    del report["actual-size"]
    return report


def test_create_help_lists_only_what_works(ours: Run) -> None:
    """Every option listed can be given; QEMU's list is a superset."""
    code, text = ours("create", "-f", "qcow2", "-o", "help")
    assert code == 0
    names = {line.split("=")[0].strip() for line in text.splitlines() if "=<" in line}
    theirs = {line.split("=")[0].strip() for line in qemu("create", "-f", "qcow2", "-o", "help")[1].splitlines()}
    assert names <= theirs
    assert {"cluster_size", "size", "backing_file"} <= names


CONVERSIONS = (
    ("-O", "raw"),
    ("-O", "qcow2"),
    ("-O", "raw", "-S", "0"),
    ("-O", "raw", "-S", "64k"),
    ("-O", "raw", "-C"),
    ("-O", "qcow2", "-C"),
    ("-O", "raw", "-W", "-m", "4"),
    ("-O", "raw", "-m", "1"),
    ("-O", "qcow2", "-W", "-m", "16"),
    ("-O", "qcow2", "-o", "cluster_size=4k"),
    ("-O", "qcow2", "-o", "cluster_size=2M,refcount_bits=8"),
    ("-O", "qcow2", "-o", "compat=0.10"),
    ("-O", "qcow2", "-t", "none", "-T", "none"),
    ("-O", "qcow2", "-t", "writethrough"),
)


@pytest.mark.parametrize("source", ["top.q", "compressed.q", "sub/third.q", "top.raw", "odd.raw", "empty.raw", "small.q"])
@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_converted_images_are_identical(
    source: str,
    options: tuple[str, ...],
    gallery: Path,
    ours: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real tools find our copy equal, clean, and mapped as their own."""
    monkeypatch.chdir(gallery)
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    assert ours("convert", *options, source, mine) == (0, "")
    assert qemu("convert", *options, source, theirs) == (0, "")
    assert qemu("compare", source, mine) == (0, "Images are identical.\n")
    assert qemu("check", mine)[0] in (0, 63)
    if "raw" not in options:
        assert _allocation(mine) == _allocation(theirs)


def _allocation(image: str) -> list[tuple[int, int]]:
    """Which areas an image has clusters for."""
    areas = json.loads(qemu("map", "--output=json", image)[1])
    runs: list[tuple[int, int]] = []
    for area in areas:
        if area["present"]:
            if runs and runs[-1][1] == area["start"]:
                runs[-1] = (runs[-1][0], area["start"] + area["length"])
            else:
                runs.append((area["start"], area["start"] + area["length"]))
    return runs


def test_convert_joins_several_sources(
    gallery: Path, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One behind the other, as one disk."""
    monkeypatch.chdir(gallery)
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    assert ours("convert", "-O", "qcow2", "top.q", "hole.raw", "small.q", mine)[0] == 0
    assert qemu("convert", "-O", "qcow2", "top.q", "hole.raw", "small.q", theirs)[0] == 0
    assert qemu("compare", mine, theirs)[0] == 0


@pytest.mark.parametrize("backing", ["base.q", "top.q"])
def test_convert_onto_a_backing_file_keeps_the_content(
    backing: str, gallery: Path, ours: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what lies above the backing file is copied, whatever number of layers that is (7.2 copies one)."""
    monkeypatch.chdir(gallery)
    target = f"on-{backing}"
    backing = str(gallery / backing)
    assert ours("convert", "-B", backing, "-F", "qcow2", "-O", "qcow2", "sub/third.q", target) == (0, "")
    assert qemu("compare", "sub/third.q", target) == (0, "Images are identical.\n")
    assert qemu("check", target)[0] == 0
    assert os.path.getsize(target) < os.path.getsize("base.q")


def test_convert_into_an_existing_image_replaces_its_content(
    gallery: Path, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-n: what was there before must not shine through the holes of the source."""
    monkeypatch.chdir(gallery)
    for fmt in ("raw", "qcow2"):
        target = str(tmp_path / fmt)
        qemu("create", "-q", "-f", fmt, target, "12M")
        subprocess.run(["qemu-io", "-f", fmt, "-c", "write -P 5 0 12M", target], check=True, stdout=subprocess.DEVNULL)
        assert ours("convert", "-n", "-O", fmt, "top.q", target) == (0, "")
        assert qemu("compare", "top.q", target) == (0, "Images are identical.\n"), fmt


def test_random_images_survive_the_round_trip(ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random content, random zeroes, sizes that are no multiple of anything."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(7)
    for turn in range(6):
        size = rng.randrange(1, 6 << 20)
        content = bytearray(size)
        for _ in range(rng.randrange(30)):
            start, length = rng.randrange(size), rng.choice([1, 511, 4096, 65536, 300000])
            content[start : start + length] = rng.randbytes(min(length, size - start))
        Path("source.raw").write_bytes(content)
        cluster = rng.choice(["512", "4k", "64k", "2M"])
        assert ours("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", "source.raw", "a.q")[0] == 0
        assert qemu("check", "a.q")[0] == 0, turn
        assert qemu("compare", "-f", "raw", "-F", "qcow2", "source.raw", "a.q")[0] == 0, turn
        assert qemu("convert", "-c", "-O", "qcow2", "a.q", "b.q")[0] == 0
        assert ours("convert", "-O", "raw", "b.q", "back.raw")[0] == 0
        back = Path("back.raw").read_bytes()
        assert back[:size] == content
        assert not any(back[size:])


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
def test_an_image_that_qemu_has_open_for_writing_is_refused(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two programs see each other's locks; with -U one may look."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "a.q", "1M")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "a.q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("write 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert ours("info", "a.q")[0] == 1
        assert ours("info", "-U", "a.q")[0] == 0
        assert ours("convert", "-O", "raw", "a.q", "b.raw")[0] == 1
        holder.communicate("quit\n")
    assert ours("info", "a.q")[0] == 0
