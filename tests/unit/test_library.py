"""What the image tools do, as functions: results as values, nothing opened that was not asked for, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qblock
from qblock.units import KiB, MiB


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``base`` with data at 1 MiB, ``top`` over it with data at 2 MiB."""
    monkeypatch.chdir(tmp_path)
    qblock.create("base", "8M")
    with qblock.open("base", writable=True) as image:
        image.write(MiB, b"base" * 1024)
    qblock.create("top", "8M", backing="base", backing_fmt="qcow2")
    with qblock.open("top", writable=True, backing=True) as image:
        image.write(2 * MiB, b"top" * 1000)


@pytest.mark.usefixtures("chain")
def test_info_opens_nothing_that_the_image_mentions() -> None:
    """A question about a stranger's image must not read other files."""
    os.unlink("base")
    info = qblock.info("top")
    assert (info.format, info.length, info.backing_filename, info.backing_format) == ("qcow2", 8 * MiB, "base", "qcow2")
    assert info.specific["refcount-bits"] == 16


@pytest.mark.usefixtures("chain")
def test_layers_tell_what_is_mentioned_used_and_unsafe() -> None:
    """A broken, guessed or used chain is told of before anything is opened for its content."""
    top, base = qblock.layers("top")
    assert [mention.filename for mention in top.mentions] == ["base"]
    assert (top.unsafe, base.unsafe, base.holders) == ((), (), ())
    with qblock.open("base", writable=True):
        (holder,) = qblock.layers("top")[1].holders
        assert (holder.pid, holder.writes, "write" in holder.forbids) == (os.getpid(), True, True)
    os.unlink("base")
    top, base = qblock.layers("top")
    assert "is not there" in top.unsafe[0]
    assert base.failure is not None


@pytest.mark.usefixtures("chain")
def test_layers_end_where_a_chain_comes_back_to_itself() -> None:
    """A loop of backing files is reported, not followed for ever."""
    qblock.rebase("base", "top", "qcow2", unsafe=True)
    assert [layer.failure is None for layer in qblock.layers("top")] == [True, True, False]


@pytest.mark.usefixtures("chain")
def test_content_below_is_read_only_when_asked_for() -> None:
    """The gate before backing files holds for every function that needs content."""
    for function in (qblock.map, qblock.measure, lambda path: qblock.convert(path, "out")):
        with pytest.raises(qblock.OpenDenied):
            function("top")
    assert not Path("out").exists()
    stored = [extent for extent in qblock.map("top", backing=True) if extent.data and not extent.zero]
    assert [(extent.start, extent.depth) for extent in stored] == [(MiB, 1), (2 * MiB, 0)]


@pytest.mark.usefixtures("chain")
def test_a_copy_is_told_of_measured_and_found_equal() -> None:
    """convert, measure and compare agree with each other."""
    heard: list[tuple[int, int]] = []
    result = qblock.convert("top", "copy", backing=True, cluster_size=4096, progress=lambda *done: heard.append(done))
    assert (result.length, heard[0], heard[-1]) == (8 * MiB, (0, 8 * MiB), (8 * MiB, 8 * MiB))
    assert qblock.compare("top", "copy", backing=True).identical
    with qblock.open("copy", writable=True) as image:
        image.write(5 * MiB + 700, b"x")
    compared = qblock.compare("top", "copy", backing=True)
    assert (compared.identical, compared.offset) == (False, 5 * MiB + 512)
    assert qblock.measure("copy").required >= 4 * KiB
    joined = qblock.convert(["base", "copy"], "joined", fmt="raw")
    assert joined.length == 16 * MiB


@pytest.mark.usefixtures("chain")
def test_all_that_walks_through_an_image_tells_how_far_it_is() -> None:
    """What is done never goes down, and is everything at the end; a check of snapshots, too, and one that repairs."""
    with qblock.open("top", writable=True, backing=True) as image:
        image.create_snapshot("before")
        image.write(3 * MiB, bytes(64 * KiB))

    def hear(operation: Callable[..., object], *words: Any, **options: Any) -> list[tuple[int, int]]:
        heard: list[tuple[int, int]] = []
        operation(*words, progress=lambda *done: heard.append(done), **options)
        assert heard == sorted(heard)
        assert {total for _, total in heard} == {heard[-1][0]}
        return heard

    assert hear(qblock.map, "top", backing=True)[-1] == (8 * MiB, 8 * MiB)
    assert hear(qblock.measure, "top", backing=True)[-1] == (8 * MiB, 8 * MiB)
    assert len(hear(qblock.check, "top")) > 2
    with open("top", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + 65536)
    assert hear(qblock.check, "top", repair="all", explain=True)


@pytest.mark.usefixtures("chain")
def test_what_a_progress_raises_ends_a_copy_without_a_trace() -> None:
    """A user who cancels does not get half an image."""

    def cancel(done: int, total: int) -> None:
        raise qblock.CommandError("enough")

    with pytest.raises(qblock.CommandError, match="enough"):
        qblock.convert("top", "copy", backing=True, progress=cancel)
    assert not Path("copy").exists()


@pytest.mark.usefixtures("chain")
def test_damage_is_found_mended_and_amended() -> None:
    """check and amend on an image whose last clusters nobody uses."""
    assert qblock.check("top").leaks == 0
    with open("top", "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.truncate(end + 65536)
        file.seek(0x20000 + 2 * (end // 65536))
        file.write(b"\0\1")
    assert qblock.check("top").leaks == 1
    assert qblock.check("top", repair="leaks").leaks_fixed == 1
    qblock.amend("top", backing=True, refcount_bits=64)
    assert qblock.info("top").specific["refcount-bits"] == 64
    with pytest.raises(qblock.CommandError, match="nonsense"):
        qblock.amend("top", backing=True, nonsense=1)


def test_a_foreign_parser_reads_a_filesystem_off_an_image(tmp_path: Path) -> None:
    """The file over an image is file enough for somebody else's ext4 reader: seeks, short reads, the end."""
    extfs = pytest.importorskip("dissect.extfs")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    import shutil
    import subprocess

    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    (tmp_path / "files").mkdir()
    content = os.urandom(300_000)
    (tmp_path / "files" / "big").write_bytes(content)
    subprocess.run(["mkfs.ext4", "-q", "-d", tmp_path / "files", tmp_path / "raw", "16M"], check=True, capture_output=True)
    qblock.convert(tmp_path / "raw", tmp_path / "image", source_fmt="raw", compressed=True, cluster_size=4096)
    with qblock.open(tmp_path / "image") as image:
        assert extfs.ExtFS(image.as_file()).get("big").open().read() == content
